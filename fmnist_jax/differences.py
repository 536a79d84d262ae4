"""Differences between two sets of settings, for messages. Standard library only."""

from typing import Any

_ABSENT = "absent"


def list_differences(
    found: Any, wanted: Any, places: tuple[str, str] = ("found", "requested"), name: str = ""
) -> list[str]:
    """Lists the differences between two sets of settings, one line each.

    Args:
      found: the first settings, nested dictionaries ready for JSON.
      wanted: the second settings.
      places: a word for each of the two, to be put behind its value.
      name: prefix of the names.

    Example:
      >>> list_differences({"recipe": {"epochs": 3}}, {"recipe": {"epochs": 5}})
      ['recipe.epochs: 3 found, 5 requested']
    """
    if isinstance(found, dict) and isinstance(wanted, dict):
        return [
            line
            for key in {**found, **wanted}
            for line in list_differences(
                found.get(key, _ABSENT),
                wanted.get(key, _ABSENT),
                places,
                f"{name}.{key}".lstrip("."),
            )
        ]
    if found == wanted:
        return []
    return [f"{name}: {_short(found)} {places[0]}, {_short(wanted)} {places[1]}"]


def differences_message(
    text: str, found: Any, wanted: Any, places: tuple[str, str] = ("found", "requested")
) -> str | None:
    """Returns the text followed by the differences, or None if there are none.

    Example:
      >>> print(differences_message("Other settings:", {"seed": 0}, {"seed": 1}))
      Other settings:
        seed: 0 found, 1 requested
    """
    lines = list_differences(found, wanted, places)
    return "\n  ".join([text, *lines]) if lines else None


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
