"""Convolution by Winograd's minimal filtering, with fewer multiplications than direct convolution.

The output is cut into tiles. Per pair of channel and feature, a 2x2 tile takes 16 multiplications
instead of 36 with a 3x3 kernel, and 9 instead of 16 with a 2x2 kernel. A 4x4 tile takes 36 instead
of 144 with a 3x3 kernel. Additions precede and follow the multiplications; 4x4 tiles need scalings
as well. Over all tiles, the multiplications are one matrix product per position of the transformed
data.

If an output reads only zeros, 2x2 tiles return exactly zero. 4x4 tiles return the rounding error of
other pixels of the tile, and a ReLU would pass it where it is positive. Those outputs are therefore
set to zero.

References: Winograd, Arithmetic Complexity of Computations, 1980; Lavin and Gray, Fast Algorithms
for Convolutional Neural Networks, 2016. In one dimension, the outputs of data d and kernel g are
A' ((G g) * (B' d)). In two dimensions, each matrix is applied along rows and along columns.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from fmnist_jax.fast.precision import factors, product, transposed
from fmnist_jax.xla.noinline import fence, fenced_transpose

# Evaluation points by the sides of tile and kernel; infinity is implied. The polynomials of data
# and kernel are multiplied by their values at these points. The points determine the rounding
# error. Measured on standard normal values, relative to the largest value, the largest error is
# 3e-7 with 2x2 tiles, as by direct convolution, and 1.5e-6 with 4x4 tiles. The usual points of 4x4
# tiles, 0, 1, -1, 2, -2, give 7e-6.
POINTS = {(2, 2): (0, 1), (2, 3): (0, 1, -1), (4, 3): (0, 0.75, -0.75, 1.5, -1.5)}

# grid[row][column] holds that position of every tile, float[batch, tile rows, tile columns, ...].
Grid = list[list[jax.Array]]
T = TypeVar("T")


class Matrices(NamedTuple):
    """The transforms of data (B'), kernel (G) and outputs (A') in float64."""

    data: np.ndarray
    kernel: np.ndarray
    outputs: np.ndarray


@functools.cache
def matrices(tile: int, kernel: int) -> Matrices:
    """Returns the transforms for the sides of tile and kernel, a key of `POINTS`.

    Example:
      >>> matrices(tile=2, kernel=2).outputs.tolist()
      [[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]]
    """
    points = POINTS[tile, kernel]
    others = [[q for q in points if q != p] for p in points]
    size = len(points) + 1
    # The polynomials that vanish at all points but one, then the one that vanishes at all.
    data = np.zeros((size, size))
    for row, roots in enumerate([*others, points]):
        data[row, : len(roots) + 1] = np.poly(roots)[::-1]
    scales = [np.prod(np.subtract(p, rest)) for p, rest in zip(points, others, strict=True)]
    factors = np.zeros((size, kernel))
    factors[:-1] = np.vander(points, kernel, increasing=True) / np.reshape(scales, (-1, 1))
    factors[-1, -1] = 1
    outputs = np.zeros((tile, size))
    outputs[:, :-1] = np.vander(points, tile, increasing=True).T
    outputs[-1, -1] = 1
    return Matrices(data, factors, outputs)


def tile_outputs(images: jax.Array, kernel: jax.Array, tiles: tuple[int, int], tile: int) -> Grid:
    """Cross-correlates images with a kernel, without padding.

    Args:
      images: float[batch, height, width, channels]; read as zero beyond its last row and column.
      kernel: float[size, size, channels, features].
      tiles: numbers of rows and columns of tiles.
      tile: side of the tiles; (tile, size) is a key of `POINTS`.

    Returns:
      tile x tile arrays, float[batch, *tiles, features]. Element [r, c] of grid[i][j] is the output
      (tile * r + i, tile * c + j).

    Example:
      >>> outputs = tile_outputs(jnp.ones((1, 5, 5, 2)), jnp.ones((2, 2, 2, 3)), (2, 2), tile=2)
      >>> outputs[0][0].shape, float(outputs[1][1].max())
      ((1, 2, 2, 3), 8.0)
    """
    transforms = matrices(tile, len(kernel))
    data = factors(_transformed(transforms.data, images, tile, tiles))
    weights = factors(_transformed_kernel(kernel, transforms))
    products = _map(functools.partial(_product, dtype=images.dtype), data, weights)
    lines = _stored([_combined(transforms.outputs, row) for row in products], tile)
    columns = [_combined(transforms.outputs, line) for line in zip(*lines, strict=True)]
    outputs = [list(row) for row in zip(*columns, strict=True)]
    if tile == 2:
        return outputs
    reads_content = _reads_content(images, len(kernel), tile, tiles)
    return _map(lambda seen, array: jnp.where(seen, array, 0), reads_content, outputs)


def tile_gradients(
    images: jax.Array, kernel: jax.Array, cotangent: jax.Array, tile: int
) -> tuple[jax.Array, jax.Array]:
    """Returns the gradients of `join(tile_outputs(...))` with respect to images and kernel.

    Args:
      images: as for `tile_outputs`.
      kernel: as for `tile_outputs`.
      cotangent: float[batch, rows, columns, features]; read as zero beyond its last row and column.
      tile: as for `tile_outputs`.
    """
    transforms = matrices(tile, len(kernel))
    tiles = [-(-side // tile) for side in cotangent.shape[1:3]]
    multiply = functools.partial(_product, dtype=images.dtype)
    data = fence(factors(_transformed(transforms.data, images, tile, tiles)))
    weights = factors(_transformed_kernel(kernel, transforms))
    # With respect to the products of data and kernel.
    products_gradient = fence(factors(_transformed(transforms.outputs.T, cotangent, tile, tiles)))

    data_gradient = _map(lambda p, w: multiply(p, transposed(w)), products_gradient, weights)
    images_gradient = _untransformed_images(data_gradient, transforms)
    height, width = images.shape[1:3]
    images_gradient = _extended(images_gradient[:, :height, :width], height, width)

    sums = _map(functools.partial(_product_over_rows, dtype=images.dtype), data, products_gradient)
    weights_gradient = jnp.stack([jnp.stack(row) for row in sums])
    matrix = transforms.kernel.astype(kernel.dtype)
    return images_gradient, jnp.einsum("ki,klcf,lj->ijcf", matrix, weights_gradient, matrix)


def join(grid: Grid) -> jax.Array:
    """Interleaves the positions of all tiles to float[batch, height, width, channels]."""
    tile = len(grid)
    lines = [jnp.stack(row, axis=3) for row in _stored(grid, tile)]
    images = jnp.stack(_stored(lines, tile), axis=2)
    batch, rows, _, columns, _, channels = images.shape
    return images.reshape(batch, tile * rows, tile * columns, channels)


def _map(function: Callable[..., jax.Array], *grids: Grid | jax.Array) -> Grid:
    """Applies a function to the arrays of each position."""
    return [
        [function(*arrays) for arrays in zip(*rows, strict=True)]
        for rows in zip(*grids, strict=True)
    ]


def _transformed(matrix: np.ndarray, images: jax.Array, tile: int, tiles: Sequence[int]) -> Grid:
    """Returns `matrix @ data @ matrix.T` for the pixels, `data`, that each tile reads."""
    reach = matrix.shape[1]
    rows, columns = (tile * (count - 1) + 1 for count in tiles)
    images = _extended(images, rows + reach - 1, columns + reach - 1)
    # Rows first, because their slices are whole rows, contiguous in memory.
    lines = _stored(_combined(matrix, [images[:, i : i + rows : tile] for i in range(reach)]), tile)
    return [
        _combined(matrix, [line[:, :, j : j + columns : tile] for j in range(reach)])
        for line in lines
    ]


def _reads_content(images: jax.Array, kernel: int, tile: int, tiles: Sequence[int]) -> Grid:
    """Returns bool[batch, *tiles, 1] per position: whether its output reads a non-zero pixel."""
    height, width = (tile * count for count in tiles)
    content = _extended(
        (images != 0).any(-1, keepdims=True), height + kernel - 1, width + kernel - 1
    )
    window = (1, kernel, kernel, 1)
    seen = lax.reduce_window(fence(content), False, lax.bitwise_or, window, (1, 1, 1, 1), "VALID")
    return [[seen[:, i:height:tile, j:width:tile] for j in range(tile)] for i in range(tile)]


def _stored(arrays: T, tile: int) -> T:
    """Fences arrays with many consumers, except for 2x2 tiles, where recomputing is as fast."""
    return fence(arrays) if tile > 2 else arrays


def _transformed_kernel(kernel: jax.Array, transforms: Matrices) -> jax.Array:
    matrix = transforms.kernel.astype(kernel.dtype)
    return jnp.einsum("ki,ijcf,lj->klcf", matrix, kernel, matrix)


def _combined(matrix: np.ndarray, arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """Returns `matrix @ arrays`."""
    return _sums(tuple(map(tuple, matrix.tolist())), list(arrays))


# `jit` caches the traced equations, which are inlined in the caller. Tracing a network takes two
# thirds to nine tenths of the time without it.
@functools.partial(jax.jit, static_argnums=0, inline=True)
def _sums(matrix: tuple[tuple[float, ...], ...], arrays: Sequence[jax.Array]) -> list[jax.Array]:
    return [_sum(row, arrays) for row in matrix]


def _sum(weights: tuple[float, ...], arrays: Sequence[jax.Array]) -> jax.Array:
    """Returns the weighted sum, without multiplications by 1 or -1 and without zero terms."""
    terms = [(w, a) for w, a in zip(weights, arrays, strict=True) if w != 0]
    # A positive term first, so that no array is negated.
    terms.sort(key=lambda term: term[0] < 0)
    (first, array), *rest = terms
    total = array if first == 1 else first * array
    for weight, array in rest:
        scaled = array if abs(weight) == 1 else abs(weight) * array
        total = total + scaled if weight > 0 else total - scaled
    return total


def _matrix(array: jax.Array) -> jax.Array:
    return array.reshape(-1, array.shape[-1])


def _product(array: jax.Array, matrix: jax.Array, dtype: DTypeLike) -> jax.Array:
    return product(_matrix(array), matrix, dtype).reshape(*array.shape[:-1], matrix.shape[1])


def _product_over_rows(left: jax.Array, right: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Returns the sum over batch and tiles, [channels, features]."""
    # The transpose is stored, because XLA:CPU is slow at products that sum over the rows of both
    # matrices: 113 against 145 GFLOP/s for two of [2304, 64], including the transposition.
    return product(fenced_transpose(_matrix(left)), _matrix(right), dtype)


def _untransformed_images(grid: Grid, transforms: Matrices) -> jax.Array:
    """Transposes `_transformed`: sums the pixels that overlapping tiles share."""
    # Fenced: 0.12 instead of 0.74 ms for 11 x 11 tiles of 64 channels and 8 images.
    columns = fence([_overlap(transforms, column, axis=1) for column in zip(*grid, strict=True)])
    return join([_overlap(transforms, row, axis=2) for row in zip(*columns, strict=True)])


def _overlap(transforms: Matrices, arrays: Sequence[jax.Array], axis: int) -> list[jax.Array]:
    """Returns the pixels along one axis by their position in a tile."""
    elements = _combined(transforms.data.T, arrays)
    tile = len(transforms.outputs)

    def shifted(array: jax.Array, count: int) -> jax.Array:
        widths = [(0, 0)] * array.ndim
        widths[axis] = (count, 1 - count)
        return jnp.pad(array, widths)

    # The first pixels of a tile are the last pixels that the previous tile reads.
    return [
        functools.reduce(operator.add, map(shifted, elements[i::tile], (0, 1))) for i in range(tile)
    ]


def _extended(images: jax.Array, height: int, width: int) -> jax.Array:
    """Appends zeros to reach that height and width, where the images are smaller."""
    below, right = (
        max(0, wanted - size)
        for wanted, size in zip((height, width), images.shape[1:3], strict=True)
    )
    return jnp.pad(images, [(0, 0), (0, below), (0, right), (0, 0)])
