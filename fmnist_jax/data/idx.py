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
    return parse_images(_content(path), path)


def parse_images(content: bytes, path: Path) -> np.ndarray:
    """Reads images from the content of a file, as `read_images` does; `path` is for errors."""
    return _parse(content, path, IMAGES_MAGIC, "images")


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
    # By content, because servers and browsers unpack files and leave their names.
    is_packed = content[:2] == b"\x1f\x8b"
    dimensions = magic & 0xFF
    header_size = 4 * (1 + dimensions)
    unpacker = zlib.decompressobj(wbits=31)  # with gzip's header and checksum
    try:
        start = unpacker.decompress(content, header_size) if is_packed else content[:header_size]
        header = np.frombuffer(start[: len(start) // 4 * 4], ">u4")
        if len(header) == 0 or header[0] != magic:
            found = f"{int(header[0]):#x}" if len(header) else "nothing"
            raise DataError(
                f"{path}: not an IDX file of {noun}: it starts with {found}, expected {magic:#x}"
            )
        shape = tuple(int(size) for size in header[1:])
        expected = math.prod(shape)
        if is_packed:  # not more than the header says, because any other file may be much larger
            most = min(expected + 1, 1 << 40)
            body = unpacker.decompress(unpacker.unconsumed_tail, most)
            if not unpacker.eof and len(body) < most:
                raise zlib.error("incomplete or truncated stream")
        else:
            body = content[header_size:]
    except zlib.error as error:
        raise DataError(f"{path}: damaged gzip file ({error}); fetch it again") from error
    if len(shape) < dimensions or len(body) != expected:
        found = f"{len(body):,}" if len(body) < expected else "more"
        raise DataError(
            f"{path}: its header says {expected:,} bytes of {noun}, but it holds {found}; fetch it "
            "again"
        )
    return np.frombuffer(body, np.uint8).reshape(shape)
