"""Convolution, pooling, dense product, bias, batch normalization and dropout, fast inside a loop.

GPUs and TPUs run the plain XLA operations of this module, CPUs those of `cpu`. Both return the same
values up to rounding.

All but `normalize` and `dropout` are `custom_vjp` functions. Reverse mode, `vmap` and `jit`
compose; forward mode (`jvp`) is not supported.
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
Arrays = tuple[jax.Array, ...]

_NORM_EPSILON = 1e-5  # PyTorch's default; Keras uses 1e-3, airbench94 1e-12.


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def conv2d(images: jax.Array, kernel: jax.Array, padding: Padding) -> jax.Array:
    """Cross-correlates images with a kernel, stride 1.

    Args:
      images: float[batch, height, width, channels].
      kernel: float[kernel_height, kernel_width, channels, features].
      padding: "SAME" keeps height and width, "VALID" uses no padding.

    Returns:
      float[batch, out_height, out_width, features].

    Raises:
      ConfigError: if the images are smaller than the kernel, or empty.

    Example:
      >>> import jax.numpy as jnp
      >>> conv2d(jnp.ones((1, 4, 4, 1)), jnp.ones((3, 3, 1, 2)), "VALID").shape
      (1, 2, 2, 2)
    """
    pads = _pads(images, kernel, padding)
    return _by_platform(cpu.convolve, cpu.xla_convolve, images, kernel, pads=pads)


def _conv2d_forward(
    images: jax.Array, kernel: jax.Array, padding: Padding
) -> tuple[jax.Array, Arrays]:
    images = _fence(images)
    return _fence(conv2d(images, kernel, padding)), (images, kernel)


def _conv2d_backward(padding: Padding, residuals: Arrays, cotangent: jax.Array) -> Arrays:
    images, kernel = residuals
    arrays = images, kernel, _fence(cotangent)
    pads = _pads(images, kernel, padding)
    return _by_platform(cpu.convolve_gradients, _convolve_gradients, *arrays, pads=pads)


conv2d.defvjp(_conv2d_forward, _conv2d_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def conv2d_max_pool(images: jax.Array, kernel: jax.Array, padding: Padding) -> jax.Array:
    """Applies `conv2d`, then 2x2 max pooling with stride 2.

    An odd last row or column is dropped. If values tie, the gradient goes to the first in reading
    order, as in TensorFlow and PyTorch. On a CPU, with outputs of 20 x 20 or more, the outputs of
    equal non-zero patches may differ by rounding; they do not tie then.

    Args:
      images: float[batch, height, width, channels].
      kernel: float[kernel_height, kernel_width, channels, features].
      padding: "SAME" keeps height and width before pooling, "VALID" uses no padding.

    Returns:
      float[batch, out_height // 2, out_width // 2, features].

    Raises:
      ConfigError: if the outputs of `conv2d` have less than 2 x 2 pixels.

    Example:
      >>> import jax.numpy as jnp
      >>> images = jnp.arange(25.0).reshape(1, 5, 5, 1)
      >>> conv2d_max_pool(images, jnp.ones((1, 1, 1, 1)), "VALID")[0, :, :, 0].tolist()
      [[6.0, 8.0], [16.0, 18.0]]
    """
    return _conv2d_max_pool_forward(images, kernel, padding)[0]


def _conv2d_max_pool_forward(
    images: jax.Array, kernel: jax.Array, padding: Padding
) -> tuple[jax.Array, Arrays]:
    images = _fence(images)
    pads = _pads(images, kernel, padding, smallest=2)
    outputs, winner = _by_platform(
        cpu.convolve_max_pool, _convolve_max_pool_without_winner, images, kernel, pads=pads
    )
    return outputs, (images, kernel, winner)


def _conv2d_max_pool_backward(padding: Padding, residuals: Arrays, cotangent: jax.Array) -> Arrays:
    images, kernel, winner = residuals
    arrays = images, kernel, winner, _fence(cotangent)
    pads = _pads(images, kernel, padding)
    return _by_platform(
        cpu.convolve_max_pool_gradients, _convolve_max_pool_gradients, *arrays, pads=pads
    )


conv2d_max_pool.defvjp(_conv2d_max_pool_forward, _conv2d_max_pool_backward)


@jax.custom_vjp
def global_max_pool(activations: jax.Array) -> jax.Array:
    """Takes the maximum over height and width.

    If values tie, the gradient goes to the first in reading order. JAX's gradient of a maximum
    compares the maximum with recomputed activations. If XLA rounds these differently, none is
    equal, and that gradient is 0 / 0.

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


def _global_max_pool_forward(
    activations: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, tuple[int, ...]]]:
    pixels = _fence(activations).reshape(activations.shape[0], -1, activations.shape[-1])
    return pixels.max(axis=1), (jnp.argmax(pixels, axis=1), activations.shape)


def _global_max_pool_backward(
    residuals: tuple[jax.Array, tuple[int, ...]], cotangent: jax.Array
) -> Arrays:
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


def _matmul_forward(inputs: jax.Array, kernel: jax.Array) -> tuple[jax.Array, Arrays]:
    return matmul(inputs, kernel), (inputs, kernel)


def _matmul_backward(residuals: Arrays, cotangent: jax.Array) -> Arrays:
    inputs, kernel = residuals
    # XLA:CPU multiplies few rows with a transposed matrix slowly: 60 GFLOP/s for [32, 256] and
    # [1568, 256], against 150 GFLOP/s with the transpose stored, including the transposition.
    transposed = _by_platform(fenced_transpose, jnp.transpose, kernel)
    return cotangent @ transposed, inputs.T @ cotangent


matmul.defvjp(_matmul_forward, _matmul_backward)


@jax.custom_vjp
def add_bias(activations: jax.Array, bias: jax.Array) -> jax.Array:
    """Adds one bias to each feature.

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


def _add_bias_forward(activations: jax.Array, bias: jax.Array) -> tuple[jax.Array, None]:
    return add_bias(activations, bias), None


def _add_bias_backward(_: None, cotangent: jax.Array) -> Arrays:
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
      bias: float[features], the mean of the outputs.

    Returns:
      The outputs, float[..., features], and mean and variance of the activations, float32[features]
      each. No gradient passes through mean and variance, which are for moving averages.

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
    """Returns the outputs of `batch_norm` for a given mean and variance, float32[features]."""
    mean, slope, bias = (
        _like(values, activations)
        for values in (mean, scale * lax.rsqrt(var + _NORM_EPSILON), bias)
    )
    return (activations - mean) * slope + bias


def _batch_norm_forward(
    activations: jax.Array, scale: jax.Array, bias: jax.Array
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], Arrays]:
    activations = _fence(activations)
    mean = _mean_rows(activations)
    var = _mean_rows(jnp.square(activations - _like(mean, activations)))
    outputs = normalize(activations, mean, var, scale, bias)
    return (outputs, mean, var), (activations, mean, var, scale)


def _batch_norm_backward(residuals: Arrays, cotangents: Arrays) -> Arrays:
    activations, mean, var, scale = residuals
    cotangent = _fence(cotangents[0])
    normalized = normalize(activations, mean, var, jnp.ones_like(mean), jnp.zeros_like(mean))
    # The gradients of bias and scale, divided by the number of rows.
    bias_mean = _mean_rows(cotangent)
    scale_mean = _mean_rows(cotangent * normalized)
    bias_part, scale_part, slope = (
        _like(values, cotangent)
        for values in (bias_mean, scale_mean, scale * lax.rsqrt(var + _NORM_EPSILON))
    )
    gradient = slope * (cotangent - bias_part - normalized * scale_part)
    rows = cotangent.size // cotangent.shape[-1]
    return gradient, *((rows * m).astype(scale.dtype) for m in (scale_mean, bias_mean))


batch_norm.defvjp(_batch_norm_forward, _batch_norm_backward)


def _mean_rows(array: jax.Array) -> jax.Array:
    """Returns float32[features], the mean over all axes but the last."""
    sums = _by_platform(cpu.sum_rows, _sum_rows, array.astype(jnp.float32))
    return sums / (array.size // array.shape[-1])


def _like(values: jax.Array, array: jax.Array) -> jax.Array:
    """Casts and reshapes one value per feature to the dtype and the rank of the array."""
    return values.astype(array.dtype).reshape((1,) * (array.ndim - 1) + values.shape)


def dropout(key: jax.Array, activations: jax.Array, rate: float | jax.Array) -> jax.Array:
    """Sets a random fraction of the activations to zero and scales up the rest.

    Each activation uses one random byte, a quarter of a 32-bit draw. The rate is therefore rounded
    to a multiple of 1/256: 0.2 becomes 0.19922, 0.3 becomes 0.30078, 0.5 is exact. The scale uses
    the rounded rate, so the expected value is exact.

    Args:
      key: a typed PRNG key.
      activations: float[...].
      rate: fraction to drop, in [0, 1); may be traced. At most 255/256 are dropped.

    Returns:
      float[...], with the shape and dtype of `activations`.

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


def _by_platform(fast: Callable, plain: Callable, *arrays: jax.Array, **options: Any) -> Any:
    """Calls `fast` on CPUs and `plain` on other platforms."""
    return lax.platform_dependent(
        *arrays, cpu=functools.partial(fast, **options), default=functools.partial(plain, **options)
    )


def _fence(array: jax.Array) -> jax.Array:
    return _by_platform(fence, lambda array: array, array)


def _pads(images: jax.Array, kernel: jax.Array, padding: Padding, *, smallest: int = 1) -> Pads:
    """Returns the zero padding of a convolution.

    Raises:
      ConfigError: if height or width of the outputs is less than `smallest`.
    """
    pads = (0, 0), (0, 0)
    if padding == "SAME":
        # As XLA at stride 1: the odd zero is added at the bottom and on the right.
        height, width = kernel.shape[:2]
        pads = ((height - 1) // 2, height // 2), ((width - 1) // 2, width // 2)
    if min(cpu.out_shape(images, kernel, pads)) < smallest:
        raise ConfigError("the images are too small: convolutions and pooling leave no pixels")
    return pads


# The plain operations.


def _convolve_gradients(
    images: jax.Array, kernel: jax.Array, cotangent: jax.Array, *, pads: Pads
) -> Arrays:
    _, vjp = jax.vjp(functools.partial(cpu.xla_convolve, pads=pads), images, kernel)
    return vjp(cotangent)


def _convolve_max_pool(images: jax.Array, kernel: jax.Array, *, pads: Pads) -> jax.Array:
    outputs = cpu.xla_convolve(images, kernel, pads=pads)
    return lax.reduce_window(outputs, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def _convolve_max_pool_without_winner(
    images: jax.Array, kernel: jax.Array, *, pads: Pads
) -> tuple[jax.Array, jax.Array]:
    outputs = _convolve_max_pool(images, kernel, pads=pads)
    return outputs, jnp.zeros(outputs.shape, jnp.uint8)  # unused; shape and dtype as on a CPU


def _convolve_max_pool_gradients(
    images: jax.Array, kernel: jax.Array, winner: jax.Array, cotangent: jax.Array, *, pads: Pads
) -> Arrays:
    del winner
    _, vjp = jax.vjp(functools.partial(_convolve_max_pool, pads=pads), images, kernel)
    return vjp(cotangent)


def _sum_rows(cotangent: jax.Array) -> jax.Array:
    return cotangent.sum(range(cotangent.ndim - 1))
