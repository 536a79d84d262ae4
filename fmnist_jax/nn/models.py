"""The five networks, one class each. This is the only file that imports flax.

Every network maps images, float32[batch, height, width, channels] with values in [0, 1], to logits,
float32[batch, num_classes]. `train=True` turns dropout on and then needs `rngs={"dropout": key}`.
Networks with dropout take `dropout`, one rate for all their layers in place of their own; it may be
traced.
Kernels start as Keras' `glorot_uniform` and biases at zero unless a class says otherwise.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from fmnist_jax.errors import ConfigError
from fmnist_jax.nn import ops

Initializer = jax.nn.initializers.Initializer
Rate = float | jax.Array

glorot_uniform = nn.initializers.glorot_uniform()  # Keras' default, Glorot and Bengio 2010
he_uniform = nn.initializers.he_uniform()  # He et al. 2015; std sqrt(2 / fan_in)
small_normal = nn.initializers.normal(0.05)  # Keras' "random_normal"


class SmallDropout(nn.Module):
    """Three convolutions with dropout, the first filters drawn from a normal."""

    num_classes: int = 10

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool, dropout: Rate | None = None) -> jax.Array:
        x = Conv(32, pool=True, kernel_init=small_normal)(images)
        x = Dropout(0.2)(x, train=train, rate=dropout)
        x = Conv(64, pool=True)(x)
        x = Dropout(0.2)(x, train=train, rate=dropout)
        x = Conv(128)(x)
        x = Dropout(0.5)(x, train=train, rate=dropout)
        x = nn.relu(Dense(128)(flatten(x)))
        return Dense(self.num_classes)(x)


class Valid2x2(nn.Module):
    """Two convolutions with 2x2 kernels, unpadded."""

    num_classes: int = 10

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool, dropout: Rate | None = None) -> jax.Array:
        x = Conv(64, kernel_size=2, pool=True)(images)
        x = Dropout(0.3)(x, train=train, rate=dropout)
        x = Conv(32, kernel_size=2, pool=True)(x)
        x = Dropout(0.3)(x, train=train, rate=dropout)
        x = nn.relu(Dense(256)(flatten(x)))
        x = Dropout(0.5)(x, train=train, rate=dropout)
        return Dense(self.num_classes)(x)


class Same3x3(nn.Module):
    """Two convolutions with 3x3 kernels, padded."""

    num_classes: int = 10

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool, dropout: Rate | None = None) -> jax.Array:
        x = Conv(64, padding="SAME", pool=True)(images)
        x = Dropout(0.3)(x, train=train, rate=dropout)
        x = Conv(32, padding="SAME", pool=True)(x)
        x = Dropout(0.3)(x, train=train, rate=dropout)
        x = nn.relu(Dense(256)(flatten(x)))
        x = Dropout(0.5)(x, train=train, rate=dropout)
        return Dense(self.num_classes)(x)


class HeStack(nn.Module):
    """Three convolutions in a row, He initialisation, no dropout."""

    num_classes: int = 10

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        del train  # the same network in training and evaluation
        x = Conv(64, kernel_init=he_uniform)(images)
        x = Conv(64, kernel_init=he_uniform)(x)
        x = Conv(64, kernel_init=he_uniform, pool=True)(x)
        x = nn.relu(Dense(128, kernel_init=he_uniform)(flatten(x)))
        return Dense(self.num_classes)(x)


class DeepAugmented(nn.Module):
    """Four convolutions on large images of three channels, which are equal for grey images.

    Attributes:
      image_size: images of another side are resized to it, bilinearly.
    """

    num_classes: int = 10
    image_size: int = 150

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool, dropout: Rate | None = None) -> jax.Array:
        images = resize(images, self.image_size)
        x = Conv(64, pool=True, in_channels=3)(images)
        x = Conv(64, pool=True)(x)
        x = Conv(128, pool=True)(x)
        x = Conv(128, pool=True)(x)
        x = Dropout(0.5)(flatten(x), train=train, rate=dropout)
        x = nn.relu(Dense(512)(x))
        return Dense(self.num_classes)(x)


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


ARCHS: Mapping[str, type[nn.Module]] = MappingProxyType(
    {
        "small_dropout": SmallDropout,
        "valid_2x2": Valid2x2,
        "same_3x3": Same3x3,
        "he_stack": HeStack,
        "deep_augmented": DeepAugmented,
    }
)


def create_model(name: str, num_classes: int = 10, **options: Any) -> nn.Module:
    """Makes a network by name.

    Args:
      name: a key of `ARCHS`.
      num_classes: number of logits, at least 2.
      **options: the network's other attributes, such as `image_size` of "deep_augmented".

    Raises:
      ConfigError: if there is no such network or option.

    Example:
      >>> create_model("deep_augmented", num_classes=3, image_size=64)
      DeepAugmented(
          # attributes
          num_classes = 3
          image_size = 64
      )
    """
    if name not in ARCHS:
        raise ConfigError(f"unknown architecture {name!r}; choose one of {', '.join(ARCHS)}")
    if num_classes < 2:
        raise ConfigError(f"num_classes is {num_classes}; it must be at least 2")
    try:
        return ARCHS[name](num_classes=num_classes, **options)
    except TypeError as error:
        raise ConfigError(f"{name} takes no such option: {', '.join(options)}") from error
