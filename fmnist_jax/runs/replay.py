"""`replay`: what one update of a finished run saw, made again."""

import contextlib
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fmnist_jax.config import differences, from_dict
from fmnist_jax.data.augment import RandomAffine
from fmnist_jax.data.sources import Dataset
from fmnist_jax.errors import CheckpointError, ConfigError
from fmnist_jax.rng import Streams
from fmnist_jax.runs import files
from fmnist_jax.runs.checkpoint import Checkpoints
from fmnist_jax.runs.plan import Plan, create_plan
from fmnist_jax.train.loop import (
    Batch,
    Regularization,
    TrainState,
    epoch_order,
    gradients,
    read_batch,
    train_steps,
)
from fmnist_jax.train.microbatch import choose_slice_size
from fmnist_jax.xla.compile import compiled


class Replay(NamedTuple):
    """One update, as NumPy arrays.

    Attributes:
      step: the update's number, the first is 1.
      examples: int32[batch], the images' positions among the training images.
      images: float32[batch, height, width], augmented, values in [0, 1].
      labels: int32[batch].
      losses: float32[batch], in nats, dropout on, before the update.
      gradient_norm: Euclidean norm of the gradient of the mean loss.
    """

    step: int
    examples: np.ndarray
    images: np.ndarray
    labels: np.ndarray
    losses: np.ndarray
    gradient_norm: float


def replay(workdir: Path, dataset: Dataset, step: int) -> Replay:
    """Makes the batch of one update of a run again, and what the network made of it.

    It trains from the nearest checkpoint before that update, or from the start, and writes nothing.

    Args:
      workdir: the run's folder.
      dataset: the run's data.
      step: number of the update; the first is 1.

    Raises:
      ConfigError: if the folder holds no run, or one of other data, or has no such update.
      DamagedFileError: if config.json cannot be read.
    """
    plan = _read_plan(workdir, dataset)
    if isinstance(step, bool) or not (isinstance(step, int) and 1 <= step <= plan.total_steps):
        raise ConfigError(f"step is {step!r}; the run in {workdir} has 1 to {plan.total_steps:,}")
    images, labels = jnp.asarray(dataset.train_images), jnp.asarray(dataset.train_labels)
    state = _state_before(plan, step, images, labels)
    options = {name: value for name, value in plan.step_options.items() if name != "tx"}
    examples, batch, losses, gradient_norm = _replay(
        state, images, labels, _order(plan, step - 1), plan.streams, **options
    )
    real = np.asarray(batch.mask)
    return Replay(
        step,
        np.asarray(examples)[real],
        np.asarray(batch.images)[real, ..., 0],
        np.asarray(batch.labels)[real],
        np.asarray(losses)[real],
        float(gradient_norm),
    )


@compiled(static_argnames=("batch_size", "model", "augment", "dtype"))
def _replay(
    state: TrainState,
    images: jax.Array,
    labels: jax.Array,
    order: jax.Array,
    streams: Streams,
    *,
    batch_size: int,
    model: Any,
    augment: RandomAffine | None,
    dtype: Any,
    regularization: Regularization,
) -> tuple[jax.Array, Batch, jax.Array, jax.Array]:
    """One update of `train_steps`, without updating."""
    examples, batch = read_batch(
        images,
        labels,
        order,
        state.step,
        streams,
        batch_size=batch_size,
        augment=augment,
        strength=regularization.augmentation,
    )
    grads, losses, _ = gradients(
        state,
        batch,
        jax.random.fold_in(streams.dropout, state.step),
        model=model,
        dtype=dtype,
        slice_size=choose_slice_size(state.params, model, batch.images.shape[1:3], batch_size),
        regularization=regularization,
    )
    return examples, batch, losses, optax.tree.norm(grads)


def _read_plan(workdir: Path, dataset: Dataset) -> Plan:
    settings = files.read_json(workdir / files.CONFIG)
    if settings is None:
        raise ConfigError(f"{workdir} holds no run; name the folder that one was written to")
    plan = create_plan(from_dict(settings, workdir), dataset)
    changed = differences(settings, plan.settings)
    if changed:
        raise ConfigError(
            f"the run in {workdir} is not one of these data and this version. It differs in\n"
            + "\n".join(f"  {line}" for line in changed)
        )
    return plan


def _order(plan: Plan, step: int) -> jax.Array:
    """The order of the epoch of the update after so many others."""
    epoch = step // plan.steps_per_epoch
    return epoch_order(plan.streams.shuffle, epoch, jnp.asarray(plan.train_examples))


def _state_before(plan: Plan, step: int, images: jax.Array, labels: jax.Array) -> TrainState:
    """The state that an update saw, trained from the last checkpoint before it."""
    checkpoints = Checkpoints(plan.run.workdir / files.CHECKPOINTS, plan.settings)
    state = plan.create_state()
    for saved in reversed(checkpoints.steps()):
        if saved < step:
            # A damaged one costs time alone: the one before it leads to the same bits.
            with contextlib.suppress(CheckpointError):
                state = checkpoints.restore_step(saved, plan.checkpoint_shapes)[0]["state"]
                break
    while int(state.step) < step - 1:
        done = int(state.step)
        epoch_end = (done // plan.steps_per_epoch + 1) * plan.steps_per_epoch
        count = min(epoch_end, step - 1) - done
        state, _ = train_steps(
            state, images, labels, _order(plan, done), plan.streams, count, **plan.step_options
        )
    return state
