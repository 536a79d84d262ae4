# ruff: noqa: D102 (`__call__` is described by its class)
"""The networks in Flax Linen.

They map images, float32[batch, 28, 28, 1], to logits, float32[batch, 10].
"""

import functools

import flax.linen as nn
import jax

from networks import ARCHS


class MLP(nn.Module):
    """Two hidden layers."""

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        x = images.reshape(len(images), -1)
        x = nn.relu(nn.Dense(512)(x))
        x = nn.relu(nn.Dense(512)(x))
        return nn.Dense(10)(x)


class LeNet5(nn.Module):
    """LeNet-5 (LeCun et al. 1998) with plain average pools and dense second convolution."""

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        x = nn.tanh(nn.Conv(6, (5, 5))(images))
        x = nn.avg_pool(x, (2, 2), (2, 2))
        x = nn.tanh(nn.Conv(16, (5, 5), padding="VALID")(x))
        x = nn.avg_pool(x, (2, 2), (2, 2))
        x = x.reshape(len(x), -1)
        x = nn.tanh(nn.Dense(120)(x))
        x = nn.tanh(nn.Dense(84)(x))
        return nn.Dense(10)(x)


class SmallResNet(nn.Module):
    """Three residual blocks with batch normalization (He et al. 2015)."""

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        conv = functools.partial(nn.Conv, use_bias=False)
        norm = functools.partial(nn.BatchNorm, use_running_average=not train)
        x = nn.relu(norm()(conv(16, (3, 3))(images)))
        for features, stride in ((16, 1), (32, 2), (64, 2)):
            y = nn.relu(norm()(conv(features, (3, 3), stride)(x)))
            y = norm()(conv(features, (3, 3))(y))
            if x.shape != y.shape:
                x = conv(features, (1, 1), stride)(x)
            x = nn.relu(x + y)
        return nn.Dense(10)(x.mean((1, 2)))


class MobileNetLike(nn.Module):
    """Depthwise separable convolutions (Howard et al. 2017) without normalization."""

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        x = nn.relu(nn.Conv(32, (3, 3), 2)(images))
        for features in (64, 64, 128):
            channels = x.shape[-1]
            x = nn.relu(nn.Conv(channels, (3, 3), feature_group_count=channels)(x))
            x = nn.relu(nn.Conv(features, (1, 1))(x))
        return nn.Dense(10)(x.mean((1, 2)))


class ConvNeXtLike(nn.Module):
    """Three blocks of ConvNeXt (Liu et al. 2022) without layer scale."""

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        x = nn.Conv(48, (2, 2), 2)(images)
        for _ in range(3):
            y = nn.Conv(48, (7, 7), feature_group_count=48)(x)
            y = nn.gelu(nn.Dense(192)(nn.LayerNorm()(y)))
            x = x + nn.Dense(48)(y)
        return nn.Dense(10)(x.mean((1, 2)))


class SmallViT(nn.Module):
    """A pre-norm vision transformer on 49 patches (Dosovitskiy et al. 2020), with mean pooling."""

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        x = nn.Conv(64, (4, 4), 4)(images).reshape(len(images), 49, 64)
        x = x + self.param("positions", nn.initializers.normal(0.02), (1, 49, 64))
        for _ in range(4):
            x = x + nn.MultiHeadDotProductAttention(4)(nn.LayerNorm()(x))
            y = nn.gelu(nn.Dense(256)(nn.LayerNorm()(x)))
            x = x + nn.Dense(64)(y)
        return nn.Dense(10)(nn.LayerNorm()(x).mean(1))


# In the order of ARCHS.
_CLASSES = (MLP, LeNet5, SmallResNet, MobileNetLike, ConvNeXtLike, SmallViT)


def create(arch: str) -> nn.Module:
    """Returns a network."""
    return _CLASSES[ARCHS.index(arch)]()
