"""Convolution by Winograd's minimal filtering: fewer multiplications than the definition needs.

The output is cut into tiles. With a 3x3 kernel a tile of 2x2 takes 16 multiplications for each pair
of channel and feature instead of 36, one of 4x4 takes 36 instead of 144; with a 2x2 kernel a tile
of 2x2 takes 9 instead of 16. Before and after them come additions, and for tiles of 4x4 scalings.
The multiplications over all tiles are matrix products, one for each position of what a tile reads,
which is what a CPU is best at.

Tiles of 2x2 give zero where all that an output reads is zero. Larger ones would leave there what
rounding leaves of their other pixels, and half of that would pass a ReLU: those outputs are set to
zero.

From Winograd, Arithmetic Complexity of Computations, 1980; for networks Lavin and Gray, Fast
Algorithms for Convolutional Neural Networks, 2016. In one dimension the outputs of data d and
kernel g are A' ((G g) * (B' d)); in two dimensions each matrix is applied along the rows and along
the columns.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fmnist_jax.xla.noinline import fence, fenced_transpose

# The polynomials of data and kernel are multiplied by their values at these points and at infinity.
# The points of a tile and a kernel of these sides decide about rounding: on standard normal values
# the largest error over the largest value is 3e-7 with tiles of 2x2, as by the definition, and
# 1.5e-6 with 4x4; with the usual points of these, 0, 1, -1, 2, -2, it is 7e-6.
POINTS = {(2, 2): (0, 1), (2, 3): (0, 1, -1), (4, 3): (0, 0.75, -0.75, 1.5, -1.5)}

# An array for each position of a tile's outputs or inputs, over all tiles: grid[row][column].
Grid = list[list[jax.Array]]


class Matrices(NamedTuple):
    """The transforms of data (B'), kernel (G) and outputs (A'), float64."""

    data: np.ndarray
    kernel: np.ndarray
    outputs: np.ndarray


@functools.cache
def matrices(tile: int, kernel: int) -> Matrices:
    """The transforms for tiles and kernels of these sides, a key of `POINTS`.

    Example:
      >>> matrices(tile=2, kernel=2).outputs.tolist()
      [[1.0, 1.0, 0.0], [0.0, 1.0, 1.0]]
    """
    points = POINTS[tile, kernel]
    others = [[q for q in points if q != p] for p in points]
    size = len(points) + 1
    # The polynomials that vanish at all points but one, and at all.
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
    """Cross-correlates, without padding; returns one array for each position in a tile.

    Args:
      images: float[batch, height, width, channels]; read as zero beyond its last row and column.
      kernel: float[size, size, channels, features].
      tiles: how many rows and columns of tiles.
      tile: side of the tiles; `POINTS` has those that there are for a kernel.

    Returns:
      tile x tile arrays, float[batch, *tiles, features]: with tiles of 2x2 [i][j] holds the outputs
      (2r + i, 2c + j).

    Example:
      >>> outputs = tile_outputs(jnp.ones((1, 5, 5, 2)), jnp.ones((2, 2, 2, 3)), (2, 2), tile=2)
      >>> outputs[0][0].shape, float(outputs[1][1].max())
      ((1, 2, 2, 3), 8.0)
    """
    transforms = matrices(tile, len(kernel))
    products = [
        [_product(data, factor) for data, factor in zip(*rows, strict=True)]
        for rows in zip(
            _transformed(transforms.data, images, tile, tiles),
            _transformed_kernel(kernel, transforms),
            strict=True,
        )
    ]
    lines = _stored([_combined(transforms.outputs, row) for row in products], tile)
    columns = [_combined(transforms.outputs, line) for line in zip(*lines, strict=True)]
    outputs = [list(row) for row in zip(*columns, strict=True)]
    if tile == 2:
        return outputs
    reads_content = _reads_content(images, len(kernel), tile, tiles)
    return [
        [jnp.where(seen, array, 0) for seen, array in zip(*rows, strict=True)]
        for rows in zip(reads_content, outputs, strict=True)
    ]


def tile_gradients(
    images: jax.Array, kernel: jax.Array, cotangent: jax.Array, tile: int
) -> tuple[jax.Array, jax.Array]:
    """The gradients of `join(tile_outputs(...))` with respect to images and kernel.

    Args:
      images: as for `tile_outputs`.
      kernel: as for `tile_outputs`.
      cotangent: float[batch, rows, columns, features]; read as zero beyond its last row and column.
      tile: side of the tiles; `POINTS` has those that there are for a kernel.
    """
    transforms = matrices(tile, len(kernel))
    rows, columns = cotangent.shape[1:3]
    tiles = -(-rows // tile), -(-columns // tile)
    data = fence(_transformed(transforms.data, images, tile, tiles))
    factors = _transformed_kernel(kernel, transforms)
    outer = fence(_transformed(transforms.outputs.T, cotangent, tile, tiles))

    products = [
        [_product(cotangent, factor.T) for cotangent, factor in zip(*rows, strict=True)]
        for rows in zip(outer, factors, strict=True)
    ]
    images_gradient = _untransformed_images(products, transforms)
    height, width = images.shape[1:3]
    images_gradient = _extended(images_gradient[:, :height, :width], height, width)

    # Stored transposed, because a product that sums over the rows of both is slow: 113 against 145
    # GFLOP/s for two of [2304, 64], the transposition counted in.
    sums = jnp.stack(
        [
            jnp.stack(
                [fenced_transpose(_matrix(d)) @ _matrix(c) for d, c in zip(*rows, strict=True)]
            )
            for rows in zip(data, outer, strict=True)
        ]
    )
    back = transforms.kernel.astype(kernel.dtype)
    return images_gradient, jnp.einsum("ki,klcf,lj->ijcf", back, sums, back)


def join(grid: Grid) -> jax.Array:
    """The positions of all tiles, float[batch, rows, columns, channels] each, as whole images."""
    tile = len(grid)
    lines = [jnp.stack(row, axis=3) for row in _stored(grid, tile)]
    images = jnp.stack(_stored(lines, tile), axis=2)
    batch, rows, _, columns, _, channels = images.shape
    return images.reshape(batch, tile * rows, tile * columns, channels)


def _transformed(matrix: np.ndarray, images: jax.Array, tile: int, tiles: Sequence[int]) -> Grid:
    """`matrix @ data @ matrix.T`, where the data of a tile are what it reads of the images."""
    reach = matrix.shape[1]
    rows, columns = (tile * (count - 1) + 1 for count in tiles)
    images = _extended(images, rows + reach - 1, columns + reach - 1)
    # Rows first, because they are read whole.
    lines = _stored(_combined(matrix, [images[:, i : i + rows : tile] for i in range(reach)]), tile)
    return [
        _combined(matrix, [line[:, :, j : j + columns : tile] for j in range(reach)])
        for line in lines
    ]


def _reads_content(images: jax.Array, kernel: int, tile: int, tiles: Sequence[int]) -> Grid:
    """bool[batch, *tiles] for each position of a tile: whether an output there reads a non-zero."""
    height, width = (tile * count for count in tiles)
    content = _extended(
        (images != 0).any(-1, keepdims=True), height + kernel - 1, width + kernel - 1
    )
    window = (1, kernel, kernel, 1)
    seen = lax.reduce_window(fence(content), False, lax.bitwise_or, window, (1, 1, 1, 1), "VALID")
    return [[seen[:, i:height:tile, j:width:tile] for j in range(tile)] for i in range(tile)]


def _stored(arrays: Any, tile: int) -> Any:
    """Fences arrays with many consumers; for tiles of 2x2 recomputing them is as fast."""
    return fence(arrays) if tile > 2 else arrays


def _transformed_kernel(kernel: jax.Array, transforms: Matrices) -> jax.Array:
    matrix = transforms.kernel.astype(kernel.dtype)
    return jnp.einsum("ki,ijcf,lj->klcf", matrix, kernel, matrix)


def _combined(matrix: np.ndarray, arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """`matrix @ arrays`."""
    return _sums(tuple(map(tuple, matrix.tolist())), list(arrays))


# `jit` only remembers the equations here, and writes them into what calls it: a network is traced
# in two thirds to nine tenths of the time.
@functools.partial(jax.jit, static_argnums=0, inline=True)
def _sums(matrix: tuple[tuple[float, ...], ...], arrays: Sequence[jax.Array]) -> list[jax.Array]:
    return [_sum(row, arrays) for row in matrix]


def _sum(weights: tuple[float, ...], arrays: Sequence[jax.Array]) -> jax.Array:
    """The weighted sum; what has the weight 1 or -1 is not multiplied, nor what has 0 read."""
    terms = [(w, a) for w, a in zip(weights, arrays, strict=True) if w != 0]
    # A positive term first, so that nothing is negated.
    terms.sort(key=lambda term: term[0] < 0)
    (first, array), *rest = terms
    total = array if first == 1 else first * array
    for weight, array in rest:
        scaled = array if abs(weight) == 1 else abs(weight) * array
        total = total + scaled if weight > 0 else total - scaled
    return total


def _matrix(array: jax.Array) -> jax.Array:
    return array.reshape(-1, array.shape[-1])


def _product(array: jax.Array, matrix: jax.Array) -> jax.Array:
    return (_matrix(array) @ matrix).reshape(*array.shape[:-1], matrix.shape[1])


def _untransformed_images(grid: Grid, transforms: Matrices) -> jax.Array:
    """The transpose of reading the data: tiles overlap, and what they share is summed."""
    rows = [_overlap(transforms, column, axis=1) for column in zip(*grid, strict=True)]
    # Stored in between: 0.12 instead of 0.74 ms for 11 x 11 tiles of 64 channels and 8 images.
    rows = fence(rows)
    return join([_overlap(transforms, row, axis=2) for row in zip(*rows, strict=True)])


def _overlap(transforms: Matrices, arrays: Sequence[jax.Array], axis: int) -> list[jax.Array]:
    """The pixels along one axis by their position in a tile."""
    tile, size = transforms.outputs.shape
    elements = _combined(transforms.data.T, arrays)

    def shifted(array: jax.Array, count: int) -> jax.Array:
        widths = [(0, 0)] * array.ndim
        widths[axis] = (count, 1 - count)
        return jnp.pad(array, widths)

    # A tile's first pixels are also the last ones that the tile before it reads.
    return [
        shifted(elements[i], 0) + shifted(elements[tile + i], 1)
        if tile + i < size
        else shifted(elements[i], 0)
        for i in range(tile)
    ]


def _extended(images: jax.Array, height: int, width: int) -> jax.Array:
    """With zeros behind up to that height and width, where it is smaller."""
    below, right = (
        max(0, wanted - size)
        for wanted, size in zip((height, width), images.shape[1:3], strict=True)
    )
    return jnp.pad(images, [(0, 0), (0, below), (0, right), (0, 0)])
