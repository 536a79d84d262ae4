"""ResNet-20 (He et al. 2016) for 28 x 28 images."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

glorot_uniform = nn.initializers.glorot_uniform()
he_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")  # He et al. 2015


class ResNet20(nn.Module):
    """Three stages of three residual blocks with 16, 32 and 64 filters, global mean pooling.

    The first block of the second and third stage has stride 2. Its shortcut takes every second
    pixel and pads the new channels with zeros (option A of the paper).
    """

    num_classes: int = 10

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        x = nn.relu(NormConv(16)(images, train=train))
        for stage, width in enumerate((16, 32, 64)):
            for block in range(3):
                stride = 2 if stage > 0 and block == 0 else 1
                x = Block(width, stride)(x, train=train)
        return nn.Dense(self.num_classes, kernel_init=glorot_uniform)(x.mean(axis=(1, 2)))


class Block(nn.Module):
    """Residual block of two convolutions."""

    features: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        shortcut = _strided(x, self.stride)
        channels = self.features - x.shape[-1]
        shortcut = jnp.pad(shortcut, [(0, 0)] * 3 + [(channels // 2, channels - channels // 2)])
        y = nn.relu(NormConv(self.features, self.stride)(x, train=train))
        y = NormConv(self.features)(y, train=train)
        return nn.relu(shortcut + y)


class NormConv(nn.Module):
    """3x3 convolution, padded and without bias, then batch normalization with a scale."""

    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        shape = (3, 3, x.shape[-1], self.features)
        kernel = self.param("kernel", he_normal, shape, jnp.float32)
        strides, pads = (self.stride,) * 2, ((1, 1), (1, 1))
        dimensions = ("NHWC", "HWIO", "NHWC")
        x = lax.conv_general_dilated(x, kernel, strides, pads, dimension_numbers=dimensions)
        return nn.BatchNorm(use_running_average=not train, momentum=0.95)(x)


def _strided(x: jax.Array, stride: int) -> jax.Array:
    # Indexing would become a gather if the batch size is symbolic.
    return lax.slice(x, (0, 0, 0, 0), x.shape, (1, stride, stride, 1))
