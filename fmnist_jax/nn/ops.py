"""Convolution, max pooling, dense product, bias and dropout, fast inside a compiled loop.

GPUs and TPUs compute the plain XLA operations, which this module holds; CPUs compute the forms in
`cpu`. Both return the same values up to rounding.

Convolution, pooling, product and bias are `custom_vjp` functions: reverse mode, `vmap` and `jit`
compose, forward mode (`jvp`) is not supported.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax

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
    return _by_platform(cpu.convolve, _convolve, images, kernel, pads=_pads(kernel, padding))


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
        pads=_pads(kernel, padding),
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
        pads=_pads(kernel, padding),
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
        pads=_pads(kernel, padding),
    )


conv2d_max_pool.defvjp(_conv2d_max_pool_forward, _conv2d_max_pool_backward)


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
    return activations + bias.reshape((1,) * (activations.ndim - 1) + bias.shape)


def _add_bias_forward(activations, bias):
    return add_bias(activations, bias), None


def _add_bias_backward(_, cotangent):
    return cotangent, _by_platform(cpu.sum_rows, _sum_rows, cotangent)


add_bias.defvjp(_add_bias_forward, _add_bias_backward)


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


def _pads(kernel: jax.Array, padding: Padding) -> Pads:
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
