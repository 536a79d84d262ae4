"""Convolutions of images, NHWC, with kernels, HWIO.

- Stride 1 uses Winograd's algorithm where that saves work, otherwise XLA's convolution.
- Gradients of XLA's convolution are written in its canonical form: NHWC input, HWIO kernel, NHWC
  output, no reversal, no dilation. XLA:CPU has a fast routine for this form only. It rewrites other
  convolutions, such as those JAX derives, in the entry computation but not inside a loop (jax issue
  12868; measured 1.8 against 55 to 220 GFLOP/s).
- Other convolutions become one of stride 1, products of matrices, or sums of shifted images.
- `fence` keeps XLA:CPU from recomputing an array in each of its consumers.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fmnist_jax.fast import winograd
from fmnist_jax.fast.gradients import Arrays, Pull, with_gradients
from fmnist_jax.fast.pooling import (
    Pads,
    Windows,
    crop,
    first_maximum,
    overlapping,
    pad,
    scatter,
    views,
)
from fmnist_jax.fast.precision import factors, product, transposed
from fmnist_jax.fast.products import matmul, sum_rows
from fmnist_jax.xla.noinline import fence, fenced_transpose


class Window(NamedTuple):
    """How a kernel moves over the images, as the arguments of `lax.conv_general_dilated`."""

    strides: tuple[int, int] = (1, 1)
    pads: Pads = ((0, 0), (0, 0))
    lhs_dilation: tuple[int, int] = (1, 1)
    rhs_dilation: tuple[int, int] = (1, 1)
    groups: int = 1


def has_fast_form(kernel: jax.Array, window: Window) -> bool:
    """Whether `convolve` takes this convolution."""
    strides, _, spread_images, spread_kernel, groups = window
    spread = [pair for pair in (spread_images, spread_kernel) if pair != (1, 1)]
    is_depthwise = groups > 1 and kernel.shape[2] == 1
    return not spread or (len(spread) == 1 and strides == (1, 1) and not is_depthwise)


def has_pooled_form(kernel: jax.Array, window: Window) -> bool:
    """Whether `convolve_max_pool` takes this convolution."""
    return window == Window(pads=window.pads) and kernel.shape[:2] != (1, 1)


def convolve(images: jax.Array, kernel: jax.Array, window: Window) -> jax.Array:
    """Returns `lax.conv_general_dilated` for what has a fast form."""
    strides, pads, spread_images, spread_kernel, groups = window
    if groups > 1 and kernel.shape[2] > 1:
        window = window._replace(groups=1)
        pairs = zip(jnp.split(images, groups, 3), jnp.split(kernel, groups, 3), strict=True)
        return jnp.concatenate([convolve(x, k, window) for x, k in pairs], axis=3)
    if groups > 1:
        return _depthwise(images, kernel, strides, pads)
    if spread_kernel != (1, 1):
        return _dilated(images, kernel, pads, spread_kernel)
    if spread_images != (1, 1):
        return _transposed(images, kernel, pads, spread_images)
    if strides == (1, 1):
        return _stride_one(images, kernel, pads)
    # Measured, Zen 3: with 1 to 3 channels 1.4 to 2 times as fast, with 16 two thirds as fast.
    is_small = kernel.shape[0] <= strides[0] and kernel.shape[1] <= strides[1]
    if is_small or kernel.shape[2] < 8:
        return _phases(images, kernel, strides, pads)
    return _strided(images, kernel, strides, pads)


def _stride_one(images: jax.Array, kernel: jax.Array, pads: Pads) -> jax.Array:
    if kernel.shape[:2] == (1, 1):
        pixels = pad(images, pads)
        return matmul(pixels.reshape(-1, pixels.shape[-1]), kernel[0, 0]).reshape(
            *pixels.shape[:3], -1
        )

    def pull(residuals: Arrays, cotangent: jax.Array) -> Arrays:
        images, kernel = residuals
        return _gradients(images, kernel, fence(cotangent), pads)

    outputs = functools.partial(_outputs, pads=pads)
    return _with_gradients(outputs, Window(pads=pads), pull)(images, kernel)


def _with_gradients(
    function: Callable[..., jax.Array], window: Window, pull: Pull
) -> Callable[..., jax.Array]:
    """Returns a convolution whose images and outputs are stored where a gradient is taken."""

    def forward(images: jax.Array, kernel: jax.Array) -> tuple[jax.Array, Arrays]:
        images = fence(images)
        return fence(function(images, kernel)), (images, kernel)

    return with_gradients(function, forward, functools.partial(_tangent, window=window), pull)


def convolve_max_pool(images: jax.Array, kernel: jax.Array, pads: Pads) -> jax.Array:
    """Returns a convolution of stride 1, then the maximum over windows of 2x2 with stride 2."""

    def forward(images: jax.Array, kernel: jax.Array) -> tuple[jax.Array, Arrays]:
        images = fence(images)
        outputs, winner = _outputs_max_pool(images, kernel, pads)
        return outputs, (images, kernel, winner)

    def push(residuals: Arrays, tangents: Arrays) -> jax.Array:
        images, kernel, winner = residuals
        tangent = _tangent((images, kernel), tangents, window=Window(pads=pads))
        corners = views(tangent, POOL, 0)
        return jnp.choose(winner, corners, mode="clip")

    def pull(residuals: Arrays, cotangent: jax.Array) -> Arrays:
        images, kernel, winner = residuals
        height, width = xla_shape(images, kernel, Window(pads=pads))
        if _tile(images, kernel, pads) is not None:
            # Tiles read zeros beyond the edge, so the odd last row and column need not be added.
            height, width = height // 2 * 2, width // 2 * 2
        shape = (len(images), height, width, kernel.shape[3])
        return _gradients(images, kernel, scatter(winner, fence(cotangent), shape, POOL), pads)

    return with_gradients(
        lambda images, kernel: _outputs_max_pool(images, kernel, pads)[0], forward, push, pull
    )(images, kernel)


POOL = Windows((2, 2), (2, 2), ((0, 0), (0, 0)))


def _strided(
    images: jax.Array, kernel: jax.Array, strides: tuple[int, int], pads: Pads
) -> jax.Array:
    """A stride above 1: XLA's convolution, with products of matrices as gradients."""
    window = Window(strides, pads)
    windows = Windows((kernel.shape[0], kernel.shape[1]), strides, pads)

    def pull(residuals: Arrays, cotangent: jax.Array) -> Arrays:
        images, kernel = residuals
        rows, columns, channels, features = kernel.shape
        cotangent = fence(cotangent)
        by_feature = fenced_transpose(factors(cotangent).reshape(-1, features))
        pixels = [fence(factors(view)).reshape(-1, channels) for view in views(images, windows, 0)]
        sums = [product(by_feature, view, images.dtype) for view in pixels]
        kernel_gradient = jnp.stack(sums).reshape(rows, columns, features, channels)
        images_gradient = _scattered(kernel, cotangent, images.shape, windows)
        return images_gradient, kernel_gradient.swapaxes(2, 3)

    convolve = functools.partial(xla_convolve, window=window)
    return _with_gradients(convolve, window, pull)(images, kernel)


def _phases(
    images: jax.Array, kernel: jax.Array, strides: tuple[int, int], pads: Pads
) -> jax.Array:
    """A stride above 1 as stride 1: the pixels of a stride become channels of one pixel."""
    images = pad(images, pads)
    height, width = xla_shape(images, kernel, Window(strides))
    (rows, columns), (down, right) = kernel.shape[:2], strides
    blocks = -(-rows // down), -(-columns // right)
    tall, wide = min(rows, down), min(columns, right)  # phases that the kernel reads
    images = crop(
        images, (0, 0), (0, down * (height + blocks[0] - 1), right * (width + blocks[1] - 1))
    )
    parts = [images[:, i::down, j::right] for i in range(tall) for j in range(wide)]
    kernel = jnp.pad(
        kernel, [(0, blocks[0] * tall - rows), (0, blocks[1] * wide - columns), (0, 0), (0, 0)]
    )
    kernel = kernel.reshape(blocks[0], tall, blocks[1], wide, *kernel.shape[2:])
    kernel = kernel.transpose(0, 2, 1, 3, 4, 5).reshape(*blocks, -1, kernel.shape[-1])
    return _stride_one(jnp.concatenate(parts, axis=-1), kernel, ((0, 0), (0, 0)))


def _dilated(
    images: jax.Array, kernel: jax.Array, pads: Pads, dilation: tuple[int, int]
) -> jax.Array:
    """A dilated kernel as a dense one: the pixels that are read together become one image."""
    images = pad(images, pads)
    down, right = dilation
    (rows, columns), (batch, height, width, channels) = kernel.shape[:2], images.shape
    tall, wide = height - down * (rows - 1), width - right * (columns - 1)
    blocks = -(-height // down), -(-width // right)
    images = crop(images, (0, 0), (0, blocks[0] * down, blocks[1] * right))
    images = images.reshape(batch, blocks[0], down, blocks[1], right, channels)
    images = images.transpose(2, 4, 0, 1, 3, 5).reshape(-1, *blocks, channels)
    outputs = _stride_one(images, kernel, ((0, 0), (0, 0)))
    outputs = outputs.reshape(down, right, batch, *outputs.shape[1:]).transpose(2, 3, 0, 4, 1, 5)
    outputs = outputs.reshape(batch, outputs.shape[1] * down, outputs.shape[3] * right, -1)
    return outputs[:, :tall, :wide]


def _transposed(
    images: jax.Array, kernel: jax.Array, pads: Pads, dilation: tuple[int, int]
) -> jax.Array:
    """Images with zeros between their pixels: each output phase reads its taps of the kernel."""
    tall, wide = xla_shape(images, kernel, Window((1, 1), pads, dilation))
    (down, right), features = dilation, kernel.shape[3]
    # Zero taps in front, so that output `step * u + r` reads taps `step * a + step - 1 - r`.
    fronts = [(step - 1 - low) % step for step, (low, _) in zip(dilation, pads, strict=True)]
    sides = list(zip(kernel.shape, fronts, dilation, strict=False))
    blocks = [-(-(size + front) // step) for size, front, step in sides]
    backs = [n * step - size - front for n, (size, front, step) in zip(blocks, sides, strict=True)]
    sizes = -(-tall // down), -(-wide // right)
    kernel = jnp.pad(kernel, [*zip(fronts, backs, strict=True), (0, 0), (0, 0)])
    kernel = kernel.reshape(blocks[0], down, blocks[1], right, *kernel.shape[2:])[:, ::-1, :, ::-1]
    kernel = kernel.transpose(0, 2, 4, 1, 3, 5).reshape(*blocks, kernel.shape[4], -1)
    # The first output reads from the pixel `-start` on.
    starts = [(p[0] + f - d + 1) // d for p, f, d in zip(pads, fronts, dilation, strict=True)]
    ends = [size + block - 1 for size, block in zip(sizes, blocks, strict=True)]
    around = (
        (starts[0], ends[0] - images.shape[1] - starts[0]),
        (starts[1], ends[1] - images.shape[2] - starts[1]),
    )
    outputs = _stride_one(pad(images, around), kernel, ((0, 0), (0, 0)))
    outputs = outputs.reshape(*outputs.shape[:3], down, right, features)
    outputs = outputs.transpose(0, 1, 3, 2, 4, 5)
    outputs = outputs.reshape(len(images), sizes[0] * down, sizes[1] * right, features)
    return outputs[:, :tall, :wide]


def _depthwise(
    images: jax.Array, kernel: jax.Array, strides: tuple[int, int], pads: Pads
) -> jax.Array:
    """One or several features of each channel: sums of shifted images."""
    channels = images.shape[3]
    rows, columns = kernel.shape[:2]
    if kernel.shape[3] != channels:
        images = jnp.repeat(images, kernel.shape[3] // channels, axis=3)
    windows = Windows((rows, columns), strides, pads)
    shape = images.shape

    def pull(residuals: Arrays, cotangent: jax.Array) -> Arrays:
        images, kernel = residuals
        cotangent = fence(cotangent)
        (top, bottom), (left, right) = pads
        if strides == (1, 1):
            around = (rows - 1 - top, rows - 1 - bottom), (columns - 1 - left, columns - 1 - right)
            full = windows._replace(pads=around)
            images_gradient = _shifted(cotangent, jnp.flip(kernel, (0, 1)), full)
        else:
            parts = overlapping(lambda i, j: cotangent * kernel[i, j].reshape(1, 1, 1, -1), windows)
            images_gradient = crop(parts, (top, left), shape)
        pixels = views(fence(pad(images, pads)), windows._replace(pads=((0, 0), (0, 0))), 0)
        sums = [sum_rows(view * cotangent) for view in pixels]
        return images_gradient, jnp.stack(sums).reshape(kernel.shape)

    shifted = functools.partial(_shifted, windows=windows)
    window = Window(strides, pads, groups=shape[3])
    return _with_gradients(shifted, window, pull)(images, kernel)


def _shifted(images: jax.Array, kernel: jax.Array, windows: Windows) -> jax.Array:
    """Returns a convolution with a kernel [rows, columns, 1, channels] of one tap per channel."""
    taps = kernel.reshape(-1, 1, 1, 1, kernel.shape[3])
    pixels = zip(views(images, windows, 0), taps, strict=True)
    return functools.reduce(jnp.add, [view * tap for view, tap in pixels])


def _tangent(residuals: Arrays, tangents: Arrays, window: Window) -> jax.Array:
    images, kernel = residuals
    return xla_convolve(tangents[0], kernel, window) + xla_convolve(images, tangents[1], window)


def _outputs(images: jax.Array, kernel: jax.Array, pads: Pads) -> jax.Array:
    """Returns a convolution of stride 1."""
    if kernel.shape[2] == 1:
        # With one channel, this product is four times as fast as XLA's convolution: 0.25 ms
        # against 1.10 ms for 32 filters on [128, 28, 28, 1].
        patches = factors(_patches(images, kernel, pads))
        weights = factors(kernel.reshape(-1, kernel.shape[3]))
        products = product(patches.reshape(-1, patches.shape[-1]), weights, images.dtype)
        return products.reshape(*patches.shape[:3], -1)
    tile = _tile(images, kernel, pads)
    if tile is None:
        return xla_convolve(images, kernel, Window(pads=pads))
    height, width = xla_shape(images, kernel, Window(pads=pads))
    tiles = -(-height // tile), -(-width // tile)
    outputs = winograd.tile_outputs(pad(images, pads), kernel, tiles, tile)
    return winograd.join(outputs)[:, :height, :width]


def _gradients(
    images: jax.Array, kernel: jax.Array, cotangent: jax.Array, pads: Pads
) -> tuple[jax.Array, jax.Array]:
    """Returns the gradients of `_outputs` with respect to images and kernel."""
    tile = _tile(images, kernel, pads)
    if tile is not None:
        images_gradient, kernel_gradient = winograd.tile_gradients(
            pad(images, pads), kernel, cotangent, tile
        )
        (top, _), (left, _) = pads
        return crop(images_gradient, (top, left), images.shape), kernel_gradient

    images_gradient = _images_gradient(images, kernel, cotangent, pads)
    # The gradient of kernel[i, j] is the images shifted by (i, j) times the cotangent, summed over
    # batch and pixels.
    if kernel.shape[2] == 1:
        patches = factors(_patches(images, kernel, pads))
        patches = transposed(patches.reshape(-1, patches.shape[-1]))
        columns = factors(cotangent).reshape(-1, kernel.shape[3])
        kernel_gradient = product(patches, columns, images.dtype)
        return images_gradient, kernel_gradient.reshape(kernel.shape)
    # This sum is a convolution whose batch is the channels and whose channels are the batch.
    kernel_gradient = xla_convolve(
        images.transpose(3, 1, 2, 0), cotangent.transpose(1, 2, 0, 3), Window(pads=pads)
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
        # Measured for 5x5 kernels, Zen 3: 2.4 against 4.8 ms for [128, 10, 10, 16] to 6 channels,
        # 10.3 against 19.8 ms for [128, 24, 24, 16] to 8, and no difference for 16.
        if kernel.shape[2] <= 8:
            return _in_blocks(cotangent, rotated, full)
        return xla_convolve(cotangent, rotated, Window(pads=full))
    # A small map would be mostly padding. One matrix product and shifted additions are faster:
    # 0.38 ms against 1.16 ms for [128, 3, 3, 128] to [128, 5, 5, 64].
    return _scattered(kernel, cotangent, images.shape, Windows((rows, columns), (1, 1), pads))


def _in_blocks(images: jax.Array, kernel: jax.Array, pads: Pads) -> jax.Array:
    """Returns a convolution with few features: those of 2x2 pixels are computed as one pixel's."""
    height, width = xla_shape(images, kernel, Window(pads=pads))
    rows, columns, channels, features = kernel.shape
    places = [((i, 1 - i), (j, 1 - j), (0, 0), (0, 0)) for i in range(2) for j in range(2)]
    kernel = jnp.stack([jnp.pad(kernel, place) for place in places], axis=3)
    kernel = kernel.reshape(rows + 1, columns + 1, channels, 4 * features)
    (top, bottom), (left, right) = pads
    pads = (top, bottom + height % 2), (left, right + width % 2)
    outputs = xla_convolve(images, kernel, Window((2, 2), pads))
    batch, tall, wide, _ = outputs.shape
    outputs = outputs.reshape(batch, tall, wide, 2, 2, features).transpose(0, 1, 3, 2, 4, 5)
    return outputs.reshape(batch, 2 * tall, 2 * wide, features)[:, :height, :width]


def _scattered(
    kernel: jax.Array, cotangent: jax.Array, shape: tuple[int, ...], windows: Windows
) -> jax.Array:
    """Returns the gradient of images of that shape by one product, whose results are shifted."""
    rows, columns, channels, features = kernel.shape
    taps = factors(fence(kernel.transpose(3, 0, 1, 2))).reshape(features, -1)
    products = product(factors(cotangent).reshape(-1, features), taps, kernel.dtype)
    products = products.reshape(*cotangent.shape[:3], rows, columns, channels)
    (top, _), (left, _) = windows.pads
    return crop(overlapping(lambda i, j: products[:, :, :, i, j], windows), (top, left), shape)


def _outputs_max_pool(
    images: jax.Array, kernel: jax.Array, pads: Pads
) -> tuple[jax.Array, jax.Array]:
    """Returns `convolve_max_pool` and each window's first maximum, uint8 in reading order."""
    height, width = (size // 2 for size in xla_shape(images, kernel, Window(pads=pads)))
    tile = _tile(images, kernel, pads)
    if tile is None:
        return fence(first_maximum(views(_outputs(images, kernel, pads), POOL, 0)))

    # Each pooling window lies in one tile, so the outputs need not be joined before pooling.
    windows = tile // 2
    tiles = -(-height // windows), -(-width // windows)
    grid = winograd.tile_outputs(pad(images, pads), kernel, tiles, tile)
    pooled = [
        [
            fence(first_maximum([*grid[i][j : j + 2], *grid[i + 1][j : j + 2]]))
            for j in range(0, tile, 2)
        ]
        for i in range(0, tile, 2)
    ]
    maxima, winners = (
        winograd.join([[pair[part] for pair in row] for row in pooled])[:, :height, :width]
        for part in (0, 1)
    )
    return fence((maxima, winners))


def xla_convolve(images: jax.Array, kernel: jax.Array, window: Window) -> jax.Array:
    """Returns a convolution by XLA."""
    dimensions = ("NHWC", "HWIO", "NHWC")
    strides, pads, spread_images, spread_kernel, groups = window
    return lax.conv_general_dilated(
        images, kernel, strides, pads, spread_images, spread_kernel, dimensions, groups
    )


def xla_shape(images: jax.Array, kernel: jax.Array, window: Window) -> tuple[int, int]:
    """Returns height and width of the outputs of a convolution."""
    return jax.eval_shape(functools.partial(xla_convolve, window=window), images, kernel).shape[1:3]


def _tile(images: jax.Array, kernel: jax.Array, pads: Pads) -> int | None:
    """Returns the side of Winograd's tiles, or None where XLA's convolution is faster."""
    rows, columns, channels, _ = kernel.shape
    if rows != columns or (2, rows) not in winograd.POINTS or channels == 1:
        return None
    if jnp.finfo(images.dtype).bits < 32:
        return None  # the additions would lose too much precision
    height, width = xla_shape(images, kernel, Window(pads=pads))
    # Measured on a step of he_stack: 4x4 instead of 2x2 tiles speed up the step 1.1 times in the
    # gradients and again 1.1 times in the outputs. They are slower below 20 x 20 outputs.
    if (4, rows) in winograd.POINTS and min(height, width) >= 20:
        return 4
    # Multiplications relative to direct convolution; tiles may exceed the edge. Measured: tiles are
    # 1.5 to 2 times as fast at ratios of 0.45 to 0.57, and slower at 0.79 (3 x 3 outputs).
    tiles = -(-height // 2) * -(-width // 2)
    ratio = tiles * (rows + 1) ** 2 / (height * width * rows**2)
    return 2 if ratio < 0.7 else None


def _patches(images: jax.Array, kernel: jax.Array, pads: Pads) -> jax.Array:
    """Returns float[batch, out_height, out_width, kernel positions] of one-channel images."""
    windows = Windows((kernel.shape[0], kernel.shape[1]), (1, 1), pads)
    return jnp.concatenate(views(images, windows, 0), axis=-1)
