"""The IDX files in which Fashion-MNIST is published."""

import gzip
import io
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from fmnist_jax.errors import DataError

IMAGES_MAGIC = 0x803  # unsigned bytes in three dimensions
_LABELS_MAGIC = 0x801  # unsigned bytes in one


def read_images(path: Path, content: bytes | None = None) -> np.ndarray:
    """Reads uint8[count, height, width] from an IDX file, or from its content, gzipped or not.

    Raises:
      DataError: if the file cannot be read, is truncated or is not an IDX file of images.
    """
    return _parse(_content(path) if content is None else content, path, IMAGES_MAGIC, "images")


def read_labels(path: Path) -> np.ndarray:
    """Reads uint8[count] from an IDX file, gzipped or not.

    Raises:
      DataError: if the file cannot be read, is truncated or is not an IDX file of labels.
    """
    return _parse(_content(path), path, _LABELS_MAGIC, "labels")


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def _parse(content: bytes, path: Path, magic: int, noun: str) -> np.ndarray:
    dimensions = magic & 0xFF
    file: Any = io.BytesIO(content)
    if content[:2] == b"\x1f\x8b":  # not by name: servers and browsers unpack files and keep it
        file = gzip.GzipFile(fileobj=file)
    try:
        start = file.read(4 * (1 + dimensions))
        header = np.frombuffer(start[: len(start) // 4 * 4], ">u4")
        if len(header) == 0 or header[0] != magic:
            found = f"{int(header[0]):#x}" if len(header) else "nothing"
            raise DataError(
                f"{path}: not an IDX file of {noun}: it starts with {found}, expected {magic:#x}"
            )
        shape = tuple(int(size) for size in header[1:])
        expected, body = math.prod(shape), b""
        # Not further than the header says: another file may unpack to gigabytes.
        while len(body) <= expected and (part := file.read(1 << 26)):
            body += part
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: damaged gzip file ({error}); fetch it again") from error
    if len(shape) < dimensions or len(body) != expected:
        found = f"{len(body):,}" if len(body) < expected else "more"
        raise DataError(
            f"{path}: its header says {expected:,} bytes of {noun}, but it holds {found}; fetch it "
            "again"
        )
    return np.frombuffer(body, np.uint8).reshape(shape)
