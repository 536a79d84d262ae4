"""This library: `train_steps`, one compiled loop; and the check of what it computes."""

import dataclasses
import functools
import time
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from linen_loop import Network, mean_loss
from worker import AUGMENTED, NETWORKS, OPTIMIZERS, Trained

import fmnist_jax as fm
from fmnist_jax.nn import ops
from fmnist_jax.train.loop import example_keys, scale
from fmnist_jax.xla.jit import platform_jit


class Competitor:
    """A training run."""

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        *,
        arch: str,
        batch_size: int,
        image_size: int,
        device: str = "",
        bf16: bool = False,
    ) -> None:
        del device  # JAX takes the one that it sees
        self.images, self.labels = jnp.asarray(images), jnp.asarray(labels)
        self.streams = fm.create_streams(0)
        self.options = _options(arch, image_size) | {"batch_size": batch_size}
        if bf16:
            self.options["dtype"] = jnp.bfloat16
        self.state = fm.create_train_state(
            self.streams.init, self.options["model"], self.options["tx"]
        )
        # The last, smaller batch of an epoch is left out, as by all competitors.
        self.steps_per_epoch = len(labels) // batch_size
        self.done = 0
        self._epoch: tuple[int, jax.Array] | None = None

    def train(self, steps: int) -> Trained:
        """Trains; see `worker`."""
        losses = []
        last = self.done + steps
        while self.done < last:
            epoch, index = divmod(self.done, self.steps_per_epoch)
            count = min(last - self.done, self.steps_per_epoch - index)
            self.state, metrics = fm.train_steps(
                self.state, *self.epoch(epoch), self.streams, count, **self.options
            )
            losses.append(metrics.loss)
            self.done += count
        return Trained(steps, float(sum(losses)) / (steps * self.options["batch_size"]))

    def epoch(self, epoch: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Images, labels and the order of an epoch's whole batches."""
        if self._epoch is None or self._epoch[0] != epoch:
            order = fm.epoch_order(self.streams.shuffle, epoch, jnp.arange(len(self.labels)))
            whole = self.steps_per_epoch * self.options["batch_size"]
            self._epoch = epoch, order[:whole]
        return self.images, self.labels, self._epoch[1]

    def device_peak(self) -> float | None:
        """Peak device memory in MiB, where the device tells it."""
        statistics = jax.devices()[0].memory_stats()
        return statistics["peak_bytes_in_use"] / 2**20 if statistics else None


def _options(arch: str, image_size: int) -> dict[str, Any]:
    """The keyword arguments of `train_steps`."""
    name, rate = OPTIMIZERS[arch]
    large = arch == AUGMENTED
    return {
        "model": fm.create_model(arch, **({"image_size": image_size} if large else {})),
        # The library's SGD has momentum, which here nobody has.
        "tx": optax.sgd(rate) if name == "sgd" else fm.create_optimizer(name, rate),
        "augment": (
            dataclasses.replace(fm.AUGMENTATIONS["keras"], image_size=image_size) if large else None
        ),
    }


def flops(
    images: np.ndarray, labels: np.ndarray, *, arch: str, batch_size: int, image_size: int
) -> float:
    """Floating-point operations of an update by the definitions of its layers.

    As the compiler counts them for the plain network; this library needs fewer.
    """
    del images, labels
    model = Network(NETWORKS[arch])
    shape = (batch_size, image_size, image_size, 3 if arch == AUGMENTED else 1)
    pixels = jax.ShapeDtypeStruct(shape, jnp.float32)
    key = jax.eval_shape(jax.random.key, 0)
    params = jax.eval_shape(lambda k, x: model.init(k, x, train=False)["params"], key, pixels)
    gradients = platform_jit()(jax.grad(functools.partial(mean_loss, model)))
    classes = jax.ShapeDtypeStruct((batch_size,), jnp.int32)
    return gradients.lower(params, pixels, classes, key).compile().cost_analysis()["flops"]


def matrix_rate(images: np.ndarray, labels: np.ndarray, **case: Any) -> float:
    """Floating-point operations a second in float32 matrix products; the best of five."""
    del images, labels, case
    size = 2048
    matrix = jnp.ones((size, size))
    product = jax.jit(jnp.matmul)
    product(matrix, matrix).block_until_ready()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready([product(matrix, matrix) for _ in range(2)])
        seconds.append((time.perf_counter() - start) / 2)
    return 2 * size**3 / min(seconds)


class Dropout(nn.Module):
    """The library's dropout in the reference network, so that both drop the same."""

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, *, deterministic: bool) -> jax.Array:
        """As `nn.Dropout`."""
        return x if deterministic else ops.dropout(self.make_rng("dropout"), x, self.rate)


def follow_reference(
    images: np.ndarray, labels: np.ndarray, *, arch: str, batch_size: int, image_size: int
) -> dict[str, float]:
    """Ten updates, each compared with a plain network's from the same state, batch and keys.

    Each starts from this library's state: side by side, two runs that round differently part for
    good as soon as one activation is on the other side of zero.

    Returns:
      loss: the largest relative difference of the ten losses.
      update: the largest Euclidean norm of a difference of the parameters over that of their
        change.
    """
    ours = Competitor(images, labels, arch=arch, batch_size=batch_size, image_size=image_size)
    # Dropout draws anew for each slice, and the plain network knows no slices.
    ours.options["slice_size"] = batch_size
    streams, tx, augment = ours.streams, ours.options["tx"], ours.options["augment"]
    model = Network(NETWORKS[arch], dropout=Dropout)
    order = ours.epoch(0)[2]

    @platform_jit()
    def step(state: fm.TrainState, examples: jax.Array) -> Any:
        if augment is None:
            pixels = scale(ours.images[examples])
        else:
            pixels = augment(
                example_keys(streams.augment, jnp.int32(0), examples), ours.images[examples]
            )
            pixels = jnp.repeat(pixels, 3, axis=-1)
        key = jax.random.fold_in(streams.dropout, state.step)
        loss, grads = jax.value_and_grad(mean_loss, argnums=1)(
            model, state.params, pixels, ours.labels[examples], key
        )
        updates, _ = tx.update(grads, state.opt_state, state.params)
        return optax.apply_updates(state.params, updates), loss

    differences = []
    with jax.default_matmul_precision("highest"):  # a GPU's TF32 has three digits only
        for number in range(10):
            before = jax.tree.map(jnp.copy, ours.state)  # `train_steps` will reuse the arrays
            examples = order[number * batch_size : (number + 1) * batch_size]
            params, loss = step(before, examples)
            difference = abs(ours.train(1).loss - float(loss)) / float(loss)
            apart, change = (
                optax.tree.norm(jax.tree.map(jnp.subtract, ours.state.params, other))
                for other in (params, before.params)
            )
            differences.append((difference, float(apart / change)))
    losses, updates = zip(*differences, strict=True)
    return {"loss": max(losses), "update": max(updates)}
