"""The layers of the networks, built from the operations of `ops`.

By default kernels are initialized as Keras' `glorot_uniform` and biases with zeros.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from fmnist_jax.nn import ops

Initializer = jax.nn.initializers.Initializer
Rate = float | jax.Array

glorot_uniform = nn.initializers.glorot_uniform()  # Keras' default, Glorot and Bengio 2010


class Conv(nn.Module):
    """Convolution, optional 2x2 max pooling, bias, ReLU.

    Bias and ReLU are monotonic, so pooling first gives the same result as pooling last, with a
    quarter of the elements.

    Attributes:
      in_channels: input channels of the kernel; None takes those of the images. With grey images, a
        kernel of three channels acts as on three equal channels: its channels are summed.
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

    Training normalizes with the statistics of the batch, or of each microbatch. Evaluation uses
    their moving averages, the collection "batch_stats".

    Attributes:
      momentum: decay of the moving averages per microbatch. For eight microbatches 0.95 is 0.66 per
        step; airbench94 uses 0.6.
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
    """`ops.dropout` with a key from the "dropout" stream; the `rate` of a call takes precedence."""

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, rate: Rate | None = None) -> jax.Array:
        if not train:
            return x
        return ops.dropout(self.make_rng("dropout"), x, self.rate if rate is None else rate)


def flatten(x: jax.Array) -> jax.Array:
    """Flattens float[batch, ...] to float[batch, features], channels fastest, as in Keras."""
    return x.reshape(x.shape[0], -1)


def resize(images: jax.Array, side: int) -> jax.Array:
    """Resizes float[batch, height, width, channels] bilinearly to height and width `side`."""
    batch, height, width, channels = images.shape
    if (height, width) == (side, side):
        return images
    return jax.image.resize(images, (batch, side, side, channels), "bilinear")
