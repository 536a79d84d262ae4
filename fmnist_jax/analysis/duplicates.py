"""Images that are there twice: the same bytes, or nearly the same pixels.

Squared distances are whole numbers and computed as such. Pixels less 128 are from -128 to 127, so a
dot product of two images of at most 1,024 pixels, and each partial sum of it, is a whole number of
at most 1,024 * 128 * 128 = 2**24, which float32 holds exactly: a float32 matrix product makes no
rounding error, in whatever order it adds, and |a|^2 + |b|^2 - 2ab cannot cancel. That holds where
an accelerator rounds its factors to bfloat16 or TF32 as well, because eight bits are enough.
"""

import functools
import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# Images a side of the square of pairs that is in memory at once. Measured on one core for 2,048 x
# 16,384 images: 512, 1,024 and 2,048 are equally fast.
TILE = 1024

# Two images are near-duplicates where `Matches.distances` is below. Chosen by looking at pairs of
# Fashion-MNIST, test and training images, in the order of that distance: the first six, to 0.044,
# are one photograph twice; to 0.1 most show what could be one article, though prints and zips may
# differ; beyond, plain garments of one cut. There is no gap in the distribution to choose instead.
NEAR = 0.1

_MAX_PIXELS = 2**24 // 128**2
_FARTHEST = np.iinfo(np.int32).max


def exact_duplicates(images: np.ndarray) -> list[list[int]]:
    """Groups of images with the same bytes.

    Args:
      images: [n, height, width], any dtype. Concatenate splits to find duplicates across them.

    Returns:
      The positions of each group of two or more, ascending; groups in the order of their first.

    Example:
      >>> exact_duplicates(np.array([[[5]], [[7]], [[5]]], np.uint8))
      [[0, 2]]
    """
    rows = np.ascontiguousarray(images).reshape(len(images), -1)
    keys = rows.view(np.dtype((np.void, rows.shape[1] * rows.itemsize)))[:, 0]
    _, group, sizes = np.unique(keys, return_inverse=True, return_counts=True)
    # A stable sort by group keeps each group's positions ascending.
    groups = np.split(np.argsort(group, kind="stable"), np.cumsum(sizes)[:-1])
    return sorted(positions.tolist() for positions in groups if len(positions) > 1)


def nearest(
    images: np.ndarray,
    others: np.ndarray,
    *,
    count: int = 1,
    exclude_self: bool = False,
    tile: int = TILE,
    track: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> tuple[np.ndarray, np.ndarray]:
    """For each image the nearest others, all pairs compared.

    Args:
      images: uint8[n, height, width], at most 1,024 pixels each. Give `images[:, :, ::-1]` for the
        neighbours of their mirror images.
      others: uint8[m, height, width].
      count: how many neighbours of each.
      exclude_self: `others` are the same images, and none is its own neighbour.
      tile: the memory needed grows with its square; it changes no result.
      track: wraps the iterable of the tiles' first images, to show progress.

    Returns:
      int32[n, count], positions in `others`, the nearest first, of equally near ones the first; and
      float64[n, count], Euclidean distances of pixels in [0, 1], exact but for the last bit.

    Raises:
      ValueError: if dtypes or shapes do not fit, or there are fewer than `count` others.

    Example:
      >>> images = np.array([[[0, 0]], [[0, 255]], [[3, 4]]], np.uint8)
      >>> indices, distances = nearest(images, images, exclude_self=True)
      >>> indices[:, 0].tolist(), float(distances[0, 0] * 255)
      ([2, 2, 0], 5.0)
    """
    for name, array in (("images", images), ("others", others)):
        if array.dtype != np.uint8 or array.ndim != 3:
            raise ValueError(
                f"{name} are {array.dtype}{list(array.shape)}; they must be uint8[n, height, width]"
            )
    if images.shape[1:] != others.shape[1:] or math.prod(images.shape[1:]) > _MAX_PIXELS:
        raise ValueError(
            f"images of {images.shape[1:]} and others of {others.shape[1:]} pixels; they must be "
            f"of one size, with at most {_MAX_PIXELS:,} pixels"
        )
    if exclude_self and len(images) != len(others):
        raise ValueError(
            f"exclude_self, but {len(images):,} images and {len(others):,} others; "
            "the two must be the same images"
        )
    if not 1 <= count <= len(others) - exclude_self or tile < 1:
        raise ValueError(
            f"count is {count} and tile {tile}; there are {len(others) - exclude_self:,} others to "
            "choose from, and both must be at least 1"
        )
    rows = _tiles(images, tile)
    columns = jnp.asarray(_tiles(others, tile))
    indices = np.empty((len(rows) * tile, count), np.int32)
    squares = np.empty((len(rows) * tile, count), np.int32)
    for start in track(range(0, len(indices), tile)):
        part = slice(start, start + tile)
        squares[part], indices[part] = _nearest_of_tile(
            rows[start // tile], columns, len(others), start if exclude_self else -tile, count=count
        )
    return indices[: len(images)], np.sqrt(squares[: len(images)].astype(np.float64)) / 255


def _tiles(images: np.ndarray, tile: int) -> np.ndarray:
    """uint8[tiles, tile, pixels], the last one filled up with zeros."""
    flat = images.reshape(len(images), -1)
    return np.pad(flat, ((0, -len(flat) % tile), (0, 0))).reshape(-1, tile, flat.shape[1])


class Matches(NamedTuple):
    """For each image the nearest other, as it is or mirrored.

    Attributes:
      others: int32[n], its position.
      distances: float64[n], the Euclidean distance over the image's own norm, from 0 (the same
        pixels) on. Without the division small and dim articles would be near to everything of
        their kind. The nearest other is the same with it and without.
      mirrored: bool[n], whether the image's left-right mirror is nearer than the image.
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
    """Finds the nearest other of each image and of its mirror; arguments as for `nearest`.

    Example:
      >>> images = np.array([[[9, 0]], [[200, 100]]], np.uint8)
      >>> matches = match(images, np.array([[[0, 9]], [[200, 99]]], np.uint8))
      >>> matches.others.tolist(), matches.mirrored.tolist(), (matches.distances < NEAR).tolist()
      ([0, 1], [True, False], [True, True])
    """
    plain, plain_distances = nearest(images, others, track=track)
    mirror, mirror_distances = nearest(images[:, :, ::-1], others, track=track)
    distances = np.minimum(plain_distances, mirror_distances)[:, 0]
    mirrored = (mirror_distances < plain_distances)[:, 0]
    flat = images.reshape(len(images), -1)
    norms = np.sqrt(np.einsum("np,np->n", flat, flat, dtype=np.int32)) / 255
    # An empty image is a duplicate of an empty one and of nothing else.
    relative = np.divide(
        distances, norms, out=np.where(distances > 0, np.inf, 0.0), where=norms > 0
    )
    return Matches(np.where(mirrored, mirror[:, 0], plain[:, 0]), relative, mirrored)


# Not `compile.compiled`: its options are for convolutions, and this matrix product takes twice as
# long with them on a CPU.
@functools.partial(jax.jit, static_argnames=("count",))
def _nearest_of_tile(
    rows: jax.Array, columns: jax.Array, num_columns: int, own: int, *, count: int
) -> tuple[jax.Array, jax.Array]:
    """Squared distances and positions of the nearest columns; column `own + row` is left out."""
    tile = len(rows)
    a = rows.astype(jnp.float32) - 128
    a_squared = jnp.sum(a * a, axis=1).astype(jnp.int32)
    numbers = jnp.arange(tile, dtype=jnp.int32)

    def step(best, inputs):
        start, column_tile = inputs
        b = column_tile.astype(jnp.float32) - 128
        b_squared = jnp.sum(b * b, axis=1).astype(jnp.int32)
        squares = a_squared[:, None] + b_squared[None, :] - 2 * (a @ b.T).astype(jnp.int32)
        positions = (start + numbers)[None, :]
        left_out = (positions >= num_columns) | (positions == own + numbers[:, None])
        found = _smallest(jnp.where(left_out, _FARTHEST, squares), positions, count)
        values, places = (jnp.concatenate(pair, axis=1) for pair in zip(best, found, strict=True))
        return _smallest(values, places, count), None

    none_yet = (jnp.full((tile, count), _FARTHEST, jnp.int32),) * 2
    starts = jnp.arange(len(columns), dtype=jnp.int32) * tile
    best, _ = lax.scan(step, none_yet, (starts, columns))
    return best


def _smallest(values: jax.Array, positions: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The `count` smallest values of each row and their positions; of equals, the first position.

    Two reductions for each, because `lax.top_k` of integers is a whole sort on a CPU: with it, one
    neighbour of each image took twice as long in all.
    """
    found = []
    for _ in range(count):
        value = jnp.min(values, axis=1, keepdims=True)
        position = jnp.min(jnp.where(values == value, positions, _FARTHEST), axis=1, keepdims=True)
        values = jnp.where(positions == position, _FARTHEST, values)
        found.append((value, position))
    smallest, where = zip(*found, strict=True)
    return jnp.concatenate(smallest, axis=1), jnp.concatenate(where, axis=1)
