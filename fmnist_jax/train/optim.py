"""Adam, RMSprop and momentum SGD in Keras' formulas, with a learning rate that is data.

optax has all three, but its Adam adds epsilon to the bias-corrected root, which no epsilon turns
into Keras' update, and its learning rates are constants of the compiled program. Here the peak
learning rate and the length of the schedule are in the optimizer's state: one compiled program
serves every value, and a program can be mapped over many.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Self, get_args

import jax
import jax.numpy as jnp
import optax

from fmnist_jax.config import OptimizerName, ScheduleName
from fmnist_jax.errors import ConfigError


class Optimizer(optax.GradientTransformation):
    """An optax transformation, equal to every other one with the same `update`.

    Two optimizers that differ in their initial state alone are then the same compiled program.
    """

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Optimizer) and self.update is other.update

    def __hash__(self) -> int:
        return hash(self.update)


class Schedule(NamedTuple):
    """Where a run is on its learning rate curve.

    Attributes:
      step: int32[], updates made so far.
      learning_rate: float32[], the peak.
      total_steps: int32[], updates of the whole run.
    """

    step: jax.Array
    learning_rate: jax.Array
    total_steps: jax.Array

    def advanced(self) -> Self:
        """The schedule one update later."""
        return self._replace(step=self.step + 1)


class OptimizerState(NamedTuple):
    """State of every optimizer here.

    Attributes:
      schedule: where it is on the learning rate curve.
      moments: its moments, each a tree like `params`.
      weight_decay: float32[], or None for none.
    """

    schedule: Schedule
    moments: tuple[optax.Params, ...]
    weight_decay: jax.Array | None


def create_optimizer(
    name: OptimizerName,
    learning_rate: float | jax.Array,
    *,
    schedule: ScheduleName = "constant",
    total_steps: int | jax.Array | None = None,
    weight_decay: float | jax.Array | None = None,
) -> Optimizer:
    """Makes an optimizer.

    Args:
      name: "adam" (beta 0.9 and 0.999, epsilon 1e-7), "rmsprop" (rho 0.9, epsilon 1e-7 inside the
        root) or "sgd" (momentum 0.9); the numbers are Keras' defaults but for the momentum.
      learning_rate: the schedule's peak.
      schedule: "constant"; "cosine", half a cosine from the peak to 0; or "one_cycle" (Smith and
        Topin 2018 with fast.ai's cosine form): up from 1/25 in the first 30 % of the steps, then
        down to 1/250,000.
      total_steps: length of the run in updates, which every schedule but "constant" needs. After
        it, the learning rate stays where it ended.
      weight_decay: each update also takes so much of every kernel (no bias) times the learning
        rate away, apart from the gradient (Loshchilov and Hutter 2019). None is 0.

    Returns:
      An optax transformation. `update` needs no params but for weight decay. Learning rate, length
      and weight decay may be traced.

    Raises:
      ConfigError: if a name is unknown, or the schedule needs `total_steps`.

    Example:
      >>> tx = create_optimizer("sgd", 0.1)
      >>> updates, _ = tx.update({"w": jnp.ones(())}, tx.init({"w": jnp.zeros(())}))
      >>> round(float(updates["w"]), 6)
      -0.1
    """
    if name not in _OPTIMIZERS:
        raise ConfigError(f"unknown optimizer {name!r}; choose one of {', '.join(_OPTIMIZERS)}")
    if schedule not in _SCHEDULES:
        raise ConfigError(f"unknown schedule {schedule!r}; choose one of {', '.join(_SCHEDULES)}")
    if total_steps is None and schedule != "constant":
        raise ConfigError(f"the {schedule} schedule needs total_steps, the length of the run")
    num_moments, _ = _OPTIMIZERS[name]

    def init(params: optax.Params) -> OptimizerState:
        zeros = jax.tree.map(jnp.zeros_like, params)
        return OptimizerState(
            Schedule(
                jnp.int32(0),
                jnp.asarray(learning_rate, jnp.float32),
                jnp.asarray(1 if total_steps is None else total_steps, jnp.int32),
            ),
            (zeros,) * num_moments,
            None if weight_decay is None else jnp.asarray(weight_decay, jnp.float32),
        )

    return Optimizer(init, _UPDATES[name, schedule])


def learning_rate_at(schedule: Schedule, name: ScheduleName) -> jax.Array:
    """The learning rate of the next update, float32[]."""
    progress = jnp.minimum(schedule.step / schedule.total_steps, 1.0)
    return schedule.learning_rate * _SCHEDULES[name](progress)


def _adam(gradient, mean, square, learning_rate, step):
    # As keras.optimizers.Adam writes it, operation for operation.
    count = (step + 1).astype(jnp.float32)
    rate = learning_rate * jnp.sqrt(1 - jnp.power(0.999, count)) / (1 - jnp.power(0.9, count))
    mean = mean + (gradient - mean) * (1 - 0.9)
    square = square + (jnp.square(gradient) - square) * (1 - 0.999)
    return -(mean * rate) / (jnp.sqrt(square) + 1e-7), mean, square


def _rmsprop(gradient, square, learning_rate, step):
    del step
    square = 0.9 * square + (1 - 0.9) * jnp.square(gradient)
    return -(learning_rate * gradient) / jnp.sqrt(square + 1e-7), square


def _sgd(gradient, momentum, learning_rate, step):
    del step
    momentum = 0.9 * momentum - learning_rate * gradient
    return momentum, momentum


# Number of moments, and (gradient, *moments, learning_rate, step) -> (update, *moments).
_OPTIMIZERS: dict[str, tuple[int, Callable[..., tuple[jax.Array, ...]]]] = {
    "adam": (2, _adam),
    "rmsprop": (1, _rmsprop),
    "sgd": (1, _sgd),
}


def _cosine(progress: jax.Array) -> jax.Array:
    """1 at progress 0, 0 at progress 1."""
    return 0.5 + 0.5 * jnp.cos(jnp.pi * progress)


def _one_cycle(progress: jax.Array) -> jax.Array:
    start, end, top = 1 / 25, 1 / 25 / 1e4, 0.3
    rising = start + (1 - start) * _cosine(1 - progress / top)
    falling = end + (1 - end) * _cosine((progress - top) / (1 - top))
    return jnp.where(progress < top, rising, falling)


# Share of the run, 0 to 1 -> share of the peak learning rate.
_SCHEDULES: dict[str, Callable[[jax.Array], jax.Array]] = {
    "constant": jnp.ones_like,
    "cosine": _cosine,
    "one_cycle": _one_cycle,
}


def _make_update(name: OptimizerName, schedule_name: ScheduleName) -> Callable[..., Any]:
    _, rule = _OPTIMIZERS[name]

    def update(
        grads: optax.Updates, opt_state: OptimizerState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, OptimizerState]:
        schedule, moments, weight_decay = opt_state
        learning_rate = learning_rate_at(schedule, schedule_name)
        results = jax.tree.map(
            lambda gradient, *moments: rule(gradient, *moments, learning_rate, schedule.step),
            grads,
            *moments,
        )
        updates, *moments = jax.tree.transpose(
            jax.tree.structure(grads), jax.tree.structure((0,) * (1 + len(moments))), results
        )
        if weight_decay is not None:
            updates = jax.tree.map(
                lambda update, param: (
                    update - learning_rate * weight_decay * param if param.ndim > 1 else update
                ),
                updates,
                params,
            )
        return updates, OptimizerState(schedule.advanced(), tuple(moments), weight_decay)

    return update


# Made once each, so that equal optimizers have the same `update`.
_UPDATES: dict[tuple[str, str], Callable[..., Any]] = {
    (name, schedule): _make_update(name, schedule)
    for name in get_args(OptimizerName)
    for schedule in get_args(ScheduleName)
}
