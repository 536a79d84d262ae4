"""The learning rate range test (Smith 2017): the loss while the learning rate grows."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fmnist_jax.data.batches import epoch_order
from fmnist_jax.errors import ConfigError
from fmnist_jax.train.loop import TrainInputs, take_step, with_microbatch_size
from fmnist_jax.train.step import StepConfig, TrainState
from fmnist_jax.xla.jit import platform_jit

# The curve ends where the smoothed loss exceeds its minimum by this factor, as in fastai.
_DIVERGED = 4.0

# Weight of the past in the smoothed loss; it averages over some ten steps.
_SMOOTHING = 0.9


class RateCurve(NamedTuple):
    """The loss by learning rate.

    Attributes:
      rates: float32[k], the learning rate of each step.
      losses: float32[k], the mean loss of each step's batch, before its update.
      smoothed: float64[k], their exponential moving average.
      suggestion: the rate at which the smoothed loss falls fastest.
    """

    rates: np.ndarray
    losses: np.ndarray
    smoothed: np.ndarray
    suggestion: float


def find_learning_rate(
    state: TrainState,
    inputs: TrainInputs,
    *,
    config: StepConfig,
    low: float = 1e-5,
    high: float = 10.0,
    num_steps: int = 100,
) -> RateCurve:
    """Takes steps while the learning rate grows, in one compiled call.

    The state is copied and not changed.

    Args:
      state: where to start from, usually the initial state.
      inputs: what training reads; the learning rate is ignored.
      config: what is fixed at compile time; its schedule is ignored.
      low: the first learning rate, above 0.
      high: the last one, above `low`.
      num_steps: number of steps, at least 10.

    Returns:
      The curve up to where the loss diverged.

    Raises:
      ConfigError: if a value is outside its range, the learning rate has no effect on the
        optimizer, or the loss diverged within ten steps or never fell.
      TypeError: as `train_steps`.
      ValueError: as `train_steps`.

    Example:
      >>> import fmnist_jax as fm
      >>> data = fm.load_fashion_mnist(sample=True)
      >>> config = StepConfig(model=fm.create_model("valid_2x2"), tx=fm.create_optimizer("adam"))
      >>> inputs = fm.TrainInputs(
      ...     data.train_images, data.train_labels, fm.create_streams(0), examples=jnp.arange(500)
      ... )
      >>> state = fm.create_train_state(inputs.streams.init, config)
      >>> curve = find_learning_rate(state, inputs, config=config, high=0.1, num_steps=10)
      >>> curve.losses.shape, bool(1e-5 <= curve.suggestion <= 0.1)
      ((10,), True)
    """
    if not 0 < low < high:
        raise ConfigError(f"low is {low} and high is {high}; expected 0 < low < high")
    if num_steps < 10:
        raise ConfigError(f"num_steps is {num_steps}; expected at least 10")
    inputs = inputs.checked()
    order = epoch_order(inputs.streams.shuffle, 0, inputs.examples)
    rates = np.geomspace(low, high, num_steps).astype(np.float32)
    losses = np.asarray(
        _losses(state, inputs._replace(examples=order), jnp.asarray(rates), config=config)
    )
    smoothed = _smooth(losses)
    diverged = ~np.isfinite(smoothed) | (smoothed > _DIVERGED * np.minimum.accumulate(smoothed))
    length = int(np.argmax(diverged)) if diverged.any() else num_steps
    if length < 10:
        raise ConfigError(
            f"the loss diverged after {length} of {num_steps} steps; choose more steps, or a "
            f"smaller low or high than {low} and {high}"
        )
    if np.argmin(smoothed[:length]) == 0:
        raise ConfigError(
            f"the loss does not fall at any rate from {low} to {rates[length - 1]:.3g}; choose "
            "more steps, or a larger low"
        )
    rates, losses, smoothed = rates[:length], losses[:length], smoothed[:length]
    slope = np.gradient(smoothed, np.log(rates))
    # A decrease after the minimum is noise.
    steepest = int(np.argmin(slope[: int(np.argmin(smoothed)) + 1]))
    return RateCurve(rates, losses, smoothed, float(rates[steepest]))


@platform_jit(static_argnames=("config",))
def _losses(
    state: TrainState, inputs: TrainInputs, rates: jax.Array, *, config: StepConfig
) -> jax.Array:
    """Returns float32[steps], the mean loss of each step."""
    # On the default device, whatever the layout of the training.
    config = dataclasses.replace(config, schedule=None, layout=config.layout.on_one_device())
    config = with_microbatch_size(config, state, inputs)

    def body(state: TrainState, rate: jax.Array) -> tuple[TrainState, jax.Array]:
        hyperparams = inputs.hyperparams._replace(learning_rate=rate)
        state, metrics = take_step(state, inputs._replace(hyperparams=hyperparams), config=config)
        return state, metrics.loss / metrics.num_examples

    return lax.scan(body, state._replace(step=jnp.int32(0)), rates)[1]


def _smooth(losses: np.ndarray) -> np.ndarray:
    """Exponential moving average without the bias towards 0 at the start."""
    average, smoothed = 0.0, []
    for count, loss in enumerate(losses.astype(np.float64), 1):
        average = _SMOOTHING * average + (1 - _SMOOTHING) * loss
        smoothed.append(average / (1 - _SMOOTHING**count))
    return np.array(smoothed)
