"""`train_calls`: trains a plan in compiled calls of about half a second, and reports progress."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax

from fmnist_jax.distributed import processes
from fmnist_jax.errors import DivergedError
from fmnist_jax.runs.plan import Plan
from fmnist_jax.train.hooks import Hook
from fmnist_jax.train.loop import TrainInputs, train_epochs
from fmnist_jax.train.metrics import Metrics
from fmnist_jax.train.step import TrainState

# Target duration of one compiled call. Progress is shown and signals are handled between calls.
# The length of a call does not change the result.
_CALL_SECONDS = 0.5


class Call(NamedTuple):
    """A compiled call of the training loop that has ended.

    Attributes:
      state: the state after it. Donated to the next call.
      metrics: sums over the epoch so far.
      seconds: its duration.
    """

    state: TrainState
    metrics: Metrics
    seconds: float


def train_calls(
    plan: Plan,
    inputs: TrainInputs,
    state: TrainState,
    metrics: Metrics | None = None,
    *,
    hooks: Sequence[Hook] = (),
    steps_until_due: Callable[[int], int] | None = None,
) -> Iterator[Call]:
    """Trains the remaining epochs of a plan.

    Args:
      plan: what to train.
      inputs: its inputs, on the devices.
      state: the current state. Donated.
      metrics: sums over the epoch that the state is in; None starts at zero.
      hooks: receive the progress after each call.
      steps_until_due: maps the step to the most steps of the next call; None sets no limit but
        the end of the epoch.

    Yields:
      Each call, in every process the same number of them.

    Raises:
      DivergedError: if the loss is not finite.
    """
    most = 1  # steps of the next call

    def next_num_steps(step: int, left: int) -> int:
        return min(most, left, left if steps_until_due is None else steps_until_due(step))

    calls = train_epochs(
        state, inputs, plan.run.recipe.epochs, metrics, config=plan.config,
        next_num_steps=next_num_steps,
    )  # fmt: skip
    step, started = int(state.step), time.perf_counter()
    for state, metrics in calls:
        sums = jax.device_get(metrics)  # waits for the end of the call
        seconds = time.perf_counter() - started
        num_steps, step = int(state.step) - step, int(state.step)
        _check_finite(plan, step, sums)
        for hook in hooks:
            hook.update(
                step=step,
                epoch=(step - 1) // plan.steps_per_epoch + 1,
                images_per_second=num_steps * plan.config.batch_size / seconds,
                loss=float(sums.loss / sums.num_examples),
            )
        if num_steps == most:  # not after a call that was cut short
            most = int(processes.gather([_adapted(num_steps, seconds)])[0, 0])
        yield Call(state, metrics, seconds)
        started = time.perf_counter()


def _adapted(num_steps: int, seconds: float) -> int:
    """Returns how many steps take about `_CALL_SECONDS`, if so many took that long."""
    return max(1, min(round(num_steps * _CALL_SECONDS / seconds), 16 * num_steps))


def _check_finite(plan: Plan, step: int, sums: Metrics) -> None:
    epoch = (step - 1) // plan.steps_per_epoch
    first_step = epoch * plan.steps_per_epoch
    if sums.finite_steps < step - first_step:
        raise DivergedError(
            f"the loss is not finite in epoch {epoch + 1}, step "
            f"{first_step + int(sums.finite_steps) + 1:,}; a lower learning rate often helps"
        )
