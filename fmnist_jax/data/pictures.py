"""Pictures in files: as images of a data set, or prepared like those of Fashion-MNIST.

The latter are light on black, 28 x 28.
"""

import functools
import io
import os
import stat
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from fmnist_jax.data import idx
from fmnist_jax.data.batches import input_shape
from fmnist_jax.errors import DataError, DataWarning

T = TypeVar("T")

SIZE = 28

# Of files found in a folder; a file that is passed by name may have any suffix.
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
SUFFIXES = (*PICTURES, "idx3-ubyte", "idx3-ubyte.gz")

# The images of the largest set in this format, EMNIST, have 0.55 GB.
_MAX_BYTES = 1 << 30

# A photo of 50 megapixels takes 0.2 GB in memory; a larger one may be a decompression bomb.
_MAX_PIXELS = 50_000_000
_MAX_SIDE = 20_000

# Xiao et al. (2017) trimmed pixels within 5% of the colour of a corner. Photos have noise, so those
# within 5 standard deviations of the border are trimmed too.
_TOLERANCE = 0.05
_NOISE = 5.0

# The article is located in a picture reduced to about this size, which has little noise.
_REDUCED = 4 * SIZE

_PNG = b"\x89PNG\r\n\x1a\n"

# A frame is of one grey. It is at most 3 pixels or this share of the shorter side wide, and differs
# by more than this grey value from the background inside.
_MAX_FRAME, _FRAME_CONTRAST = 0.02, 25

# A row or column belongs to the article if this fraction of it differs from the background, or half
# of the largest such fraction, if that is smaller.
_MIN_SHARE = 0.015


class Picture(NamedTuple):
    """A picture as input of the network.

    Attributes:
      name: path of the file, with the position of the image in an IDX file.
      image: uint8[height, width], or [height, width, 3] in colour.
      inverted: whether the article was darker than the background.
      is_original: whether it is an image of an IDX file that already had the shape.
    """

    name: str
    image: np.ndarray
    inverted: bool
    is_original: bool


def read_pictures(
    path: Path, image_shape: tuple[int, ...] | None = None
) -> Iterator[Picture | DataError]:
    """Reads one picture from a PNG, JPEG or WebP file, or all from an IDX file.

    Args:
      path: the file. It may be a pipe, such as /dev/stdin.
      image_shape: height and width, and 3 for colour, to which pictures are resized; None prepares
        them like Fashion-MNIST, 28 x 28.

    Yields:
      A picture; or the error of an image in an IDX file that shows no article.

    Raises:
      DataError: if the file has another format, or is empty, damaged, truncated or too large.
        Damage to the pixels is found in PNG and gzipped IDX files, which have checksums.
    """
    convert: Callable[[Image.Image], np.ndarray] = _grey
    if image_shape is not None:
        height, width, channels = input_shape(image_shape)
        convert = functools.partial(resized, channels=channels, size=(height, width))

    def finish(image: np.ndarray) -> tuple[np.ndarray, bool]:
        return prepare(image) if image_shape is None else (image, False)

    content = _content(path)
    if content[:2] == b"\x1f\x8b" or content[:4] == idx.IMAGES_MAGIC.to_bytes(4, "big"):
        images = idx.read_images(path, content)
        if not images.size:
            raise DataError(f"holds no pixel: its header says {images.shape}")
        for number, image in enumerate(images):
            is_original = image.shape == (image_shape or (SIZE, SIZE))
            try:
                if is_original:
                    prepared, inverted = image, False
                else:
                    prepared, inverted = finish(convert(Image.fromarray(image)))
            except DataError as error:
                yield DataError(f"image {number} {error}")
            else:
                yield Picture(f"{path}[{number}]", prepared, inverted, is_original)
    else:
        yield Picture(str(path), *finish(_read(content, path, convert)), False)


def read_image(
    source: Path | bytes, channels: int | None = None, size: tuple[int, int] | None = None
) -> np.ndarray:
    """Reads a PNG, JPEG or WebP file as an image of a data set.

    The picture is turned upright by its Exif orientation, and converted by `resized`.

    Args:
      source: the file, which may be a pipe, or its content.
      channels: 1 for grey, 3 for RGB; None keeps grey pictures grey and others RGB.
      size: height and width, as in `resized`; None keeps those of the picture.

    Returns:
      uint8[height, width], or [height, width, 3] in colour.

    Raises:
      DataError: if the file has another format, or is empty, damaged, truncated or too large.

    Example:
      >>> file = io.BytesIO()
      >>> Image.new("RGB", (80, 60), "red").save(file, "png")
      >>> image = read_image(file.getvalue(), size=(32, 40))
      >>> image.shape, image[0, 0].tolist(), read_image(file.getvalue(), 1).shape
      ((32, 40, 3), [255, 0, 0], (60, 80))
    """
    return decode(source, functools.partial(resized, channels=channels, size=size))


def resized(
    picture: Image.Image, channels: int | None = None, size: tuple[int, int] | None = None
) -> np.ndarray:
    """Converts a picture to uint8[height, width], or [height, width, 3] in colour.

    Transparent pixels are blended onto white, and 16 bits are reduced to 8. Both sides are resized
    with antialiasing, so another ratio of the sides distorts the picture.

    Args:
      picture: of any mode.
      channels: as for `read_image`.
      size: as for `read_image`.
    """
    picture = _eight_bits(picture)
    if channels is None:
        channels = 1 if picture.mode in ("1", "L", "LA", "La") else 3
    if picture.has_transparency_data:
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture.convert("RGBA"))
    picture = picture.convert("L" if channels == 1 else "RGB")
    if size is not None:
        # Bilinear, as most collections of networks were trained on; it adds no bright or dark
        # seams along edges, as LANCZOS does. Pillow averages over all pixels that it reduces.
        picture = picture.resize(size[::-1], Image.Resampling.BILINEAR)
    return np.asarray(picture)


def _content(path: Path) -> bytes:
    try:
        # Without waiting: a pipe that nobody writes to is empty.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if not (stat.S_ISREG(status.st_mode) or stat.S_ISFIFO(status.st_mode)):
                raise DataError("is neither a file nor a pipe")
            if status.st_size > _MAX_BYTES:
                raise DataError(f"has {status.st_size:,} bytes; expected at most {_MAX_BYTES:,}")
            os.set_blocking(descriptor, True)
            content = file.read()
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})") from error
    if not content:
        raise DataError("is empty")
    return content


def prepare(grey: np.ndarray) -> tuple[np.ndarray, bool]:
    """Converts a grey picture by the steps of Xiao et al. (2017), on any plain background.

    The median of the border is subtracted as background. If the article is darker, the picture is
    inverted. The article is cropped, its longer side is resized to 28 pixels with antialiasing, and
    the shorter one is padded with black.

    Args:
      grey: uint8[height, width].

    Returns:
      uint8[28, 28], and whether the picture was inverted.

    Raises:
      DataError: if nothing differs from the background.

    Example:
      >>> picture = np.full((100, 80), 255, np.uint8)
      >>> picture[30:70, 30:50] = 55  # a dark article on white
      >>> image, inverted = prepare(picture)
      >>> image.shape, inverted, image[:, 5].max(), image[:, 14].min()
      ((28, 28), True, np.uint8(0), np.uint8(200))
    """
    picture = Image.fromarray(_without_frame(grey).astype(np.float32))
    factor = max(1, round(max(picture.size) / _REDUCED))
    reduced = np.asarray(picture.reduce(factor))
    border = np.concatenate([reduced[0], reduced[-1], reduced[:, 0], reduced[:, -1]])
    background = np.median(border)
    difference = reduced - background
    # Squares, because an article differs more than shadows, which may be larger.
    inverted = bool(np.sum(difference * np.abs(difference)) < 0)
    difference = -difference if inverted else difference
    # By the median, because an article may touch the border.
    noise = np.median(np.abs(border - background)) / 0.6745
    contrast = difference.max()
    is_article = difference > max(_TOLERANCE * contrast, _NOISE * noise)
    if contrast <= _TOLERANCE * 255 or not is_article.any():
        raise DataError("shows no article: nothing differs from the background")
    top, bottom = _extent(is_article.mean(axis=1), factor)
    left, right = _extent(is_article.mean(axis=0), factor)
    article = np.asarray(picture)[top:bottom, left:right] - background
    article = -article if inverted else article
    height, width = article.shape
    scale = SIZE / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    resized = Image.fromarray(article).resize(size, Image.Resampling.LANCZOS)
    small = np.clip(np.asarray(resized).round(), 0, 255).astype(np.uint8)
    image = np.zeros((SIZE, SIZE), np.uint8)
    # Odd space is divided as in Fashion-MNIST.
    row, column = (SIZE - small.shape[0] + 1) // 2, (SIZE - small.shape[1] + 1) // 2
    image[row : row + small.shape[0], column : column + small.shape[1]] = small
    return image, inverted


def _without_frame(grey: np.ndarray) -> np.ndarray:
    """Removes a frame of one grey from around a background of another."""
    most = max(3, int(_MAX_FRAME * min(grey.shape)))
    if min(grey.shape) < 6 * most:
        return grey
    inner = [grey[k : len(grey) - k, k : grey.shape[1] - k].astype(float) for k in range(most + 2)]
    rings = [np.concatenate([each[0], each[-1], each[:, 0], each[:, -1]]) for each in inner]
    levels = np.array([np.median(ring) for ring in rings])
    width = int(np.argmax(np.abs(np.diff(levels[:-1])))) + 1
    background = levels[width + 1]
    # Lossy formats blur the frame into the next row.
    width += bool(abs(levels[width] - background) > _FRAME_CONTRAST / 3)
    # All of a frame is of one grey, but an article may touch the border of the background inside.
    is_frame = (
        abs(levels[0] - background) > _FRAME_CONTRAST
        and np.quantile(np.abs(rings[0] - levels[0]), 0.95) < _FRAME_CONTRAST
        and np.median(np.abs(rings[width] - background)) < _FRAME_CONTRAST / 2
        and np.ptp(inner[width]) > _FRAME_CONTRAST
    )
    return grey[width:-width, width:-width] if is_frame else grey


def _extent(shares: np.ndarray, factor: int) -> tuple[int, int]:
    """Returns where the article starts and ends in a picture that was reduced by a factor."""
    found = np.flatnonzero(shares > min(_MIN_SHARE, shares.max() / 2))
    return int(found[0]) * factor, (int(found[-1]) + 1) * factor


def _read(
    content: bytes, name: Path | str, convert: Callable[[Image.Image], np.ndarray]
) -> np.ndarray:
    """Converts a picture; warnings have the name."""
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # an error of `decode`
        image = decode(content, convert)
    for note in noted:
        warnings.warn(f"{name}: {note.message}", DataWarning, stacklevel=2)
    return image


def decode(source: Path | bytes, convert: Callable[[Image.Image], T]) -> T:
    """Returns what `convert` makes of the picture in a PNG, JPEG or WebP file, turned upright.

    Warnings are those of Pillow. Their filters are left alone, because threads share them.

    Args:
      source: as for `read_image`.
      convert: called with the picture.

    Raises:
      DataError: as `read_image`.
    """
    content = source if isinstance(source, bytes) else _content(source)
    if not content:
        raise DataError("is empty")
    if content[:8] == _PNG:
        content = _pixels_of_png(content)
    try:
        with Image.open(io.BytesIO(content), formats=("PNG", "JPEG", "WEBP")) as picture:
            width, height = picture.size
            if max(width, height) > _MAX_SIDE or width * height > _MAX_PIXELS:
                raise DataError(
                    f"has {width:,} x {height:,} pixels; expected at most {_MAX_PIXELS:,}, and "
                    f"at most {_MAX_SIDE:,} in a row"
                )
            picture.load()
            return convert(ImageOps.exif_transpose(picture))
    except UnidentifiedImageError as error:
        raise DataError("is not a PNG, JPEG, WebP or IDX file") from error
    except Image.DecompressionBombError as error:
        raise DataError(f"has too many pixels; expected at most {_MAX_PIXELS:,}") from error
    # Pillow has no common base class of its errors.
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"is damaged: {error}") from error


def _pixels_of_png(content: bytes) -> bytes:
    """Verifies the checksums of a PNG, which Pillow ignores, and removes texts, which it limits."""
    kept, start = [_PNG], len(_PNG)
    while start < len(content):
        end = start + 12 + int.from_bytes(content[start : start + 4], "big")
        chunk = content[start:end]
        if chunk[4:8] not in (b"tEXt", b"zTXt", b"iTXt", b"iCCP"):
            if zlib.crc32(chunk[4:-4]) != int.from_bytes(chunk[-4:], "big"):
                raise DataError("is damaged: a checksum is wrong, or it is truncated")
            kept.append(chunk)
        if chunk[4:8] == b"IEND":
            break
        start = end
    return b"".join(kept)


def _eight_bits(picture: Image.Image) -> Image.Image:
    if not picture.mode.startswith(("I", "F")):
        return picture
    pixels = np.asarray(picture, np.float32) / 257
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _grey(picture: Image.Image) -> np.ndarray:
    picture = _eight_bits(picture)
    if not picture.has_transparency_data:
        return np.asarray(picture.convert("L"))
    picture = picture.convert("LA")
    grey, alpha = np.asarray(picture, np.float32).transpose(2, 0, 1)
    # Black behind a light article, else white.
    is_light = (grey * alpha).sum() > 127 * alpha.sum()
    background = 0.0 if is_light else 255.0
    return (background + (grey - background) * alpha / 255).round().astype(np.uint8)
