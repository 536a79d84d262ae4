"""Convolution, pooling, dense product, bias, batch normalization and dropout, fast in a loop.

GPUs and TPUs compute the plain XLA operations, which this module holds; CPUs compute the forms in
`cpu`. Both return the same values up to rounding.

All but `normalize` and `dropout` are `custom_vjp` functions: reverse mode, `vmap` and `jit`
compose, forward mode (`jvp`) is not supported.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

from fmnist_jax.errors import ConfigError
from fmnist_jax.nn import cpu
from fmnist_jax.nn.cpu import Pads
from fmnist_jax.xla.noinline import fence, fenced_transpose

Padding = Literal["SAME", "VALID"]


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
    return _by_platform(
        cpu.convolve, _convolve, images, kernel, pads=_pads(images, kernel, padding)
    )


def _conv2d_forward(images, kernel, padding):
    images = _fence(images)
    return _fence(conv2d(images, kernel, padding)), (images, kernel)


def _conv2d_backward(padding, residuals, cotangent):
    images, kernel = residuals
    return _by_platform(
        cpu.convolve_gradients,
        _convolve_gradients,
        images,
        kernel,
        _fence(cotangent),
        pads=_pads(images, kernel, padding),
    )


conv2d.defvjp(_conv2d_forward, _conv2d_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def conv2d_max_pool(images: jax.Array, kernel: jax.Array, padding: Padding) -> jax.Array:
    """Applies `conv2d`, then 2x2 max pooling with stride 2.

    An odd last row or column is dropped. If values tie, the gradient goes to the first in reading
    order, as in TensorFlow and PyTorch. On a CPU, for outputs of 20 x 20 and more, equal non-zero
    patches may give outputs that differ by rounding, and then do not tie.

    Args:
      images: float[batch, height, width, channels].
      kernel: float[kernel_height, kernel_width, channels, features].
      padding: "SAME" keeps height and width before pooling, "VALID" uses no padding.

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
    images = _fence(images)
    outputs, winner = _by_platform(
        cpu.convolve_max_pool,
        _convolve_max_pool_without_winner,
        images,
        kernel,
        pads=_pads(images, kernel, padding),
    )
    return outputs, (images, kernel, winner)


def _conv2d_max_pool_backward(padding, residuals, cotangent):
    images, kernel, winner = residuals
    return _by_platform(
        cpu.convolve_max_pool_gradients,
        _convolve_max_pool_gradients,
        images,
        kernel,
        winner,
        _fence(cotangent),
        pads=_pads(images, kernel, padding),
    )


conv2d_max_pool.defvjp(_conv2d_max_pool_forward, _conv2d_max_pool_backward)


@jax.custom_vjp
def global_max_pool(activations: jax.Array) -> jax.Array:
    """Takes the maximum over height and width.

    If values tie, the gradient goes to the first in reading order. JAX's gradient of a maximum
    compares it with recomputed activations; where XLA rounds these in another way, none is equal,
    and the gradient is 0 / 0.

    Args:
      activations: float[batch, height, width, features].

    Returns:
      float[batch, features].

    Example:
      >>> import jax.numpy as jnp
      >>> global_max_pool(jnp.arange(4.0).reshape(1, 2, 2, 1)).tolist()
      [[3.0]]
    """
    return _global_max_pool_forward(activations)[0]


def _global_max_pool_forward(activations):
    pixels = _fence(activations).reshape(activations.shape[0], -1, activations.shape[-1])
    return pixels.max(axis=1), (jnp.argmax(pixels, axis=1), activations.shape)


def _global_max_pool_backward(residuals, cotangent):
    winner, (batch, height, width, features) = residuals
    position = jnp.arange(height * width).reshape(1, -1, 1)
    gradient = jnp.where(winner[:, None] == position, cotangent[:, None], 0)
    return (gradient.reshape(batch, height, width, features),)


global_max_pool.defvjp(_global_max_pool_forward, _global_max_pool_backward)


@jax.custom_vjp
def matmul(inputs: jax.Array, kernel: jax.Array) -> jax.Array:
    """Multiplies the inputs of a dense layer with its kernel.

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
    # XLA:CPU multiplies few rows with a transposed matrix slowly: 60 against 150 GFLOP/s for
    # [32, 256] and [1568, 256], including the transposition.
    transposed = _by_platform(fenced_transpose, jnp.transpose, kernel)
    return cotangent @ transposed, inputs.T @ cotangent


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
    return activations + _like(bias, activations)


def _add_bias_forward(activations, bias):
    return add_bias(activations, bias), None


def _add_bias_backward(_, cotangent):
    return cotangent, _by_platform(cpu.sum_rows, _sum_rows, cotangent)


add_bias.defvjp(_add_bias_forward, _add_bias_backward)


@jax.custom_vjp
def batch_norm(
    activations: jax.Array, scale: jax.Array, bias: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalizes each feature over all other axes, then scales and shifts it.

    Args:
      activations: float[..., features].
      scale: float[features], the standard deviation of the outputs.
      bias: float[features], their mean.

    Returns:
      float[..., features]; and the mean and the variance of the activations, float32[features]
      each, for moving averages: no gradient passes through these two.

    Example:
      >>> import jax.numpy as jnp
      >>> activations = jnp.array([[1.0], [3.0]])
      >>> outputs, mean, var = batch_norm(activations, jnp.ones(1), jnp.zeros(1))
      >>> outputs.round(2).tolist(), mean.tolist(), var.tolist()
      ([[-1.0], [1.0]], [2.0], [1.0])
    """
    return _batch_norm_forward(activations, scale, bias)[0]


def normalize(
    activations: jax.Array, mean: jax.Array, var: jax.Array, scale: jax.Array, bias: jax.Array
) -> jax.Array:
    """Does what `batch_norm` does, with a given mean and variance, float32[features] each."""
    mean, slope, bias = (
        _like(values, activations)
        for values in (mean, scale * lax.rsqrt(var + _NORM_EPSILON), bias)
    )
    return (activations - mean) * slope + bias


def _batch_norm_forward(activations, scale, bias):
    activations = _fence(activations)
    mean = _mean_rows(activations)
    var = _mean_rows(jnp.square(activations - _like(mean, activations)))
    outputs = normalize(activations, mean, var, scale, bias)
    return (outputs, mean, var), (activations, mean, var, scale)


def _batch_norm_backward(residuals, cotangents):
    activations, mean, var, scale = residuals
    cotangent = _fence(cotangents[0])
    normalized = normalize(activations, mean, var, jnp.ones_like(mean), jnp.zeros_like(mean))
    bias_gradient = _mean_rows(cotangent)
    scale_gradient = _mean_rows(cotangent * normalized)
    bias_part, scale_part, slope = (
        _like(values, cotangent)
        for values in (bias_gradient, scale_gradient, scale * lax.rsqrt(var + _NORM_EPSILON))
    )
    gradient = slope * (cotangent - bias_part - normalized * scale_part)
    rows = cotangent.size // cotangent.shape[-1]
    return gradient, *(
        (rows * mean).astype(scale.dtype) for mean in (scale_gradient, bias_gradient)
    )


batch_norm.defvjp(_batch_norm_forward, _batch_norm_backward)

# PyTorch's; Keras has 1e-3, airbench94 1e-12.
_NORM_EPSILON = 1e-5


def _mean_rows(array):
    """Returns float32[features], the mean over all axes but the last."""
    sums = _by_platform(cpu.sum_rows, _sum_rows, array.astype(jnp.float32))
    return sums / (array.size // array.shape[-1])


def _like(values, array):
    """Gives one value per feature the dtype and the number of axes of the array."""
    return values.astype(array.dtype).reshape((1,) * (array.ndim - 1) + values.shape)


def dropout(key: jax.Array, activations: jax.Array, rate: float | jax.Array) -> jax.Array:
    """Sets a random fraction of the activations to zero and scales up the rest.

    One random byte decides about each activation, so the rate is rounded to a multiple of 1/256
    (0.2 acts as 0.19922, 0.3 as 0.30078, 0.5 is exact). The rest is scaled by the rounded rate, so
    the expected value is exact. Each 32-bit draw gives four bytes.

    Args:
      key: a typed PRNG key, used here only.
      activations: float[...].
      rate: fraction to drop, in [0, 1); may be traced. At most 255/256 are dropped.

    Returns:
      float[...], shape and dtype of `activations`.

    Example:
      >>> import jax
      >>> dropout(jax.random.key(0), jax.numpy.ones((8,)), 0.5).tolist()
      [2.0, 0.0, 2.0, 2.0, 2.0, 0.0, 2.0, 2.0]
    """
    threshold = jnp.clip(jnp.round(256 * jnp.asarray(rate)), 0, 255)
    words = jax.random.bits(key, (-(-activations.size // 4),), jnp.uint32)
    draws = lax.bitcast_convert_type(words, jnp.uint8).reshape(-1)[: activations.size]
    kept = _fence(draws >= threshold.astype(jnp.uint8)).reshape(activations.shape)
    scale = (256 / (256 - threshold)).astype(activations.dtype)
    return jnp.where(kept, activations * scale, 0)


def _by_platform(cpu: Callable, default: Callable, *arrays: jax.Array, **options: Any) -> Any:
    return lax.platform_dependent(
        *arrays,
        cpu=functools.partial(cpu, **options),
        default=functools.partial(default, **options),
    )


def _fence(array: jax.Array) -> jax.Array:
    return _by_platform(fence, lambda array: array, array)


def _pads(images: jax.Array, kernel: jax.Array, padding: Padding) -> Pads:
    """Returns the zeros before and behind the rows and the columns.

    Raises:
      ConfigError: if the images are smaller than the kernel, or empty.
    """
    smallest = kernel.shape[:2] if padding == "VALID" else (1, 1)
    if any(side < least for side, least in zip(images.shape[1:3], smallest, strict=True)):
        raise ConfigError(
            "the images are too small: convolutions and pooling leave nothing of them"
        )
    if padding == "VALID":
        return (0, 0), (0, 0)
    # XLA's "SAME" at stride 1: the odd zero goes behind.
    rows, columns = (((size - 1) // 2, size // 2) for size in kernel.shape[:2])
    return rows, columns


# The plain operations.


def _convolve(images, kernel, *, pads):
    dimensions = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(images, kernel, (1, 1), pads, dimension_numbers=dimensions)


def _convolve_gradients(images, kernel, cotangent, *, pads):
    _, vjp = jax.vjp(functools.partial(_convolve, pads=pads), images, kernel)
    return vjp(cotangent)


def _convolve_max_pool(images, kernel, *, pads):
    outputs = _convolve(images, kernel, pads=pads)
    return lax.reduce_window(outputs, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def _convolve_max_pool_without_winner(images, kernel, *, pads):
    outputs = _convolve_max_pool(images, kernel, pads=pads)
    return outputs, jnp.zeros(outputs.shape, jnp.uint8)  # shape and dtype as on a CPU; unused


def _convolve_max_pool_gradients(images, kernel, winner, cotangent, *, pads):
    del winner
    _, vjp = jax.vjp(functools.partial(_convolve_max_pool, pads=pads), images, kernel)
    return vjp(cotangent)


def _sum_rows(cotangent):
    return cotangent.sum(range(cotangent.ndim - 1))
