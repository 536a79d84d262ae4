"""Renders the HTML pages: one file each, with all style and pictures inside."""

import base64
import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from fmnist_jax.runs import files


def render(template: str, **values: Any) -> bytes:
    """Renders a page in UTF-8.

    Args:
      template: its name in `templates`, without ".html.j2".
      **values: the template's variables, `sample` among them: whether the data are the embedded
        sample. Text is escaped.

    Raises:
      jinja2.UndefinedError: if the template needs a value that is not given.
    """
    return _ENVIRONMENT.get_template(f"{template}.html.j2").render(values).encode()


@contextlib.contextmanager
def missing_values_as_damage(workdir: Path) -> Iterator[None]:
    """Raises DamagedFileError where the block misses a value of a file in `workdir`."""
    try:
        yield
    except (LookupError, jinja2.UndefinedError) as error:
        raise files.DamagedFileError(
            f"a file in {workdir} misses a value: {error}; it is damaged or from another version"
        ) from error


# The filters convert with float() because an undefined value then raises UndefinedError.
def percent(fraction: float | None) -> str:
    """Formats a fraction.

    Example:
      >>> percent(0.91234), percent(None)
      ('91.23%', 'none')
    """
    return "none" if fraction is None else f"{float(fraction):.2%}"


def points(fraction: float) -> str:
    """Formats a difference of fractions in percentage points.

    Example:
      >>> points(0.00234)
      '0.23'
    """
    return f"{100 * float(fraction):.2f}"


def thousands(number: float) -> str:
    """Formats a number without decimals, in groups of three digits.

    Example:
      >>> thousands(12345.6)
      '12,346'
    """
    return f"{float(number):,.0f}"


def data_url(png: bytes) -> str:
    """Encodes a PNG for the `src` of an image.

    Example:
      >>> data_url(b"png")
      'data:image/png;base64,cG5n'
    """
    return "data:image/png;base64," + base64.b64encode(png).decode()


def thumbnail(pixels: np.ndarray) -> bytes:
    """Encodes an image of the data, uint8[height, width], as PNG, dark on white."""
    buffer = io.BytesIO()
    Image.fromarray(255 - pixels).save(buffer, "png", optimize=True)
    return buffer.getvalue()


_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader("fmnist_jax.report"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.filters.update(
    {f.__name__: f for f in (percent, points, thousands, data_url, thumbnail)}
)
