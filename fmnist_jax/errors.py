"""Every error and warning class of the package. Standard library only."""

import importlib
from typing import Any


class ConfigError(ValueError):
    """A setting is invalid. The message names the value, what is accepted and what to do."""


class DataError(ValueError):
    """Data is missing or invalid. The message names the file and what to do."""


class DamagedFileError(ValueError):
    """A file of a run is missing or unreadable. The message names it."""


class CheckpointError(OSError):
    """A checkpoint could not be written or read."""


class DivergedError(ArithmeticError):
    """The loss is not finite. The message names epoch and step."""


class Interrupted(Exception):  # noqa: N818 (a requested stop, not an error)
    """A signal or a hook stopped the run after its state was saved.

    Attributes:
      signal_number: number of the signal; None for a hook.
    """

    def __init__(self, message: str, signal_number: int | None = None) -> None:
        super().__init__(message)
        self.signal_number = signal_number


class VerificationError(Exception):
    """A check of a command failed."""


class DataWarning(UserWarning):
    """Data is usable but not the full published data set, or a copy of it was skipped."""


class CheckpointWarning(UserWarning):
    """A checkpoint was skipped, or could not be written for now."""


class EnvironmentWarning(UserWarning):
    """The environment changed since a run began, or its compiler lacks an option."""


def import_optional(name: str, extra: str) -> Any:
    """Imports a package; if it is missing, raises `ConfigError` with the command to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        message = f"{name.partition('.')[0]} is not installed; pip install 'fmnist_jax[{extra}]'"
        raise ConfigError(message) from error


def first_line(error: Exception) -> str:
    """Returns the first line of an error's text, or the name of its class if it has none."""
    return str(error).partition("\n")[0] or type(error).__name__
