"""The IDX files in which Fashion-MNIST is published."""

import math
import zlib
from pathlib import Path

import numpy as np

from fmnist_jax.errors import DataError

IMAGES_MAGIC = 0x803  # unsigned bytes in three dimensions
_LABELS_MAGIC = 0x801  # unsigned bytes in one


def read_images(path: Path) -> np.ndarray:
    """Reads uint8[count, height, width] from an IDX file, gzipped or not.

    Raises:
      DataError: if the file cannot be read, is truncated or is not an IDX file of images.
    """
    return _read(path, IMAGES_MAGIC, "images")


def read_labels(path: Path) -> np.ndarray:
    """Reads uint8[count] from an IDX file, gzipped or not.

    Raises:
      DataError: if the file cannot be read, is truncated or is not an IDX file of labels.
    """
    return _read(path, _LABELS_MAGIC, "labels")


def _read(path: Path, magic: int, noun: str) -> np.ndarray:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    if content[:2] == b"\x1f\x8b" or path.suffix == ".gz":
        try:
            # The last four bytes are the size. In a damaged file they are arbitrary and must not
            # allocate gigabytes; a buffer that is too small grows. 31: gzip header and checksum.
            size = min(int.from_bytes(content[-4:], "little"), 1 << 26)
            content = zlib.decompress(content, wbits=31, bufsize=max(size, 1))
        except zlib.error as error:
            raise DataError(f"{path}: damaged gzip file ({error}); fetch it again") from error
    dimensions = magic & 0xFF
    header_size = 4 * (1 + dimensions)
    header = np.frombuffer(content[: len(content[:header_size]) // 4 * 4], ">u4")
    if len(header) == 0 or header[0] != magic:
        found = f"{int(header[0]):#x}" if len(header) else "nothing"
        raise DataError(
            f"{path}: not an IDX file of {noun}: it starts with {found}, expected {magic:#x}"
        )
    shape = tuple(int(size) for size in header[1:])
    expected = math.prod(shape)
    if len(shape) < dimensions or len(content) - header_size != expected:
        raise DataError(
            f"{path}: holds {max(len(content) - header_size, 0):,} bytes of {noun}, but its header "
            f"says {expected:,}; fetch it again"
        )
    return np.frombuffer(content, np.uint8, offset=header_size).reshape(shape)
