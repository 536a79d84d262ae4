"""Convolution, pooling, dense product, bias and dropout that are fast inside a compiled loop.

The values are those of the plain XLA operations, which a GPU or TPU gets as they are. On a CPU

- a convolution is Winograd's where that saves work, else XLA's, and its gradients are written in
  the one form that XLA:CPU computes with a fast routine inside a loop: NHWC input, HWIO kernel,
  NHWC output, neither reversal nor dilation. What JAX derives by itself is not in that form and
  runs in naive loops there (jax issue 12868; measured 1.8 against 55 to 220 GFLOP/s);
- what an operation reads and returns is stored, and not computed anew by each of its consumers.

The rules are `custom_vjp`: reverse mode, `vmap` and `jit` compose; forward mode (`jvp`) does not.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from fmnist_jax.nn import winograd
from fmnist_jax.nn.winograd import Grid
from fmnist_jax.xla.noinline import fence

Padding = Literal["SAME", "VALID"]
Pads = list[tuple[int, int]]

_CANONICAL = ("NHWC", "HWIO", "NHWC")


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def conv2d(images: jax.Array, kernel: jax.Array, padding: Padding) -> jax.Array:
    """Cross-correlates images with a kernel, stride 1.

    Args:
      images: float[batch, height, width, channels].
      kernel: float[kernel_height, kernel_width, channels, features].
      padding: "SAME" keeps height and width, "VALID" uses no padding.

    Returns:
      float[batch, out_height, out_width, features].

    Example:
      >>> import jax.numpy as jnp
      >>> conv2d(jnp.ones((1, 4, 4, 1)), jnp.ones((3, 3, 1, 2)), "VALID").shape
      (1, 2, 2, 2)
    """
    pads = _pads(kernel, padding)
    return _by_platform(_convolve_cpu, _convolve, images, kernel, pads=pads)


def _conv2d_forward(images, kernel, padding):
    images = _stored(images)
    return _stored(conv2d(images, kernel, padding)), (images, kernel)


def _conv2d_backward(padding, residuals, cotangent):
    images, kernel = residuals
    return _by_platform(
        _convolve_gradients_cpu,
        _convolve_gradients,
        images,
        kernel,
        _stored(cotangent),
        pads=_pads(kernel, padding),
    )


conv2d.defvjp(_conv2d_forward, _conv2d_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def conv2d_max_pool(images: jax.Array, kernel: jax.Array, padding: Padding) -> jax.Array:
    """`conv2d`, then the maximum of each 2x2 window, stride 2.

    An odd last row or column is left out, and where it can be, not computed. Where values tie, the
    gradient goes to the first of them in reading order, as in TensorFlow and PyTorch. On a CPU and
    for 20 x 20 outputs and more, convolutions of equal pixels may differ by rounding, unless those
    are zeros, and then do not tie.

    Args:
      images: float[batch, height, width, channels].
      kernel: float[kernel_height, kernel_width, channels, features].
      padding: as for `conv2d`.

    Returns:
      float[batch, out_height // 2, out_width // 2, features].

    Example:
      >>> import jax.numpy as jnp
      >>> images = jnp.arange(25.0).reshape(1, 5, 5, 1)
      >>> conv2d_max_pool(images, jnp.ones((1, 1, 1, 1)), "VALID")[0, :, :, 0].tolist()
      [[6.0, 8.0], [16.0, 18.0]]
    """
    return _conv2d_max_pool_forward(images, kernel, padding)[0]


def _conv2d_max_pool_forward(images, kernel, padding):
    images = _stored(images)
    outputs, winner = _by_platform(
        _convolve_max_pool_cpu,
        _convolve_max_pool_and_no_winner,
        images,
        kernel,
        pads=_pads(kernel, padding),
    )
    return outputs, (images, kernel, winner)


def _conv2d_max_pool_backward(padding, residuals, cotangent):
    images, kernel, winner = residuals
    return _by_platform(
        _convolve_max_pool_gradients_cpu,
        _convolve_max_pool_gradients,
        images,
        kernel,
        winner,
        _stored(cotangent),
        pads=_pads(kernel, padding),
    )


conv2d_max_pool.defvjp(_conv2d_max_pool_forward, _conv2d_max_pool_backward)


@jax.custom_vjp
def matmul(inputs: jax.Array, kernel: jax.Array) -> jax.Array:
    """The product of a dense layer.

    Args:
      inputs: float[batch, channels].
      kernel: float[channels, features].

    Returns:
      float[batch, features].

    Example:
      >>> import jax.numpy as jnp
      >>> matmul(jnp.ones((2, 3)), jnp.ones((3, 4))).shape
      (2, 4)
    """
    return inputs @ kernel


def _matmul_forward(inputs, kernel):
    return matmul(inputs, kernel), (inputs, kernel)


def _matmul_backward(residuals, cotangent):
    inputs, kernel = residuals
    # XLA:CPU multiplies a few rows with a transposed matrix slowly: 60 against 150 GFLOP/s for
    # [32, 256] and [1568, 256], the transposition counted in.
    return cotangent @ _stored(kernel.T), inputs.T @ cotangent


matmul.defvjp(_matmul_forward, _matmul_backward)


@jax.custom_vjp
def add_bias(activations: jax.Array, bias: jax.Array) -> jax.Array:
    """Adds one number to each feature.

    Args:
      activations: float[..., features].
      bias: float[features].

    Returns:
      float[..., features].

    Example:
      >>> import jax.numpy as jnp
      >>> add_bias(jnp.zeros((2, 2)), jnp.array([1.0, 2.0])).tolist()
      [[1.0, 2.0], [1.0, 2.0]]
    """
    return activations + bias.reshape((1,) * (activations.ndim - 1) + bias.shape)


def _add_bias_forward(activations, bias):
    return add_bias(activations, bias), None


def _add_bias_backward(_, cotangent):
    return cotangent, _by_platform(_sum_cpu, _sum, cotangent)


add_bias.defvjp(_add_bias_forward, _add_bias_backward)


def dropout(key: jax.Array, activations: jax.Array, rate: float | jax.Array) -> jax.Array:
    """Sets a random share of the activations to zero and scales up the rest.

    One random byte decides about each activation, so the rate is rounded to a multiple of 1/256
    (0.2 acts as 0.19922, 0.3 as 0.30078, 0.5 is exact); the survivors are scaled by the rounded
    rate, so the expected value is exact. Four bytes come from each 32-bit draw.

    Args:
      key: a typed PRNG key, used here and nowhere else.
      activations: float[...].
      rate: share to drop, in [0, 1), which may be traced; at most 255/256 are dropped.

    Returns:
      float[...], the shape and dtype of `activations`.

    Example:
      >>> import jax
      >>> dropout(jax.random.key(0), jax.numpy.ones((8,)), 0.5).tolist()
      [2.0, 0.0, 2.0, 2.0, 2.0, 0.0, 2.0, 2.0]
    """
    threshold = jnp.clip(jnp.round(256 * jnp.asarray(rate)), 0, 255)
    words = jax.random.bits(key, (-(-activations.size // 4),), jnp.uint32)
    draws = lax.bitcast_convert_type(words, jnp.uint8).reshape(-1)[: activations.size]
    kept = _stored(draws >= threshold.astype(jnp.uint8)).reshape(activations.shape)
    scale = (256 / (256 - threshold)).astype(activations.dtype)
    return jnp.where(kept, activations * scale, 0)


def _by_platform(cpu: Callable, default: Callable, *arrays: jax.Array, **options: Any) -> Any:
    return lax.platform_dependent(
        *arrays,
        cpu=functools.partial(cpu, **options),
        default=functools.partial(default, **options),
    )


def _stored(array: jax.Array) -> jax.Array:
    return _by_platform(fence, lambda array: array, array)


def _pads(kernel: jax.Array, padding: Padding) -> Pads:
    if padding == "VALID":
        return [(0, 0), (0, 0)]
    # XLA's "SAME" at stride 1: the odd one goes behind.
    return [((size - 1) // 2, size // 2) for size in kernel.shape[:2]]


# The plain operations.


def _convolve(images, kernel, *, pads):
    return lax.conv_general_dilated(images, kernel, (1, 1), pads, dimension_numbers=_CANONICAL)


def _convolve_gradients(images, kernel, cotangent, *, pads):
    _, vjp = jax.vjp(functools.partial(_convolve, pads=pads), images, kernel)
    return vjp(cotangent)


def _convolve_max_pool(images, kernel, *, pads):
    outputs = _convolve(images, kernel, pads=pads)
    return lax.reduce_window(outputs, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def _convolve_max_pool_and_no_winner(images, kernel, *, pads):
    outputs = _convolve_max_pool(images, kernel, pads=pads)
    return outputs, jnp.zeros(outputs.shape, jnp.uint8)  # as many as on a CPU, and never used


def _convolve_max_pool_gradients(images, kernel, winner, cotangent, *, pads):
    del winner
    _, vjp = jax.vjp(functools.partial(_convolve_max_pool, pads=pads), images, kernel)
    return vjp(cotangent)


def _sum(cotangent):
    return cotangent.sum(range(cotangent.ndim - 1))


# The same for a CPU.


def _convolve_cpu(images, kernel, *, pads):
    if kernel.shape[2] == 1:
        # With one channel, XLA's convolution reaches a quarter of this product's rate: 1.10 against
        # 0.25 ms for 32 filters on [128, 28, 28, 1].
        patches = _patches(images, kernel, pads)
        products = patches.reshape(-1, patches.shape[-1]) @ kernel.reshape(-1, kernel.shape[3])
        return products.reshape(*patches.shape[:3], -1)
    tile = _tile(images, kernel, pads)
    if tile is None:
        return _convolve(images, kernel, pads=pads)
    height, width = _out_shape(images, kernel, pads)
    tiles = -(-height // tile), -(-width // tile)
    outputs = winograd.tile_outputs(_padded(images, pads), kernel, tiles, tile)
    return winograd.join(outputs)[:, :height, :width]


def _convolve_gradients_cpu(images, kernel, cotangent, *, pads):
    tile = _tile(images, kernel, pads)
    if tile is not None:
        return _tile_gradients(images, kernel, cotangent, pads, tile)

    images_gradient = _images_gradient_cpu(images, kernel, cotangent, pads)
    # d/d kernel[i, j]: the images shifted by (i, j) against the cotangent, summed over the batch.
    if kernel.shape[2] == 1:
        patches = _patches(images, kernel, pads)
        kernel_gradient = patches.reshape(-1, patches.shape[-1]).T @ cotangent.reshape(
            -1, kernel.shape[3]
        )
        return images_gradient, kernel_gradient.reshape(kernel.shape)
    # As a convolution, the channels are the batch, and the batch the channels that are summed over.
    kernel_gradient = _convolve(
        images.transpose(3, 1, 2, 0), cotangent.transpose(1, 2, 0, 3), pads=pads
    )
    return images_gradient, kernel_gradient.transpose(1, 2, 0, 3)


def _images_gradient_cpu(images, kernel, cotangent, pads):
    rows, columns = kernel.shape[:2]
    height, width = cotangent.shape[1:3]
    if (height + rows - 1) * (width + columns - 1) < 2 * height * width:
        # The cotangent, padded to full overlap, against the kernel turned by 180 degrees.
        turned = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
        full = [
            (size - 1 - low, size - 1 - high)
            for size, (low, high) in zip(kernel.shape[:2], pads, strict=True)
        ]
        return _convolve(cotangent, turned, pads=full)
    # A small map would be mostly padding. Here one product, whose parts are shifted and added:
    # 0.38 against 1.16 ms for [128, 3, 3, 128] to [128, 5, 5, 64].
    taps = kernel.transpose(3, 0, 1, 2).reshape(kernel.shape[3], -1)
    products = cotangent.reshape(-1, kernel.shape[3]) @ taps
    products = products.reshape(*cotangent.shape[:3], rows, columns, -1)
    shifted = [
        jnp.pad(products[:, :, :, i, j], [(0, 0), (i, rows - 1 - i), (j, columns - 1 - j), (0, 0)])
        for i in range(rows)
        for j in range(columns)
    ]
    return _cropped(sum(shifted[1:], start=shifted[0]), images, pads)


def _convolve_max_pool_cpu(images, kernel, *, pads):
    height, width = (size // 2 for size in _out_shape(images, kernel, pads))
    tile = _tile(images, kernel, pads)
    if tile is None:
        outputs = _convolve_cpu(images, kernel, pads=pads)
        corners = [
            [outputs[:, i : 2 * height : 2, j : 2 * width : 2] for j in (0, 1)] for i in (0, 1)
        ]
        return fence(_first_maximum(corners))
    # The windows of the pool are in one tile each, and take their corners as they come.
    windows = tile // 2
    tiles = -(-height // windows), -(-width // windows)
    outputs = winograd.tile_outputs(_padded(images, pads), kernel, tiles, tile)
    pooled = [
        [
            fence(_first_maximum([line[j : j + 2] for line in outputs[i : i + 2]]))
            for j in range(0, tile, 2)
        ]
        for i in range(0, tile, 2)
    ]
    maxima, winners = (
        winograd.join([[pair[part] for pair in row] for row in pooled])[:, :height, :width]
        for part in (0, 1)
    )
    return fence((maxima, winners))


def _convolve_max_pool_gradients_cpu(images, kernel, winner, cotangent, *, pads):
    height, width = _out_shape(images, kernel, pads)
    batch, rows, columns, features = cotangent.shape
    position = jnp.arange(4, dtype=jnp.uint8).reshape(1, 1, 2, 1, 2, 1)
    # [batch, rows, 2, columns, 2, features]: each window next to its own cotangent.
    gradient = jnp.where(
        winner[:, :, None, :, None] == position, cotangent[:, :, None, :, None], 0
    ).reshape(batch, 2 * rows, 2 * columns, features)
    tile = _tile(images, kernel, pads)
    if tile is not None:
        return _tile_gradients(images, kernel, gradient, pads, tile)
    left_out = [(0, 0), (0, height - 2 * rows), (0, width - 2 * columns), (0, 0)]
    return _convolve_gradients_cpu(images, kernel, jnp.pad(gradient, left_out), pads=pads)


def _sum_cpu(cotangent):
    # XLA:CPU sums over the leading axes slowly, and multiplies with ones as fast as it reads.
    rows = fence(cotangent).reshape(-1, cotangent.shape[-1])
    dtype = jnp.promote_types(rows.dtype, jnp.float32)
    ones = jnp.ones(len(rows), rows.dtype)
    return jnp.matmul(ones, rows, preferred_element_type=dtype).astype(rows.dtype)


def _tile_gradients(images, kernel, cotangent, pads, tile):
    images_gradient, kernel_gradient = winograd.tile_gradients(
        _padded(images, pads), kernel, cotangent, tile
    )
    return _cropped(images_gradient, images, pads), kernel_gradient


def _tile(images, kernel, pads) -> int | None:
    """The side of Winograd's tiles, or None where it is not the faster way."""
    rows, columns, channels, _ = kernel.shape
    if rows != columns or (2, rows) not in winograd.POINTS or channels == 1:
        return None
    if jnp.finfo(images.dtype).bits < 32:
        return None  # the additions would round too much
    height, width = _out_shape(images, kernel, pads)
    # Measured for a step of he_stack: 4 makes it 1.1 times as fast as 2 by its gradients, and 1.1
    # times by its outputs; on less than 20 x 20 it is slower.
    if (4, rows) in winograd.POINTS and min(height, width) >= 20:
        return 4
    # Its multiplications over those of the definition; tiles may reach beyond the edge. Measured:
    # at 0.45 to 0.57 it is 1.5 to 2 times faster, at 0.79 (3 x 3 outputs) slower.
    tiles = -(-height // 2) * -(-width // 2)
    share = tiles * (rows + 1) ** 2 / (height * width * rows**2)
    return 2 if share < 0.7 else None


def _first_maximum(corners: Grid) -> tuple[jax.Array, jax.Array]:
    """The largest of the four, and uint8: which is the first of them in reading order."""
    (top_left, top_right), (bottom_left, bottom_right) = corners
    top, bottom = jnp.maximum(top_left, top_right), jnp.maximum(bottom_left, bottom_right)
    winner = jnp.where(
        top >= bottom,
        jnp.where(top_left >= top_right, 0, 1),
        jnp.where(bottom_left >= bottom_right, 2, 3),
    )
    return jnp.maximum(top, bottom), winner.astype(jnp.uint8)


def _out_shape(images, kernel, pads) -> tuple[int, int]:
    (top, bottom), (left, right) = pads
    height = images.shape[1] + top + bottom - kernel.shape[0] + 1
    return height, images.shape[2] + left + right - kernel.shape[1] + 1


def _padded(images, pads):
    return jnp.pad(images, [(0, 0), *pads, (0, 0)])


def _cropped(padded, images, pads):
    (top, _), (left, _) = pads
    height, width = images.shape[1:3]
    return padded[:, top : top + height, left : left + width]


def _patches(images, kernel, pads):
    """float[batch, out_height, out_width, positions of the kernel], from one-channel images."""
    padded = _padded(images, pads)
    height, width = _out_shape(images, kernel, pads)
    rows, columns = kernel.shape[:2]
    shifts = [padded[:, i : i + height, j : j + width] for i in range(rows) for j in range(columns)]
    return jnp.concatenate(shifts, axis=-1)
