"""Renders HTML pages, each a single file that includes its style and pictures."""

import contextlib
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from fmnist_jax.analysis.plots import data_url
from fmnist_jax.config import short_name
from fmnist_jax.errors import DamagedFileError
from fmnist_jax.runs import files

# Twice the size at which pages show an image.
_MAX_SIDE = 136


def write_page(path: Path, template: str, **values: Any) -> Path:
    """Renders a page and returns its path.

    Args:
      path: of the page.
      template: its name in `templates`, without ".html.j2".
      **values: the template's variables; text is escaped. `sample` says whether the data are the
        embedded sample.

    Raises:
      jinja2.UndefinedError: if a variable of the template is missing.
    """
    page = _ENVIRONMENT.get_template(f"{template}.html.j2").render(values)
    files.write_bytes(path, page.encode())
    return path


@contextlib.contextmanager
def missing_values_as_damage(workdir: Path) -> Iterator[None]:
    """Raises DamagedFileError if the block does not find a value in the files of `workdir`."""
    try:
        yield
    except (LookupError, jinja2.UndefinedError) as error:
        raise DamagedFileError(
            f"a file in {workdir} misses a value: {error}; it is damaged or from another version"
        ) from error


def quantity(number: int, noun: str) -> str:
    """Formats a number and its noun.

    Example:
      >>> quantity(1, "epoch"), quantity(1234, "class")
      ('1 epoch', '1,234 classes')
    """
    plural = "" if number == 1 else "es" if noun.endswith("s") else "s"
    return f"{float(number):,.0f} {noun}{plural}"


def thumbnail(pixels: np.ndarray) -> bytes:
    """Encodes an image of the data as PNG: a grey one dark on white, a large one reduced."""
    buffer = io.BytesIO()
    picture = Image.fromarray(255 - pixels if pixels.ndim == 2 else pixels)
    picture.thumbnail((_MAX_SIDE, _MAX_SIDE))
    picture.save(buffer, "png", optimize=True)
    return buffer.getvalue()


_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader("fmnist_jax.report"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
# float() raises UndefinedError for an undefined value.
_ENVIRONMENT.filters.update(
    percent=lambda fraction: "none" if fraction is None else f"{float(fraction):.2%}",
    points=lambda fraction: f"{100 * float(fraction):.2f}",
    thousands=lambda number: f"{float(number):,.0f}",
    quantity=quantity,
    data_url=data_url,
    short_name=short_name,
    thumbnail=thumbnail,
)
