"""Convolution, max pooling and dropout whose gradients stay fast inside a compiled loop.

The values are those of the plain XLA operations, which a GPU or TPU gets as they are. On a CPU the
gradients are written in the one form that XLA:CPU computes with a fast routine inside a loop: a
convolution of NHWC input with HWIO kernel to NHWC output, without reversal or dilation. What JAX
derives by itself is not in that form and runs in naive loops there (jax issue 12868; measured 1.8
against 55 to 220 GFLOP/s).

The rules are `custom_vjp`: reverse mode, `vmap` and `jit` compose; forward mode (`jvp`) does not.
"""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

Padding = Literal["SAME", "VALID"]
Pads = list[tuple[int, int]]

_CANONICAL = ("NHWC", "HWIO", "NHWC")


def _convolve(images: jax.Array, kernel: jax.Array, pads: Pads) -> jax.Array:
    return lax.conv_general_dilated(images, kernel, (1, 1), pads, dimension_numbers=_CANONICAL)


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
    return lax.platform_dependent(
        images,
        kernel,
        cpu=functools.partial(_conv2d_cpu, pads=pads),
        default=functools.partial(_convolve, pads=pads),
    )


def _conv2d_forward(images, kernel, padding):
    return conv2d(images, kernel, padding), (images, kernel)


def _conv2d_backward(padding, residuals, cotangent):
    pads = _pads(residuals[1], padding)
    return lax.platform_dependent(
        *residuals,
        cotangent,
        cpu=functools.partial(_conv2d_gradients_cpu, pads=pads),
        default=functools.partial(_conv2d_gradients_plain, pads=pads),
    )


conv2d.defvjp(_conv2d_forward, _conv2d_backward)


def _pads(kernel: jax.Array, padding: Padding) -> Pads:
    if padding == "VALID":
        return [(0, 0), (0, 0)]
    # XLA's "SAME" at stride 1: the odd one goes behind.
    return [((size - 1) // 2, size // 2) for size in kernel.shape[:2]]


def _conv2d_cpu(images, kernel, *, pads):
    if kernel.shape[2] > 1:
        return _convolve(images, kernel, pads)
    # With one channel, XLA's convolution reaches a quarter of this product's rate: 2.2 against
    # 0.55 ms for 32 filters on [128, 28, 28, 1].
    patches = _patches(images, kernel, pads)
    products = patches.reshape(-1, patches.shape[-1]) @ kernel.reshape(-1, kernel.shape[3])
    return products.reshape(*patches.shape[:3], -1)


def _conv2d_gradients_plain(images, kernel, cotangent, *, pads):
    _, vjp = jax.vjp(functools.partial(_convolve, pads=pads), images, kernel)
    return vjp(cotangent)


def _conv2d_gradients_cpu(images, kernel, cotangent, *, pads):
    # d/d images: the cotangent, padded to full overlap, against the kernel turned by 180 degrees.
    turned = jnp.flip(kernel, (0, 1)).swapaxes(2, 3)
    full = [
        (size - 1 - low, size - 1 - high)
        for size, (low, high) in zip(kernel.shape[:2], pads, strict=True)
    ]
    images_gradient = _convolve(cotangent, turned, full)

    # d/d kernel[i, j]: the images shifted by (i, j) against the cotangent, summed over the batch.
    if kernel.shape[2] == 1:
        patches = _patches(images, kernel, pads)
        kernel_gradient = patches.reshape(-1, patches.shape[-1]).T @ cotangent.reshape(
            -1, kernel.shape[3]
        )
        return images_gradient, kernel_gradient.reshape(kernel.shape)
    # As a convolution, the channels are the batch, and the batch the channels that are summed over.
    kernel_gradient = _convolve(images.transpose(3, 1, 2, 0), cotangent.transpose(1, 2, 0, 3), pads)
    return images_gradient, kernel_gradient.transpose(1, 2, 0, 3)


def _patches(images: jax.Array, kernel: jax.Array, pads: Pads) -> jax.Array:
    """float[batch, out_height, out_width, positions of the kernel], from one-channel images."""
    padded = jnp.pad(images, [(0, 0), *pads, (0, 0)])
    rows, columns = kernel.shape[:2]
    height, width = padded.shape[1] - rows + 1, padded.shape[2] - columns + 1
    shifts = [padded[:, i : i + height, j : j + width] for i in range(rows) for j in range(columns)]
    return jnp.concatenate(shifts, axis=-1)


@jax.custom_vjp
def max_pool(images: jax.Array) -> jax.Array:
    """The maximum of each 2x2 window, stride 2; an odd last row or column is left out.

    Where values tie, the gradient goes to the first of them in reading order, as in TensorFlow and
    PyTorch.

    Args:
      images: float[batch, height, width, channels].

    Returns:
      float[batch, height // 2, width // 2, channels].

    Example:
      >>> import jax.numpy as jnp
      >>> max_pool(jnp.arange(25.0).reshape(1, 5, 5, 1))[0, :, :, 0].tolist()
      [[6.0, 8.0], [16.0, 18.0]]
    """
    return lax.platform_dependent(images, cpu=_max_pool_views, default=_max_pool_window)


def _max_pool_window(images):
    return lax.reduce_window(images, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def _views(images):
    """The four corners of every window, in reading order."""
    height, width = images.shape[1] // 2 * 2, images.shape[2] // 2 * 2
    return [images[:, i:height:2, j:width:2] for i in (0, 1) for j in (0, 1)]


def _max_pool_views(images):
    return functools.reduce(jnp.maximum, _views(images))


def _max_pool_forward(images):
    return max_pool(images), images


def _max_pool_backward(images, cotangent):
    return (
        lax.platform_dependent(
            images, cotangent, cpu=_max_pool_gradient_views, default=_max_pool_gradient_window
        ),
    )


def _max_pool_gradient_window(images, cotangent):
    _, vjp = jax.vjp(_max_pool_window, images)
    return vjp(cotangent)[0]


def _max_pool_gradient_views(images, cotangent):
    batch, height, width, channels = images.shape
    top_left, top_right, bottom_left, bottom_right = _views(images)
    top, bottom = jnp.maximum(top_left, top_right), jnp.maximum(bottom_left, bottom_right)
    winner = jnp.where(
        top >= bottom,
        jnp.where(top_left >= top_right, 0, 1),
        jnp.where(bottom_left >= bottom_right, 2, 3),
    ).astype(jnp.uint8)
    position = jnp.arange(4, dtype=jnp.uint8).reshape(1, 1, 2, 1, 2, 1)
    # [batch, rows, 2, columns, 2, channels]: each window next to its own cotangent.
    gradient = jnp.where(
        winner[:, :, None, :, None] == position, cotangent[:, :, None, :, None], 0
    ).reshape(batch, height // 2 * 2, width // 2 * 2, channels)
    return jnp.pad(gradient, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)))


max_pool.defvjp(_max_pool_forward, _max_pool_backward)


def dropout(key: jax.Array, activations: jax.Array, rate: float) -> jax.Array:
    """Sets a random share of the activations to zero and scales up the rest.

    One random byte decides about each activation, so the rate is rounded to a multiple of 1/256
    (0.2 acts as 0.19922, 0.3 as 0.30078, 0.5 is exact); the survivors are scaled by the rounded
    rate, so the expected value is exact. Four bytes come from each 32-bit draw.

    Args:
      key: a typed PRNG key, used here and nowhere else.
      activations: float[...].
      rate: share to drop, in [0, 1).

    Returns:
      float[...], the shape and dtype of `activations`.

    Example:
      >>> import jax
      >>> dropout(jax.random.key(0), jax.numpy.ones((8,)), 0.5).tolist()
      [2.0, 0.0, 2.0, 2.0, 2.0, 0.0, 2.0, 2.0]
    """
    threshold = round(rate * 256)
    words = jax.random.bits(key, (-(-activations.size // 4),), jnp.uint32)
    draws = lax.bitcast_convert_type(words, jnp.uint8).reshape(-1)[: activations.size]
    # The barrier keeps XLA from drawing the bits anew in every fusion that reads the mask.
    kept = lax.optimization_barrier(draws >= threshold).reshape(activations.shape)
    return jnp.where(kept, activations * (256 / (256 - threshold)), 0)
