"""One network in four frameworks, with batch statistics and dropout, and further parts of a user.

`python -m fmnist_jax run --arch tests/nets.py:LinenNet` trains it.
"""

import dataclasses
import functools

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import optax
from flax import nnx

MOMENTUM = 0.9


class LinenNet(nn.Module):
    num_classes: int = 10
    width: int = 4
    rate: float = 0.2

    @nn.compact
    def __call__(self, images, *, train):
        x = nn.Conv(self.width, (3, 3), strides=2, padding="VALID")(images)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=MOMENTUM)(x))
        x = nn.Dropout(self.rate, deterministic=not train)(x)
        return nn.Dense(self.num_classes)(x.mean(axis=(1, 2)))


class NnxNet(nnx.Module):
    def __init__(self, num_classes=10, width=4, rate=0.2, *, rngs):
        self.conv = nnx.Conv(1, width, (3, 3), strides=2, padding="VALID", rngs=rngs)
        self.norm = nnx.BatchNorm(width, momentum=MOMENTUM, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs)
        self.dense = nnx.Linear(width, num_classes, rngs=rngs)

    def __call__(self, images):
        x = self.dropout(nnx.relu(self.norm(self.conv(images))))
        return self.dense(x.mean(axis=(1, 2)))


class EquinoxNet(eqx.Module):
    layers: list
    norm: eqx.nn.BatchNorm
    dropout: eqx.nn.Dropout

    def __init__(self, num_classes=10, width=4, rate=0.2, *, key):
        first, second = jax.random.split(key)
        self.layers = [
            eqx.nn.Conv2d(1, width, 3, stride=2, key=first),
            eqx.nn.Linear(width, num_classes, key=second),
        ]
        self.norm = eqx.nn.BatchNorm(width, axis_name="batch", mode="batch", momentum=MOMENTUM)
        self.dropout = eqx.nn.Dropout(rate)

    def __call__(self, image, state, *, key=None):
        x, state = self.norm(self.layers[0](image), state)
        x = self.dropout(jax.nn.relu(x), key=key)
        return self.layers[1](x.mean(axis=(1, 2))), state


class HaikuNet(hk.Module):
    def __init__(self, num_classes=10, width=4, rate=0.2, name=None):
        super().__init__(name)
        self.num_classes, self.width, self.rate = num_classes, width, rate

    def __call__(self, images, train):
        x = hk.Conv2D(self.width, 3, stride=2, padding="VALID")(images)
        x = jax.nn.relu(hk.BatchNorm(True, True, MOMENTUM)(x, train))
        if train:
            x = hk.dropout(hk.next_rng_key(), self.rate, x)
        return hk.Linear(self.num_classes)(x.mean(axis=(1, 2)))


NETS = (LinenNet, NnxNet, EquinoxNet, HaikuNet)


def focal_loss(logits, labels, gamma=2.0):
    """Lin et al. 2017."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return (1 - jnp.exp(-losses)) ** gamma * losses


@functools.partial(jax.jit, static_argnames="gamma")
def jitted_loss(logits, labels, gamma=2.0):
    return focal_loss(logits, labels, gamma)


def wider(num_classes, **options):
    """A function with arguments that it passes on."""
    return LinenNet(num_classes, width=2 * options.pop("width"), **options)


def clipped_adamw(learning_rate, weight_decay=1e-4, norm=1.0):
    return optax.chain(
        optax.clip_by_global_norm(norm), optax.adamw(learning_rate, weight_decay=weight_decay)
    )


@dataclasses.dataclass(frozen=True)
class Brighten:
    """Adds a random constant to each image."""

    most: float = 0.1

    def __call__(self, key, epoch, examples, images, strength):
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, epoch), examples)
        shift = strength * self.most * jax.vmap(jax.random.uniform)(keys)
        pixels = images[..., None].astype(jnp.float32) / 255
        return jnp.minimum(pixels + shift[:, None, None, None], 1)


def square_root(progress):
    """A schedule."""
    return jnp.sqrt(1 - progress)
