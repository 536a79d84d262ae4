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
from linen_loop import create, init, mean_loss
from networks import ARCHS
from worker import AUGMENTED, OPTIMIZERS, Case, Trained, load

import fmnist_jax as fm
from fmnist_jax.data.augment import RandomAffine
from fmnist_jax.nn.dropout import dropout
from fmnist_jax.runs.plan import create_plan
from fmnist_jax.train.loop import read_step
from fmnist_jax.xla.jit import platform_jit


class Competitor:
    """A training loop.

    Attributes:
      bf16: whether the network computes in bfloat16.
      stock: stock Flax layers in place of the library's network.
      options: other fields of `StepConfig`.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        case: Case,
        *,
        bf16: bool = False,
        stock: bool = False,
        **options: Any,
    ) -> None:
        augmented, size = case.arch == AUGMENTED, case.input_shape[0]
        if stock or case.arch in ARCHS:
            model: Any = create(case)
        else:
            model = fm.create_model(case.arch, **({"image_size": size} if augmented else {}))
        name, rate = OPTIMIZERS[case.arch]
        self.config = fm.StepConfig(
            model=model,
            # The library's SGD has momentum, which no competitor has here.
            tx=optax.sgd(rate) if name == "sgd" else fm.create_optimizer(name),
            batch_size=case.batch_size,
            augment=RandomAffine(keras_shear=True, image_size=size) if augmented else None,
            dtype="bfloat16" if bf16 else "float32",
            **options,
        )
        hyperparams = fm.Hyperparams(None if name == "sgd" else rate)
        self.inputs = self.config.layout.place(
            fm.TrainInputs(images, labels, fm.create_streams(0), hyperparams).checked()
        )
        self.state = fm.create_train_state(
            self.inputs.streams.init, self.config, image_shape=(size, size)
        )
        self.steps_per_epoch = len(labels) // case.batch_size
        self.num_steps = 0

    def train(self, num_steps: int) -> Trained:
        """Trains (see `worker`)."""
        losses, last = [], self.num_steps + num_steps
        while self.num_steps < last:
            epoch, done = divmod(self.num_steps, self.steps_per_epoch)
            if done == 0:
                self.epoch_inputs = self.inputs_of(epoch)
            count = min(last - self.num_steps, self.steps_per_epoch - done)
            self.state, metrics = fm.train_steps(
                self.state, self.epoch_inputs, jnp.int32(count), config=self.config
            )
            losses.append(metrics.loss)
            self.num_steps += count
        return Trained(num_steps, float(sum(losses)) / (num_steps * self.config.batch_size))

    def inputs_of(self, epoch: int) -> fm.TrainInputs:
        """Returns the inputs with the order of an epoch."""
        streams, examples = self.inputs.streams, self.inputs.examples
        return self.inputs._replace(examples=fm.epoch_order(streams.shuffle, epoch, examples))


def curve(path: str, recipe: dict[str, Any], seed: int) -> list[tuple[float, float]]:
    """Trains what `run.py` trains; returns seconds and test accuracy after each epoch."""
    arrays = np.load(path)
    names = ("images", "labels", "test_images", "test_labels")
    dataset = fm.Dataset(*(arrays[name] for name in names))
    plan = create_plan(fm.Run(recipe=fm.Recipe(**recipe), workdir=Path(), seed=seed), dataset)
    config, inputs = plan.config, plan.config.layout.place(plan.inputs)
    next(fm.train_epochs(  # compiles
        plan.create_state(), inputs, 1, config=config, next_num_steps=lambda step, left: 1
    ))  # fmt: skip
    epochs = fm.train_epochs(plan.create_state(), inputs, plan.run.recipe.epochs, config=config)
    seconds, points = 0.0, []
    start = time.perf_counter()
    for state, _ in epochs:
        jax.block_until_ready(state)
        seconds += time.perf_counter() - start
        test = fm.evaluate(
            state.variables, dataset.test_images, dataset.test_labels, model=plan.model
        )
        points.append((seconds, test.means()["accuracy"]))
        start = time.perf_counter()
    return points


def flops(case: Case) -> float:
    """Counts the floating-point operations of a step by the definitions of the layers.

    The count is that of the plain network before compilation, which makes some depthwise
    convolutions dense; fmnist_jax needs fewer.
    """
    model = create(case)
    pixels = jax.ShapeDtypeStruct((case.batch_size, *case.input_shape[:2], 1), jnp.float32)
    labels = jax.ShapeDtypeStruct((case.batch_size,), jnp.int32)
    key = jax.eval_shape(jax.random.key, 0)
    variables = jax.eval_shape(lambda: init(model, case))
    grad = jax.jit(jax.grad(functools.partial(mean_loss, model), has_aux=True))
    costs: Any = grad.lower(*variables, pixels, labels, key).cost_analysis()
    return costs["flops"]


def matrix_rate() -> float:
    """Measures the floating-point operations per second of float32 matrix products, best of 5."""
    matrix = jnp.ones((2048, 2048))
    product = jax.jit(jnp.matmul)
    product(matrix, matrix).block_until_ready()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready([product(matrix, matrix) for _ in range(2)])
        seconds.append((time.perf_counter() - start) / 2)
    return 2 * len(matrix) ** 3 / min(seconds)


class Dropout(nn.Module):
    """The library's dropout. Its name and the key determine which activations it drops."""

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, *, deterministic: bool) -> jax.Array:
        """Applies dropout as `nn.Dropout` does."""
        return x if deterministic else dropout(self.make_rng("dropout"), x, self.rate)


def compare_steps(path: str, case: Case, *, stock: bool = False) -> dict[str, float]:
    """Compares each of ten steps with that of a plain network from the same state, batch and keys.

    Each step starts from this library's state. Side by side, two runs that round differently
    diverge as soon as one activation has another sign.

    Returns:
      loss: the largest relative difference of the ten losses.
      update: the largest Euclidean norm of the difference between the updated parameters, relative
        to that of their change; or between the updated batch statistics, if that is larger.
    """
    ours = Competitor(*load(path, case), case, stock=stock)
    # Each microbatch has its own dropout key, and the plain network has no microbatches.
    ours.config = dataclasses.replace(ours.config, microbatch_size=case.batch_size)
    model = create(case, nn.Dropout if stock else Dropout)
    tx: Any = optax.with_extra_args_support(ours.config.tx)

    @platform_jit()
    def step(state: fm.TrainState, inputs: fm.TrainInputs) -> Any:
        _, batch, key = read_step(inputs, state.step, config=ours.config)
        (loss, model_state), grads = jax.value_and_grad(mean_loss, argnums=1, has_aux=True)(
            model, state.params, state.model_state, batch.images, batch.labels, key
        )
        rate = inputs.hyperparams.learning_rate
        updates, _ = tx.update(grads, state.opt_state, state.params, learning_rate=rate)
        return {"params": optax.apply_updates(state.params, updates), **model_state}, loss

    differences = []
    with jax.default_matmul_precision("highest"):  # TF32 on a GPU has three digits only
        for _ in range(10):
            before = jax.tree.map(jnp.copy, ours.state)  # `train_steps` donates the state
            variables, loss = step(before, ours.inputs_of(0))
            difference = abs(ours.train(1).loss - float(loss)) / float(loss)
            distances = []
            for name, after in ours.state.variables.items():
                apart, change = (
                    optax.tree.norm(jax.tree.map(jnp.subtract, after, other[name]))
                    for other in (variables, before.variables)
                )
                distances.append(float(apart / change))
            differences.append((difference, max(distances)))
    losses, updates = zip(*differences, strict=True)
    return {"loss": max(losses), "update": max(updates)}
