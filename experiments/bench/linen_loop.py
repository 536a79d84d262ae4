"""Plain flax.linen and optax: a jitted step with donated state in a Python loop.

Only the augmentation is that of fmnist_jax.
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from networks import ARCHS, flax_networks
from worker import AUGMENTED, NETWORKS, OPTIMIZERS, Case, Conv, Dense, Dropout, Layers, Trained

from fmnist_jax.data.augment import RandomAffine

INITIALIZERS = {
    "glorot_uniform": nn.initializers.glorot_uniform(),
    "he_uniform": nn.initializers.he_uniform(),
    "normal_0.05": nn.initializers.normal(0.05),
}
MAKERS: dict[str, Callable[[float], optax.GradientTransformation]] = {
    "adam": functools.partial(optax.adam, eps=1e-7),
    "rmsprop": functools.partial(optax.rmsprop, decay=0.9, eps=1e-7),
    "sgd": optax.sgd,
}


class Network(nn.Module):
    """A sequence of layers; parameters are named as in `fmnist_jax.nn.models`.

    Attributes:
      layers: their descriptions.
      channels: of the first layer's input; grey images are repeated.
      dropout: the class of the dropout layers.
    """

    layers: Layers
    channels: int = 1
    dropout: Callable[..., nn.Module] = nn.Dropout

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps float32[batch, height, width, 1] to float32[batch, classes]."""
        x = jnp.repeat(x, self.channels, axis=-1)
        for layer in self.layers:
            match layer:
                case Conv(features, size, padding, pool, init):
                    x = nn.Conv(
                        features, (size, size), padding=padding.upper(),
                        kernel_init=INITIALIZERS[init],
                    )(x)  # fmt: skip
                    x = nn.relu(x)
                    x = nn.max_pool(x, (2, 2), (2, 2)) if pool else x
                case Dropout(rate):
                    x = self.dropout(rate)(x, deterministic=not train)
                case Dense(features, relu, init):
                    x = x.reshape(len(x), -1)
                    x = nn.Dense(features, kernel_init=INITIALIZERS[init])(x)
                    x = nn.relu(x) if relu else x
        return x


def create(case: Case, dropout: Callable[..., nn.Module] = nn.Dropout) -> nn.Module:
    """Returns the network of a case in stock Flax."""
    if case.arch in ARCHS:
        return flax_networks.create(case.arch)
    return Network(NETWORKS[case.arch], case.input_shape[-1], dropout)


def init(model: nn.Module, case: Case) -> tuple[Any, Any]:
    """Draws the parameters and the other variables, {} if there are none."""
    variables = model.init(jax.random.key(0), jnp.zeros((1, *case.input_shape[:2], 1)), train=False)
    return variables.pop("params"), variables


def mean_loss(
    model: nn.Module,
    params: Any,
    model_state: Any,
    images: jax.Array,
    labels: jax.Array,
    key: jax.Array,
) -> tuple[jax.Array, Any]:
    """Returns the mean cross-entropy of a batch, with dropout, and the next `model_state`."""
    logits, model_state = model.apply(
        {"params": params, **model_state}, images, train=True, rngs={"dropout": key},
        mutable=list(model_state),
    )  # fmt: skip
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), model_state


class Competitor:
    """A training loop."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, case: Case) -> None:
        self.data = jnp.asarray(images), jnp.asarray(labels)
        self.batches = _batches(len(labels), case.batch_size)
        name, rate = OPTIMIZERS[case.arch]
        model, tx = create(case), MAKERS[name](rate)
        augmentation = RandomAffine(keras_shear=True, image_size=case.input_shape[0])
        params, model_state = init(model, case)
        self.state = params, model_state, tx.init(params), jax.random.key(1)

        @functools.partial(jax.jit, donate_argnums=0)
        def step(state, examples, data):
            params, model_state, opt_state, key = state
            key, augment_key, dropout_key = jax.random.split(key, 3)
            images, labels = data[0][examples], data[1][examples]
            if case.arch == AUGMENTED:
                pixels = augmentation(augment_key, jnp.int32(0), examples, images)
            else:
                pixels = images[..., None].astype(jnp.float32) / 255
            (loss, model_state), grads = jax.value_and_grad(mean_loss, argnums=1, has_aux=True)(
                model, params, model_state, pixels, labels, dropout_key
            )
            updates, opt_state = tx.update(grads, opt_state, params)
            params = optax.apply_updates(params, updates)
            return (params, model_state, opt_state, key), loss

        self._step = step

    def train(self, num_steps: int) -> Trained:
        """Trains (see `worker`)."""
        losses = []
        for examples in itertools.islice(self.batches, num_steps):
            self.state, loss = self._step(self.state, examples, self.data)
            losses.append(loss)
        return Trained(num_steps, float(np.mean(jax.device_get(losses))))


def _batches(num_images: int, batch_size: int) -> Iterator[np.ndarray]:
    generator = np.random.default_rng(0)
    while True:
        yield from generator.permutation(num_images).astype(np.int32).reshape(-1, batch_size)
