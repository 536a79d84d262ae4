"""The layers of the networks, on the operations of `ops`.

Kernels start as Keras' `glorot_uniform` and biases at zero unless a layer says otherwise.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from fmnist_jax.errors import ConfigError
from fmnist_jax.nn import ops

Initializer = jax.nn.initializers.Initializer
Rate = float | jax.Array

glorot_uniform = nn.initializers.glorot_uniform()  # Keras' default, Glorot and Bengio 2010


class Conv(nn.Module):
    """Convolution, optional 2x2 max pool, bias, ReLU.

    Bias and ReLU never change which of four values is the largest, so pooling first gives what
    pooling last gives, on a quarter of the elements.

    Attributes:
      in_channels: the kernel's input channels where they differ from the images'. A kernel of three
        channels over one grey image repeated three times is the sum of its channels over the image.
    """

    features: int
    kernel_size: int = 3
    padding: ops.Padding = "VALID"
    pool: bool = False
    in_channels: int | None = None
    kernel_init: Initializer = glorot_uniform

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        channels = self.in_channels or images.shape[-1]
        shape = (self.kernel_size, self.kernel_size, channels, self.features)
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        if images.shape[-1] == 1:
            kernel = kernel.sum(axis=2, keepdims=True)
        convolve = ops.conv2d_max_pool if self.pool else ops.conv2d
        x = convolve(images, kernel, self.padding)
        return nn.relu(ops.add_bias(x, bias))


class Dense(nn.Module):
    """Dense layer with bias."""

    features: int
    kernel_init: Initializer = glorot_uniform

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        return ops.add_bias(ops.matmul(x, kernel), bias)


class BatchNorm(nn.Module):
    """Batch normalization over all axes but the last (Ioffe and Szegedy 2015).

    In training each feature has mean 0 and variance 1 over the batch, or over the microbatch where
    a step has several. The collection "batch_stats" holds moving averages for evaluation.

    Attributes:
      momentum: share of the old average that is retained. 0.95 for each of eight microbatches is
        0.66 a step; airbench94 has 0.6.
      use_scale: whether each feature is multiplied by a parameter.
    """

    momentum: float = 0.95
    use_scale: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        shape = x.shape[-1:]
        scale = jnp.ones(shape, jnp.float32)
        if self.use_scale:
            scale = self.param("scale", nn.initializers.ones, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        if not train:
            return ops.normalize(x, mean.value, var.value, scale, bias)
        outputs, batch_mean, batch_var = ops.batch_norm(x, scale, bias)
        mean.value = self.momentum * mean.value + (1 - self.momentum) * batch_mean
        var.value = self.momentum * var.value + (1 - self.momentum) * batch_var
        return outputs


class Dropout(nn.Module):
    """`ops.dropout` with a key from the "dropout" stream, at its own rate or the one given."""

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, rate: Rate | None = None) -> jax.Array:
        if not train:
            return x
        return ops.dropout(self.make_rng("dropout"), x, self.rate if rate is None else rate)


def flatten(x: jax.Array) -> jax.Array:
    """float[batch, ...] to float[batch, features], channels fastest, as in Keras."""
    if 0 in x.shape[1:]:
        raise ConfigError(
            "the images are too small: convolutions and pooling leave nothing of them"
        )
    return x.reshape(x.shape[0], -1)


def resize(images: jax.Array, side: int) -> jax.Array:
    """float[batch, height, width, channels] to float[batch, side, side, channels], bilinearly."""
    batch, height, width, channels = images.shape
    if (height, width) == (side, side):
        return images
    return jax.image.resize(images, (batch, side, side, channels), "bilinear")
