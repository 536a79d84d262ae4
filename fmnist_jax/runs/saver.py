"""What a run saves: the state of its loop, when it is saved, and how it is restored."""

import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import jax
import numpy as np

from fmnist_jax.config import Interval
from fmnist_jax.digest import params_sha256
from fmnist_jax.distributed import processes
from fmnist_jax.errors import CheckpointError, CheckpointWarning, Interrupted, VerificationError
from fmnist_jax.runs.checkpoint import Checkpoints
from fmnist_jax.runs.plan import Plan
from fmnist_jax.train import metrics as metrics_lib
from fmnist_jax.train.metrics import Metrics
from fmnist_jax.train.step import TrainState


class LoopState(NamedTuple):
    """The content of a checkpoint: all that a run needs to resume.

    Attributes:
      state: parameters, optimizer state and step.
      metrics: sums over the current epoch.
      epoch_seconds: training time of the current epoch.
      history: the lines of metrics.jsonl.
      is_finished: whether a hook has ended the training.
    """

    state: TrainState
    metrics: Metrics
    epoch_seconds: float
    history: list[dict[str, Any]]
    is_finished: bool = False

    @property
    def step(self) -> int:
        """Number of steps taken."""
        return int(self.state.step)

    @property
    def val_accuracy(self) -> float | None:
        """Validation accuracy of the current state, if it was evaluated."""
        last = self.history[-1] if self.history else {}
        is_current = last.get("split") == "val" and last["step"] == self.step
        return last["accuracy"] if is_current else None


class Saver:
    """Decides when to save, and saves.

    Args:
      plan: the run.
      checkpoints: where to save.
      saved_step: the step of the last checkpoint, 0 without any.

    Attributes:
      saved_step: the same, updated by each save.
    """

    def __init__(self, plan: Plan, checkpoints: Checkpoints, saved_step: int) -> None:
        self._every = Interval.parse("checkpoint_every", plan.run.checkpoint_every)
        self._plan = plan
        self._checkpoints = checkpoints
        self._saved_at = time.monotonic()  # the time of day may jump
        self.saved_step = saved_step

    def steps_until_due(self, step: int) -> int:
        """Number of steps until a checkpoint that is due at a step."""
        if self._every.unit != "st":
            return self._plan.total_steps
        return self._every.number - step % self._every.number

    def is_due(self, step: int) -> bool:
        """Whether to save after a step."""
        number, unit = self._every
        epoch, rest = divmod(step, self._plan.steps_per_epoch)
        if rest == 0:
            return step == self._plan.total_steps or unit != "ep" or epoch % number == 0
        if unit == "s":
            return time.monotonic() - self._saved_at >= number
        return unit == "st" and step % number == 0

    def save(self, loop: LoopState) -> None:
        """Saves; warns if it fails.

        Raises:
          VerificationError: if the processes have different parameters.
        """
        if jax.process_count() > 1:
            values = {"params_sha256": params_sha256(loop.state.params)}
            processes.check_same(f"parameters at step {loop.step:,}", values, VerificationError)
        tree = {"state": loop.state, "metrics": loop.metrics}
        meta = {
            "epoch_seconds": loop.epoch_seconds,
            "history": loop.history,
            "is_finished": loop.is_finished,
            "image_shape": self._plan.dataset.image_shape,
        }
        try:
            processes.on_first(
                lambda: self._checkpoints.save(loop.step, tree, meta, loop.val_accuracy)
            )
        except CheckpointError as error:
            warnings.warn(
                f"{error}; training continues, and the next checkpoint is written as scheduled",
                CheckpointWarning,
                stacklevel=2,
            )
        else:
            self.saved_step = loop.step
        self._saved_at = time.monotonic()

    def stop(self, loop: LoopState, signal_number: int | None) -> NoReturn:
        """Saves the state if necessary, and raises.

        Args:
          loop: the state after the last step.
          signal_number: of the signal that stops the run; None if a hook does.

        Raises:
          Interrupted: if the state is saved.
          CheckpointError: if it could not be saved.
        """
        if self.saved_step < loop.step:
            self.save(loop)
        total_steps = self._plan.total_steps
        if self.saved_step < loop.step:
            raise CheckpointError(
                f"stopped after step {loop.step:,} of {total_steps:,}, which could not be saved; "
                f"the same command resumes after step {self.saved_step:,}"
            )
        raise Interrupted(
            f"Stopped after step {loop.step:,} of {total_steps:,}; the state is saved. The same "
            "command resumes the run.",
            signal_number,
        )


def restore(plan: Plan, read: Callable[[Any], tuple[Any, dict[str, Any]] | None]) -> LoopState:
    """Returns what the first process reads, or the initial state if that is None."""
    like = plan.abstract_checkpoint

    def read_leaves() -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        restored = read(like)
        if restored is None:
            return None
        leaves = {str(n): np.asarray(leaf) for n, leaf in enumerate(jax.tree.leaves(restored[0]))}
        return leaves, restored[1]

    restored = processes.on_first(read_leaves)
    if restored is None:
        metrics = metrics_lib.zeros(plan.config.log_norms)
        tree: Any = {"state": plan.create_state(), "metrics": metrics}
        meta: dict[str, Any] = {"epoch_seconds": 0.0, "history": []}
    else:
        leaves, meta = restored
        tree = jax.tree.unflatten(
            jax.tree.structure(like), [leaves[str(n)] for n in range(len(leaves))]
        )
    tree = plan.config.layout.place(tree)
    return LoopState(
        tree["state"], tree["metrics"], meta["epoch_seconds"], meta["history"],
        meta.get("is_finished", False),  # earlier versions did not record it
    )  # fmt: skip


def restore_finished(plan: Plan, checkpoints: Checkpoints, step: int) -> LoopState:
    """Returns the state of a finished run after its last step.

    Raises:
      CheckpointError: if its checkpoint is missing or damaged.
    """

    def read(like: Any) -> tuple[Any, dict[str, Any]]:
        if not checkpoints.steps():
            raise CheckpointError(
                f"the run in {plan.run.workdir} is finished, but its checkpoints are missing; its "
                "results are unchanged, and another folder starts a new run"
            )
        return checkpoints.restore_step(step, like)

    return restore(plan, read)
