"""`replay`: computes one step of a finished run again."""

import contextlib
from pathlib import Path
from typing import NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fmnist_jax.config import from_dict
from fmnist_jax.data.batches import as_stored, epoch_order
from fmnist_jax.data.dataset import Dataset
from fmnist_jax.differences import differences_message
from fmnist_jax.errors import CheckpointError, ConfigError
from fmnist_jax.parts.imports import Origin
from fmnist_jax.parts.objects import Parts
from fmnist_jax.runs import files
from fmnist_jax.runs.checkpoint import Checkpoints
from fmnist_jax.runs.plan import Plan, create_plan
from fmnist_jax.train.loop import (
    StepInputs,
    TrainInputs,
    read_step,
    train_epochs,
    with_microbatch_size,
)
from fmnist_jax.train.step import StepConfig, TrainState, compute_grads
from fmnist_jax.xla.jit import platform_jit


class Replay(NamedTuple):
    """One step, as NumPy arrays.

    Attributes:
      step: number of the step, counted from 1.
      examples: int32[batch], positions of the images among the training images.
      images: float32[batch, height, width], or [batch, height, width, 3] in colour, augmented,
        values in [0, 1].
      labels: int32[batch].
      losses: float32[batch], in nats, with dropout and class weights, before the update.
      gradient_norm: Euclidean norm of the gradient of the mean loss.
    """

    step: int
    examples: np.ndarray
    images: np.ndarray
    labels: np.ndarray
    losses: np.ndarray
    gradient_norm: float


def replay(workdir: Path, dataset: Dataset, step: int, **parts: Unpack[Parts]) -> Replay:
    """Computes the batch, losses and gradient norm of one step of a run again.

    It trains from the nearest checkpoint before that step, or from the start, and writes nothing.

    Args:
      workdir: the run's folder.
      dataset: the run's data.
      step: number of the step, counted from 1.
      **parts: as for `fit`; needed where the parts that the run names cannot be imported.

    Raises:
      ConfigError: if the folder holds no run or a run of other data, or the step does not exist.
      DamagedFileError: if config.json cannot be read.
    """
    plan = _read_plan(workdir, dataset, parts)
    if isinstance(step, bool) or not (isinstance(step, int) and 1 <= step <= plan.total_steps):
        raise ConfigError(f"step is {step!r}; the run in {workdir} has 1 to {plan.total_steps:,}")
    state = _restore_before(plan, step)
    calls = train_epochs(
        state,
        plan.inputs,
        plan.run.recipe.epochs,
        config=plan.config,
        next_num_steps=lambda reached, left: min(left, step - 1 - reached),
    )
    while int(state.step) < step - 1:
        state, _ = next(calls)
    order = epoch_order(
        plan.streams.shuffle, (step - 1) // plan.steps_per_epoch, jnp.asarray(plan.train_examples)
    )
    inputs = plan.inputs._replace(examples=order)
    config = with_microbatch_size(plan.config, state, inputs)
    (examples, batch, _), losses, gradient_norm = _replay(state, inputs, config=config)
    is_real = np.asarray(batch.mask)
    return Replay(
        step,
        np.asarray(examples)[is_real],
        as_stored(np.asarray(batch.images)[is_real]),
        np.asarray(batch.labels)[is_real],
        np.asarray(losses)[is_real],
        float(gradient_norm),
    )


@platform_jit(static_argnames=("config",))
def _replay(
    state: TrainState, inputs: TrainInputs, *, config: StepConfig
) -> tuple[StepInputs, jax.Array, jax.Array]:
    """Does what `take_step` does, without updating."""
    read = read_step(inputs, state.step, config=config)
    grads = compute_grads(state, read.batch, read.key, inputs.hyperparams, config=config)
    return read, grads.losses, optax.tree.norm(grads.grads)


def _read_plan(workdir: Path, dataset: Dataset, parts: Parts) -> Plan:
    settings = files.read_json(workdir / files.CONFIG)
    if settings is None:
        raise ConfigError(f"{workdir} holds no run; name the folder of a run")
    origin = Origin(workdir, settings.get("sources", {}))
    plan = create_plan(from_dict(settings, workdir), dataset, origin=origin, **parts)
    message = differences_message(
        f"the run in {workdir} is of other data or another version. The settings differ:",
        files.without_sources(settings),
        files.without_sources(plan.settings),
    )
    if message:
        raise ConfigError(message)
    return plan


def _restore_before(plan: Plan, step: int) -> TrainState:
    """Returns the newest saved state before a step, or the initial one."""
    checkpoints = Checkpoints(plan.run.workdir / files.CHECKPOINTS, plan.settings)
    for saved in reversed(checkpoints.steps()):
        if saved < step:
            # If it is damaged, the one before it gives the same bits.
            with contextlib.suppress(CheckpointError):
                return checkpoints.restore_step(saved, plan.abstract_checkpoint)[0]["state"]
    return plan.create_state()
