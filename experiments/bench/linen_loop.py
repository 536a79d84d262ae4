"""Plain flax.linen and optax: a jitted step with donated state in a Python loop, or a scan.

Only the augmentation is that of fmnist_jax.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from worker import AUGMENTED, NETWORKS, OPTIMIZERS, Case, Conv, Dense, Dropout, Layers, Trained

from fmnist_jax.data.augment import RandomAffine

INITIALIZERS = {
    "glorot_uniform": nn.initializers.glorot_uniform(),
    "he_uniform": nn.initializers.he_uniform(),
    "normal_0.05": nn.initializers.normal(0.05),
}


class Network(nn.Module):
    """A sequence of layers; parameters are named as in `fmnist_jax.nn.models`."""

    layers: Layers
    dropout: Callable[..., nn.Module] = nn.Dropout

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Maps float32[batch, height, width, channels] to float32[batch, classes]."""
        for layer in self.layers:
            match layer:
                case Conv():
                    x = nn.relu(
                        nn.Conv(
                            layer.features,
                            (layer.kernel_size, layer.kernel_size),
                            padding=layer.padding.upper(),
                            kernel_init=INITIALIZERS[layer.init],
                        )(x)
                    )
                    if layer.pool:
                        x = nn.max_pool(x, (2, 2), (2, 2))
                case Dropout():
                    x = self.dropout(layer.rate)(x, deterministic=not train)
                case Dense():
                    x = x.reshape(len(x), -1)
                    x = nn.Dense(layer.features, kernel_init=INITIALIZERS[layer.init])(x)
                    x = nn.relu(x) if layer.relu else x
        return x


def mean_loss(
    model: Network, params: Any, images: jax.Array, labels: jax.Array, key: jax.Array
) -> jax.Array:
    """Mean cross-entropy of a batch, with dropout."""
    logits = model.apply({"params": params}, images, train=True, rngs={"dropout": key})
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


class Competitor:
    """A training loop; with `scan`, each call of `train` is one program."""

    def __init__(
        self, images: np.ndarray, labels: np.ndarray, case: Case, *, scan: bool = False
    ) -> None:
        arch, batch_size, image_size, _ = case
        self.data = jnp.asarray(images), jnp.asarray(labels)
        self.batch_size, self.scan = batch_size, scan
        self.batches = self._batches()

        model, tx = Network(NETWORKS[arch]), _optimizer(arch)
        augmentation = RandomAffine(keras_shear=True, image_size=image_size)
        shape = (1, image_size, image_size, 3 if arch == AUGMENTED else 1)
        params = model.init(jax.random.key(0), jnp.zeros(shape), train=False)["params"]
        self.state = params, tx.init(params), jax.random.key(1)

        def step(state, examples, data):
            params, opt_state, key = state
            key, augment_key, dropout_key = jax.random.split(key, 3)
            images, labels = data[0][examples], data[1][examples]
            if arch == AUGMENTED:
                pixels = augmentation(augment_key, jnp.int32(0), examples, images)
                pixels = jnp.repeat(pixels, 3, axis=-1)
            else:
                pixels = images[..., None].astype(jnp.float32) / 255
            loss, grads = jax.value_and_grad(mean_loss, argnums=1)(
                model, params, pixels, labels, dropout_key
            )
            updates, opt_state = tx.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state, key), loss

        def scanned(state, examples, data):
            return jax.lax.scan(lambda state, some: step(state, some, data), state, examples)

        self._step = jax.jit(step, donate_argnums=0)
        self._scanned = jax.jit(scanned, donate_argnums=0)

    def train(self, num_steps: int) -> Trained:
        """Trains (see `worker`)."""
        batches = itertools.islice(self.batches, num_steps)
        if self.scan:
            self.state, losses = self._scanned(self.state, np.stack([*batches]), self.data)
        else:
            several = []
            for examples in batches:
                self.state, loss = self._step(self.state, examples, self.data)
                several.append(loss)
            losses = np.array(jax.device_get(several))
        return Trained(num_steps, float(losses.mean()))

    def _batches(self) -> Iterator[np.ndarray]:
        generator = np.random.default_rng(0)
        count = len(self.data[1])
        while True:
            order = generator.permutation(count).astype(np.int32)
            yield from order[: count // self.batch_size * self.batch_size].reshape(
                -1, self.batch_size
            )

    def device_peak(self) -> float | None:
        """Returns the peak device memory in MiB, if the device reports it."""
        return device_peak()


def device_peak() -> float | None:
    """Returns the peak memory of JAX's device in MiB, if the device reports it."""
    statistics = jax.devices()[0].memory_stats()
    return statistics["peak_bytes_in_use"] / 2**20 if statistics else None


def _optimizer(arch: str) -> optax.GradientTransformation:
    name, rate = OPTIMIZERS[arch]
    match name:
        case "adam":
            return optax.adam(rate, eps=1e-7)
        case "rmsprop":
            return optax.rmsprop(rate, decay=0.9, eps=1e-7)
        case _:
            return optax.sgd(rate)
