"""The networks of the five Keras projects, and all networks by name.

Every network maps images, float32[batch, height, width, channels] with values in [0, 1], to logits,
float32[batch, num_classes].

Networks with dropout need `rngs={"dropout": key}` if `train=True`. Their argument `dropout`, which
may be traced, overrides the rates of all layers. Networks with batch normalization have the
collection "batch_stats", which `train=True` updates.
"""

import functools
from collections.abc import Mapping
from inspect import Parameter
from types import MappingProxyType
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from fmnist_jax.errors import ConfigError, first_line
from fmnist_jax.nn.adapters import construct, constructor_parameters
from fmnist_jax.nn.dropout import Dropout, Rate
from fmnist_jax.nn.resnet import ResNet20
from fmnist_jax.nn.sprint import Sprint, SprintNarrow, SprintWide, check_pixels, max_pool

glorot_uniform = nn.initializers.glorot_uniform()  # Keras' default, Glorot and Bengio 2010
he_uniform = nn.initializers.he_uniform()  # He et al. 2015; std sqrt(2 / fan_in)
small_normal = nn.initializers.normal(0.05)  # Keras' "random_normal"

Conv = functools.partial(nn.Conv, kernel_size=(3, 3), padding="VALID", kernel_init=glorot_uniform)
Dense = functools.partial(nn.Dense, kernel_init=glorot_uniform)


class SmallDropout(nn.Module):
    """Three convolutions with dropout; the first kernel is initialized from a normal."""

    num_classes: int = 10

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool, dropout: Rate | None = None) -> jax.Array:
        x = max_pool(nn.relu(Conv(32, kernel_init=small_normal)(images)))
        x = Dropout(0.2)(x, train=train, rate=dropout)
        x = max_pool(nn.relu(Conv(64)(x)))
        x = Dropout(0.2)(x, train=train, rate=dropout)
        x = nn.relu(Conv(128)(x))
        x = Dropout(0.5)(x, train=train, rate=dropout)
        x = nn.relu(Dense(128)(_flatten(x)))
        return Dense(self.num_classes)(x)


class Valid2x2(nn.Module):
    """Two convolutions with 2x2 kernels, unpadded."""

    num_classes: int = 10

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool, dropout: Rate | None = None) -> jax.Array:
        x = max_pool(nn.relu(Conv(64, kernel_size=(2, 2))(images)))
        x = Dropout(0.3)(x, train=train, rate=dropout)
        x = max_pool(nn.relu(Conv(32, kernel_size=(2, 2))(x)))
        x = Dropout(0.3)(x, train=train, rate=dropout)
        x = nn.relu(Dense(256)(_flatten(x)))
        x = Dropout(0.5)(x, train=train, rate=dropout)
        return Dense(self.num_classes)(x)


class Same3x3(nn.Module):
    """Two convolutions with 3x3 kernels, padded."""

    num_classes: int = 10

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool, dropout: Rate | None = None) -> jax.Array:
        x = max_pool(nn.relu(Conv(64, padding="SAME")(images)))
        x = Dropout(0.3)(x, train=train, rate=dropout)
        x = max_pool(nn.relu(Conv(32, padding="SAME")(x)))
        x = Dropout(0.3)(x, train=train, rate=dropout)
        x = nn.relu(Dense(256)(_flatten(x)))
        x = Dropout(0.5)(x, train=train, rate=dropout)
        return Dense(self.num_classes)(x)


class HeStack(nn.Module):
    """Three convolutions in a row, He initialization, no dropout."""

    num_classes: int = 10

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        del train  # the same network in training and evaluation
        x = nn.relu(Conv(64, kernel_init=he_uniform)(images))
        x = nn.relu(Conv(64, kernel_init=he_uniform)(x))
        x = max_pool(nn.relu(Conv(64, kernel_init=he_uniform)(x)))
        x = nn.relu(Dense(128, kernel_init=he_uniform)(_flatten(x)))
        return Dense(self.num_classes)(x)


class DeepAugmented(nn.Module):
    """Four convolutions on large images; grey images act as three equal channels.

    Attributes:
      image_size: height and width to which images are resized bilinearly.
    """

    num_classes: int = 10
    image_size: int = 150

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool, dropout: Rate | None = None) -> jax.Array:
        images = _resize(images, self.image_size)
        first = Conv
        if images.shape[-1] == 1:
            images = jnp.repeat(images, 3, axis=-1)
            first = functools.partial(Conv, conv_general_dilated=_convolve_grey)
        x = max_pool(nn.relu(first(64)(images)))
        x = max_pool(nn.relu(Conv(64)(x)))
        x = max_pool(nn.relu(Conv(128)(x)))
        x = max_pool(nn.relu(Conv(128)(x)))
        x = Dropout(0.5)(_flatten(x), train=train, rate=dropout)
        x = nn.relu(Dense(512)(x))
        return Dense(self.num_classes)(x)


def _flatten(x: jax.Array) -> jax.Array:
    """Flattens float[batch, ...] to float[batch, features], channels fastest, as in Keras."""
    check_pixels(x)
    return x.reshape(x.shape[0], -1)


def _resize(images: jax.Array, side: int) -> jax.Array:
    """Resizes float[batch, height, width, channels] bilinearly to height and width `side`."""
    batch, height, width, channels = images.shape
    if (height, width) == (side, side):
        return images
    return jax.image.resize(images, (batch, side, side, channels), "bilinear")


def _convolve_grey(images: jax.Array, kernel: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
    """Convolves equal channels: one of them with the sum of the kernel over the channels."""
    kernel = kernel.sum(axis=2, keepdims=True)
    return lax.conv_general_dilated(images[..., :1], kernel, *args, **kwargs)


ARCHS: Mapping[str, type[nn.Module]] = MappingProxyType(
    {
        "small_dropout": SmallDropout,
        "valid_2x2": Valid2x2,
        "same_3x3": Same3x3,
        "he_stack": HeStack,
        "deep_augmented": DeepAugmented,
        "sprint": Sprint,
        "sprint_narrow": SprintNarrow,
        "sprint_wide": SprintWide,
        "resnet20": ResNet20,
    }
)


def create_model(arch: Any, num_classes: int = 10, **options: Any) -> Any:
    """Creates a network by name, or from a class of your own.

    Args:
      arch: a key of `ARCHS`; or a class of Flax Linen, Flax NNX, Equinox or Haiku modules, or a
        function that returns a model.
      num_classes: number of logits, at least 2. A class or function without this parameter does
        not receive it.
      **options: other arguments, such as `image_size` of "deep_augmented". Values must be hashable.

    Returns:
      A model for `StepConfig`: a Linen module, or an object with `init` and `apply`.

    Raises:
      ConfigError: if the network or an option is unknown, or `num_classes` is less than 2.

    Example:
      >>> create_model("deep_augmented", num_classes=3, image_size=64)
      DeepAugmented(
          # attributes
          num_classes = 3
          image_size = 64
      )
    """
    target = ARCHS.get(arch) if isinstance(arch, str) else arch
    if target is None:
        raise ConfigError(f"unknown architecture {arch!r}; choose one of {', '.join(ARCHS)}")
    if num_classes < 2:
        raise ConfigError(f"num_classes is {num_classes}; it must be at least 2")
    name = arch if isinstance(arch, str) else getattr(arch, "__name__", str(arch))
    if not callable(target):
        raise ConfigError(f"{name} is neither a class of modules nor a function; pass one of them")
    parameters = constructor_parameters(target)
    if "num_classes" in parameters:
        options = {"num_classes": num_classes} | options
    takes_any = any(parameter.kind is Parameter.VAR_KEYWORD for parameter in parameters.values())
    if (unknown := set(options) - set(parameters)) and not takes_any:
        raise ConfigError(
            f"{name} takes no such option: {', '.join(sorted(unknown))}; it takes "
            f"{', '.join(parameters) or 'none'}"
        )
    try:
        return construct(target, options)
    except TypeError as error:
        raise ConfigError(f"{name} cannot be constructed: {first_line(error)}") from error
