"""The operations of `ops` in forms that XLA:CPU compiles to fast code.

- Convolutions use Winograd's algorithm where that saves work, otherwise XLA's convolution.
- Gradients of XLA's convolution are written in its canonical form: NHWC input, HWIO kernel, NHWC
  output, no reversal, no dilation. XLA:CPU has a fast routine for this form only. It rewrites other
  convolutions, such as those JAX derives, in the entry computation but not inside a loop (jax issue
  12868; measured 1.8 against 55 to 220 GFLOP/s).
- `fence` keeps XLA:CPU from recomputing an array in each of its consumers.

Arguments are named as in `ops`; `pads` is the zero padding, ((top, bottom), (left, right)).
"""

import jax
import jax.numpy as jnp
from jax import lax

from fmnist_jax.nn import winograd
from fmnist_jax.nn.winograd import Grid
from fmnist_jax.xla.noinline import fence

Pads = tuple[tuple[int, int], tuple[int, int]]


def convolve(images: jax.Array, kernel: jax.Array, *, pads: Pads) -> jax.Array:
    """Returns `ops.conv2d`, float[batch, out_height, out_width, features]."""
    if kernel.shape[2] == 1:
        # With one channel, this product is four times as fast as XLA's convolution: 0.25 ms
        # against 1.10 ms for 32 filters on [128, 28, 28, 1].
        patches = _patches(images, kernel, pads)
        products = patches.reshape(-1, patches.shape[-1]) @ kernel.reshape(-1, kernel.shape[3])
        return products.reshape(*patches.shape[:3], -1)
    tile = _tile(images, kernel, pads)
    if tile is None:
        return xla_convolve(images, kernel, pads=pads)
    height, width = out_shape(images, kernel, pads)
    tiles = -(-height // tile), -(-width // tile)
    outputs = winograd.tile_outputs(_padded(images, pads), kernel, tiles, tile)
    return winograd.join(outputs)[:, :height, :width]


def convolve_gradients(
    images: jax.Array, kernel: jax.Array, cotangent: jax.Array, *, pads: Pads
) -> tuple[jax.Array, jax.Array]:
    """Returns the gradients of `convolve` with respect to images and kernel."""
    tile = _tile(images, kernel, pads)
    if tile is not None:
        images_gradient, kernel_gradient = winograd.tile_gradients(
            _padded(images, pads), kernel, cotangent, tile
        )
        return _cropped(images_gradient, images, pads), kernel_gradient

    images_gradient = _images_gradient(images, kernel, cotangent, pads)
    # The gradient of kernel[i, j] is the images shifted by (i, j) times the cotangent, summed over
    # batch and pixels.
    if kernel.shape[2] == 1:
        patches = _patches(images, kernel, pads)
        kernel_gradient = patches.reshape(-1, patches.shape[-1]).T @ cotangent.reshape(
            -1, kernel.shape[3]
        )
        return images_gradient, kernel_gradient.reshape(kernel.shape)
    # This sum is a convolution whose batch is the channels and whose channels are the batch.
    kernel_gradient = xla_convolve(
        images.transpose(3, 1, 2, 0), cotangent.transpose(1, 2, 0, 3), pads=pads
    )
    return images_gradient, kernel_gradient.transpose(1, 2, 0, 3)


def _images_gradient(
    images: jax.Array, kernel: jax.Array, cotangent: jax.Array, pads: Pads
) -> jax.Array:
    rows, columns = kernel.shape[:2]
    height, width = cotangent.shape[1:3]
    if (height + rows - 1) * (width + columns - 1) < 2 * height * width:
        # The fully padded cotangent, convolved with the kernel rotated by 180 degrees.
        rotated = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
        (top, bottom), (left, right) = pads
        full = (rows - 1 - top, rows - 1 - bottom), (columns - 1 - left, columns - 1 - right)
        return xla_convolve(cotangent, rotated, pads=full)
    # A small map would be mostly padding. One matrix product and shifted additions are faster:
    # 0.38 ms against 1.16 ms for [128, 3, 3, 128] to [128, 5, 5, 64].
    taps = kernel.transpose(3, 0, 1, 2).reshape(kernel.shape[3], -1)
    products = cotangent.reshape(-1, kernel.shape[3]) @ taps
    products = products.reshape(*cotangent.shape[:3], rows, columns, -1)
    shifted = [
        jnp.pad(products[:, :, :, i, j], [(0, 0), (i, rows - 1 - i), (j, columns - 1 - j), (0, 0)])
        for i in range(rows)
        for j in range(columns)
    ]
    return _cropped(sum(shifted[1:], start=shifted[0]), images, pads)


def convolve_max_pool(
    images: jax.Array, kernel: jax.Array, *, pads: Pads
) -> tuple[jax.Array, jax.Array]:
    """Returns `ops.conv2d_max_pool` and each window's first maximum, uint8 in reading order."""
    height, width = (size // 2 for size in out_shape(images, kernel, pads))
    tile = _tile(images, kernel, pads)
    if tile is None:
        outputs = convolve(images, kernel, pads=pads)
        corners = [
            [outputs[:, i : 2 * height : 2, j : 2 * width : 2] for j in (0, 1)] for i in (0, 1)
        ]
        return fence(_first_maximum(corners))

    # Each pooling window lies in one tile, so the outputs need not be joined before pooling.
    windows = tile // 2
    tiles = -(-height // windows), -(-width // windows)
    grid = winograd.tile_outputs(_padded(images, pads), kernel, tiles, tile)
    pooled = [
        [
            fence(_first_maximum([line[j : j + 2] for line in grid[i : i + 2]]))
            for j in range(0, tile, 2)
        ]
        for i in range(0, tile, 2)
    ]
    maxima, winners = (
        winograd.join([[pair[part] for pair in row] for row in pooled])[:, :height, :width]
        for part in (0, 1)
    )
    return fence((maxima, winners))


def convolve_max_pool_gradients(
    images: jax.Array, kernel: jax.Array, winner: jax.Array, cotangent: jax.Array, *, pads: Pads
) -> tuple[jax.Array, jax.Array]:
    """Returns the gradients of `convolve_max_pool` with respect to images and kernel."""
    batch, rows, columns, features = cotangent.shape
    position = jnp.arange(4, dtype=jnp.uint8).reshape(1, 1, 2, 1, 2, 1)
    # float[batch, rows, 2, columns, 2, features]: the cotangent at each window's first maximum.
    gradient = jnp.where(
        winner[:, :, None, :, None] == position, cotangent[:, :, None, :, None], 0
    ).reshape(batch, 2 * rows, 2 * columns, features)
    if _tile(images, kernel, pads) is None:
        # Add the odd last row and column; tiles read zeros beyond the edge.
        height, width = out_shape(images, kernel, pads)
        dropped = [(0, 0), (0, height - 2 * rows), (0, width - 2 * columns), (0, 0)]
        gradient = jnp.pad(gradient, dropped)
    return convolve_gradients(images, kernel, gradient, pads=pads)


def sum_rows(cotangent: jax.Array) -> jax.Array:
    """Returns the sum over all axes but the last."""
    # XLA:CPU reduces leading axes slowly. A product with ones is limited by memory bandwidth only.
    rows = fence(cotangent).reshape(-1, cotangent.shape[-1])
    dtype = jnp.promote_types(rows.dtype, jnp.float32)
    ones = jnp.ones(len(rows), rows.dtype)
    return jnp.matmul(ones, rows, preferred_element_type=dtype).astype(rows.dtype)


def xla_convolve(images: jax.Array, kernel: jax.Array, *, pads: Pads) -> jax.Array:
    """Returns `ops.conv2d` by XLA's convolution, as on other platforms."""
    dimensions = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(images, kernel, (1, 1), pads, dimension_numbers=dimensions)


def out_shape(images: jax.Array, kernel: jax.Array, pads: Pads) -> tuple[int, int]:
    """Returns height and width of the outputs of a convolution."""
    (top, bottom), (left, right) = pads
    height = images.shape[1] + top + bottom - kernel.shape[0] + 1
    return height, images.shape[2] + left + right - kernel.shape[1] + 1


def _tile(images: jax.Array, kernel: jax.Array, pads: Pads) -> int | None:
    """Returns the side of Winograd's tiles, or None where XLA's convolution is faster."""
    rows, columns, channels, _ = kernel.shape
    if rows != columns or (2, rows) not in winograd.POINTS or channels == 1:
        return None
    if jnp.finfo(images.dtype).bits < 32:
        return None  # the additions would lose too much precision
    height, width = out_shape(images, kernel, pads)
    # Measured on a step of he_stack: 4x4 instead of 2x2 tiles speed up the step 1.1 times in the
    # gradients and again 1.1 times in the outputs. They are slower below 20 x 20 outputs.
    if (4, rows) in winograd.POINTS and min(height, width) >= 20:
        return 4
    # Multiplications relative to direct convolution; tiles may exceed the edge. Measured: tiles are
    # 1.5 to 2 times as fast at ratios of 0.45 to 0.57, and slower at 0.79 (3 x 3 outputs).
    tiles = -(-height // 2) * -(-width // 2)
    ratio = tiles * (rows + 1) ** 2 / (height * width * rows**2)
    return 2 if ratio < 0.7 else None


def _first_maximum(corners: Grid) -> tuple[jax.Array, jax.Array]:
    """Returns the maximum of the four corners and the index, uint8, of the first that equals it."""
    (top_left, top_right), (bottom_left, bottom_right) = corners
    top, bottom = jnp.maximum(top_left, top_right), jnp.maximum(bottom_left, bottom_right)
    winner = jnp.where(
        top >= bottom,
        jnp.where(top_left >= top_right, 0, 1),
        jnp.where(bottom_left >= bottom_right, 2, 3),
    )
    return jnp.maximum(top, bottom), winner.astype(jnp.uint8)


def _padded(images: jax.Array, pads: Pads) -> jax.Array:
    return jnp.pad(images, [(0, 0), *pads, (0, 0)])


def _cropped(padded: jax.Array, images: jax.Array, pads: Pads) -> jax.Array:
    """Removes the padding of images; the inverse of `_padded`."""
    (top, _), (left, _) = pads
    height, width = images.shape[1:3]
    return padded[:, top : top + height, left : left + width]


def _patches(images: jax.Array, kernel: jax.Array, pads: Pads) -> jax.Array:
    """Returns float[batch, out_height, out_width, kernel positions] of one-channel images."""
    padded = _padded(images, pads)
    height, width = out_shape(images, kernel, pads)
    rows, columns = kernel.shape[:2]
    shifts = [padded[:, i : i + height, j : j + width] for i in range(rows) for j in range(columns)]
    return jnp.concatenate(shifts, axis=-1)
