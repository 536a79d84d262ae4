"""fmnist_jax: `train_steps`, one compiled loop; and functions that check and rate the benchmark."""

import dataclasses
import functools
import time
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from linen_loop import Network, device_peak, mean_loss
from worker import AUGMENTED, NETWORKS, OPTIMIZERS, Case, Trained

import fmnist_jax as fm
from fmnist_jax.data.augment import RandomAffine
from fmnist_jax.data.batches import scale
from fmnist_jax.nn import ops
from fmnist_jax.runs.plan import create_plan
from fmnist_jax.train import metrics
from fmnist_jax.xla.jit import platform_jit


class Competitor:
    """A training loop."""

    def __init__(
        self, images: np.ndarray, labels: np.ndarray, case: Case, *, bf16: bool = False
    ) -> None:
        self.images, self.labels = jnp.asarray(images), jnp.asarray(labels)
        self.streams = fm.create_streams(0)
        self.config = dataclasses.replace(_config(case), dtype="bfloat16" if bf16 else "float32")
        self.hyperparams = fm.Hyperparams(OPTIMIZERS[case.arch].learning_rate)
        self.state = fm.create_train_state(self.streams.init, self.config)
        # The last, smaller batch of an epoch is left out by all competitors.
        self.steps_per_epoch = len(labels) // case.batch_size
        self.num_steps = 0
        self._order: tuple[int, jax.Array] | None = None

    def train(self, num_steps: int) -> Trained:
        """Trains (see `worker`)."""
        losses = []
        last = self.num_steps + num_steps
        while self.num_steps < last:
            epoch, index = divmod(self.num_steps, self.steps_per_epoch)
            call_steps = min(last - self.num_steps, self.steps_per_epoch - index)
            self.state, metrics = fm.train_steps(
                self.state,
                self.images,
                self.labels,
                self.order(epoch),
                self.streams,
                jnp.int32(call_steps),
                self.hyperparams,
                config=self.config,
            )
            losses.append(metrics.loss)
            self.num_steps += call_steps
        return Trained(num_steps, float(sum(losses)) / (num_steps * self.config.batch_size))

    def order(self, epoch: int) -> jax.Array:
        """Returns the order of the examples in the whole batches of an epoch."""
        if self._order is None or self._order[0] != epoch:
            order = fm.epoch_order(self.streams.shuffle, epoch, jnp.arange(len(self.labels)))
            self._order = epoch, order[: self.steps_per_epoch * self.config.batch_size]
        return self._order[1]

    def device_peak(self) -> float | None:
        """Returns the peak device memory in MiB, if the device reports it."""
        return device_peak()


def _config(case: Case) -> fm.StepConfig:
    name, rate = OPTIMIZERS[case.arch]
    # The library's SGD has momentum, which no competitor has here.
    tx = optax.sgd(rate) if name == "sgd" else fm.create_optimizer(name)
    if case.arch != AUGMENTED:
        return fm.StepConfig(model=fm.create_model(case.arch), tx=tx, batch_size=case.batch_size)
    return fm.StepConfig(
        model=fm.create_model(case.arch, image_size=case.image_size),
        tx=tx,
        batch_size=case.batch_size,
        augment=RandomAffine(keras_shear=True, image_size=case.image_size),
    )


def curve(
    arrays: dict[str, np.ndarray], recipe: dict[str, Any], seed: int
) -> list[tuple[float, float]]:
    """Trains what `run.py` trains; returns seconds and test accuracy after each epoch."""
    dataset = fm.Dataset(
        arrays["images"], arrays["labels"], arrays["test_images"], arrays["test_labels"]
    )
    plan = create_plan(fm.Run(recipe=fm.Recipe(**recipe), workdir=Path(), seed=seed), dataset)
    images, labels = jnp.asarray(dataset.train_images), jnp.asarray(dataset.train_labels)
    examples = jnp.asarray(plan.train_examples)
    # Compiles the loop and takes no step.
    state, _ = fm.train_steps(
        plan.create_state(), images, labels, examples, plan.streams, jnp.int32(0),
        plan.hyperparams, metrics.zeros(), config=plan.config,
    )  # fmt: skip
    seconds, points = 0.0, []
    for _ in range(plan.run.recipe.epochs):
        start = time.perf_counter()
        ((state, _),) = fm.train_epoch(
            state, images, labels, examples, plan.streams, plan.hyperparams, config=plan.config
        )
        jax.block_until_ready(state)
        seconds += time.perf_counter() - start
        test = fm.evaluate(
            state.variables, dataset.test_images, dataset.test_labels, model=plan.model
        )
        points.append((seconds, test.means()["accuracy"]))
    return points


def flops(images: np.ndarray, labels: np.ndarray, case: Case) -> float:
    """Counts the floating-point operations of a step by the definitions of the layers.

    The count is the compiler's for the plain network; fmnist_jax needs fewer.
    """
    del images, labels
    model = Network(NETWORKS[case.arch])
    channels = 3 if case.arch == AUGMENTED else 1
    shape = (case.batch_size, case.image_size, case.image_size, channels)
    pixels = jax.ShapeDtypeStruct(shape, jnp.float32)
    key = jax.eval_shape(jax.random.key, 0)
    params = jax.eval_shape(lambda k, x: model.init(k, x, train=False)["params"], key, pixels)
    grad = platform_jit()(jax.grad(functools.partial(mean_loss, model)))
    labels_shape = jax.ShapeDtypeStruct((case.batch_size,), jnp.int32)
    return grad.lower(params, pixels, labels_shape, key).compile().cost_analysis()["flops"]


def matrix_rate(images: np.ndarray, labels: np.ndarray, case: Case) -> float:
    """Measures the floating-point operations per second of float32 matrix products, best of 5."""
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
    """The library's dropout, so that the reference network drops the same activations."""

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, *, deterministic: bool) -> jax.Array:
        """Applies dropout as `nn.Dropout` does."""
        return x if deterministic else ops.dropout(self.make_rng("dropout"), x, self.rate)


def compare_steps(images: np.ndarray, labels: np.ndarray, case: Case) -> dict[str, float]:
    """Compares each of ten steps with that of a plain network from the same state, batch and keys.

    Each step starts from this library's state. Side by side, two runs that round differently
    diverge as soon as one activation has another sign.

    Returns:
      loss: the largest relative difference of the ten losses.
      update: the largest Euclidean norm of the difference between the updated parameters, relative
        to that of their change.
    """
    ours = Competitor(images, labels, case)
    # Each microbatch has its own dropout key, and the plain network has no microbatches.
    ours.config = dataclasses.replace(ours.config, microbatch_size=case.batch_size)
    streams, augment = ours.streams, ours.config.augment
    model = Network(NETWORKS[case.arch], dropout=Dropout)
    tx: Any = optax.with_extra_args_support(ours.config.tx)

    @platform_jit()
    def step(state: fm.TrainState, examples: jax.Array) -> Any:
        if augment is None:
            pixels = scale(ours.images[examples])
        else:
            pixels = augment(streams.augment, jnp.int32(0), examples, ours.images[examples])
            pixels = jnp.repeat(pixels, 3, axis=-1)
        key = jax.random.fold_in(streams.dropout, state.step)
        loss, grads = jax.value_and_grad(mean_loss, argnums=1)(
            model, state.params, pixels, ours.labels[examples], key
        )
        rate = ours.hyperparams.learning_rate
        updates, _ = tx.update(grads, state.opt_state, state.params, learning_rate=rate)
        return optax.apply_updates(state.params, updates), loss

    differences = []
    with jax.default_matmul_precision("highest"):  # TF32 on a GPU has three digits only
        for examples in ours.order(0).reshape(-1, case.batch_size)[:10]:
            before = jax.tree.map(jnp.copy, ours.state)  # `train_steps` donates the state
            params, loss = step(before, examples)
            difference = abs(ours.train(1).loss - float(loss)) / float(loss)
            apart, change = (
                optax.tree.norm(jax.tree.map(jnp.subtract, ours.state.params, other))
                for other in (params, before.params)
            )
            differences.append((difference, float(apart / change)))
    losses, updates = zip(*differences, strict=True)
    return {"loss": max(losses), "update": max(updates)}
