"""Exact and near-duplicate images.

Float32 matrix products give exact squared distances. Pixels minus 128 are from -128 to 127, so
the dot product of 1,024 pixel values of two images and each of its partial sums are integers of
magnitude at most 1,024 * 128 * 128 = 2**24, which float32 represents exactly. Products of more
values are added as integers.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np

# Threshold of `Matches.distances` for near-duplicates, chosen by inspecting pairs of Fashion-MNIST
# test and training images in ascending order of distance. The first six, up to 0.044, are the same
# photograph. Up to 0.1 most could show the same article, though prints and zips may differ. Above,
# pairs are plain garments of the same cut.
NEAR = 0.1

# Side of the square of pairs compared at once. On two cores, 2,048 x 60,000 images take 1.1 s with
# 512, 1,024 or 2,048, and 1.2 to 1.7 s in blocks of 256 x 60,000, which exceed the cache.
_BLOCK = 1024
_MAX_VALUES = 2**24 // 128**2


def exact_duplicates(images: Iterable[np.ndarray]) -> list[list[int]]:
    """Groups images with the same bytes.

    Args:
      images: of one shape and dtype. Chain splits to find duplicates across them.

    Returns:
      The positions of each group of two or more, ascending, ordered by their first position.

    Example:
      >>> exact_duplicates(np.array([[[5]], [[7]], [[5]]], np.uint8))
      [[0, 2]]
    """
    groups = defaultdict(list)
    for position, image in enumerate(images):
        groups[blake2b(image.tobytes()).digest()].append(position)
    return [positions for positions in groups.values() if len(positions) > 1]


def nearest(
    images: np.ndarray,
    others: np.ndarray,
    *,
    track: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> tuple[np.ndarray, np.ndarray]:
    """Finds the nearest neighbor of each image among others by exhaustive search.

    Args:
      images: uint8[n, height, width], or [n, height, width, channels] in colour.
      others: uint8[m, ...], of the same shape.
      track: wraps the iterable over the first positions of the blocks of others, for progress.

    Returns:
      int64[n], positions in `others`, the first of equally near ones; and float64[n], Euclidean
      distances of pixels in [0, 1], from exact squared distances.

    Raises:
      ValueError: if dtypes or shapes do not match, or there is no other image.

    Example:
      >>> others = np.array([[[0, 255]], [[3, 4]]], np.uint8)
      >>> positions, distances = nearest(np.zeros((1, 1, 2), np.uint8), others)
      >>> positions.tolist(), float(distances[0] * 255)
      ([1], 5.0)
    """
    for name, array in (("images", images), ("others", others)):
        if array.dtype != np.uint8 or array.ndim not in (3, 4):
            raise ValueError(
                f"{name} are {array.dtype}{list(array.shape)}; they must be uint8[n, height, width]"
                " or uint8[n, height, width, channels]"
            )
    if images.shape[1:] != others.shape[1:] or len(others) == 0:
        raise ValueError(
            f"images have shape {images.shape} and others {others.shape}; both must have the same "
            "height, width and channels, and others at least one image"
        )
    rows, columns = (array.reshape(len(array), -1) for array in (images, others))
    row_squares = sum(_squares(part).astype(np.int64) for part in _parts(rows))
    positions = np.zeros(len(images), np.int64)
    smallest = np.full(len(images), np.iinfo(np.int64).max)  # of |b|^2 - 2ab
    for first in track(range(0, len(others), _BLOCK)):
        for start in range(0, len(images), _BLOCK):
            part = slice(start, start + _BLOCK)
            block = _compare(rows[part], columns[first : first + _BLOCK])
            found = block.argmin(axis=1)
            values = block[np.arange(len(block)), found]
            nearer = values < smallest[part]
            smallest[part][nearer] = values[nearer]
            positions[part][nearer] = first + found[nearer]
    return positions, np.sqrt(smallest + row_squares) / 255


class Matches(NamedTuple):
    """The nearest other image of each image or its mirror image.

    Attributes:
      others: int64[n], position of the nearest other image.
      distances: float64[n], Euclidean distance divided by the norm of the image, so that small and
        dim articles are not near to all of their kind.
      mirrored: bool[n], whether the left-right mirror image is nearer than the image.
    """

    others: np.ndarray
    distances: np.ndarray
    mirrored: np.ndarray


def match(
    images: np.ndarray,
    others: np.ndarray,
    *,
    track: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Matches:
    """Finds the nearest other image of each image and of its mirror image.

    Args:
      images: uint8[n, height, width], or [n, height, width, channels] in colour.
      others: uint8[m, ...], of the same shape.
      track: wraps the iterables of two calls of `nearest`.

    Raises:
      ValueError: if dtypes or shapes do not match, or there is no other image.

    Example:
      >>> images = np.array([[[9, 0]], [[200, 100]]], np.uint8)
      >>> matches = match(images, np.array([[[0, 9]], [[200, 99]]], np.uint8))
      >>> matches.others.tolist(), matches.mirrored.tolist(), (matches.distances < NEAR).tolist()
      ([0, 1], [True, False], [True, True])
    """
    plain, plain_distances = nearest(images, others, track=track)
    mirror, mirror_distances = nearest(images[:, :, ::-1], others, track=track)
    mirrored = mirror_distances < plain_distances
    distances = np.minimum(plain_distances, mirror_distances)
    # One by one, because float64 takes the eightfold memory.
    norms = np.array([np.linalg.norm(image.astype(np.float64)) for image in images]) / 255
    # A black image is a duplicate of a black image only.
    limits = np.where(distances > 0, np.inf, 0.0)
    relative = np.divide(distances, norms, out=limits, where=norms > 0)
    return Matches(np.where(mirrored, mirror, plain), relative, mirrored)


def _compare(rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Integers [n, m], |b|^2 - 2ab of each row a of uint8[n, values] and b of uint8[m, values]."""
    total: Any = None
    for a, b in zip(_parts(rows), _parts(columns), strict=True):
        block = ((-2 * a) @ b.T).astype(np.int32)  # exact, like every product with a power of two
        block += _squares(b)
        total = block if total is None else np.add(total, block, dtype=np.int64)
    return total


def _parts(rows: np.ndarray) -> Iterator[np.ndarray]:
    """Yields float32[n, at most 1,024], values from -128 to 127."""
    for start in range(0, rows.shape[1], _MAX_VALUES):
        yield rows[:, start : start + _MAX_VALUES].astype(np.float32) - 128


def _squares(rows: np.ndarray) -> np.ndarray:
    return np.einsum("np,np->n", rows, rows).astype(np.int32)
