"""The training loop: many steps in one compiled program, and epochs of such calls."""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fmnist_jax.data.batches import (
    Batch,
    check_labels,
    checked_images,
    epoch_order,
    input_shape,
    read_batch,
    steps_per_epoch,
)
from fmnist_jax.rng import Streams
from fmnist_jax.train import metrics as metrics_lib
from fmnist_jax.train.metrics import Metrics
from fmnist_jax.train.microbatch import choose_microbatch_size
from fmnist_jax.train.predict import abstract_logits
from fmnist_jax.train.step import (
    DEFAULTS,
    Hyperparams,
    StepConfig,
    TrainState,
    check_hyperparams,
    train_step,
)
from fmnist_jax.xla.jit import is_deleted, platform_jit

# Maps the step and the steps that are left in its epoch to the steps of the next compiled call.
NextNumSteps = Callable[[int, int], int]


class TrainInputs(NamedTuple):
    """What training reads and does not change; arrays of JAX or NumPy.

    Attributes:
      images: uint8[n, height, width], values 0 to 255.
      labels: int32[n], values in [0, num_classes).
      streams: the random streams of the run; `shuffle`, `augment` and `dropout` are used.
      hyperparams: scalars that may be traced.
      examples: int32[m], positions of the training examples in `images`, m >= 1; None is all.
    """

    images: Any
    labels: Any
    streams: Streams
    hyperparams: Hyperparams = DEFAULTS
    examples: Any = None

    def checked(self) -> "TrainInputs":
        """Returns the inputs with images uint8[n, height, width] and with `examples`.

        Raises:
          TypeError: if images are not uint8, labels or examples are not integers, or hyperparams
            are not `Hyperparams`.
          ValueError: if shapes do not fit together.
        """
        check_hyperparams(self.hyperparams)
        images = checked_images(self.images)
        check_labels(images, self.labels)
        examples = jnp.arange(len(images)) if self.examples is None else self.examples
        if not (examples.ndim == 1 and jnp.issubdtype(examples.dtype, jnp.integer)):
            raise TypeError(
                f"examples are {examples.dtype}{list(examples.shape)}; expected int32[m]"
            )
        if not examples.size:
            raise ValueError("examples is empty; expected at least one position")
        return self._replace(images=images, examples=examples)


@platform_jit(static_argnames=("config",), donate_argnames=("state",))
def train_steps(
    state: TrainState,
    inputs: TrainInputs,
    num_steps: int | jax.Array,
    metrics: Metrics | None = None,
    *,
    config: StepConfig,
) -> tuple[TrainState, Metrics]:
    """Takes `num_steps` steps in one compiled loop.

    `num_steps` is traced: one program serves every value. The bits of the state do not depend on
    how an epoch is cut into calls, nor do those of the metrics if they are passed on. The step
    number is the position in the epoch and in the random streams.

    Args:
      state: the current state. Donated: its arrays are invalid afterwards.
      inputs: what the steps read. `examples` are those of this epoch in their order
        (`epoch_order`). The last batch of the epoch holds the remainder; each example counts once.
      num_steps: int32[]. Stop at the end of an epoch to pass the order of the next one; further
        steps would repeat the same order.
      metrics: sums over the epoch so far; None starts at zero.
      config: what is fixed at compile time.

    Returns:
      The state after `num_steps` steps, and the metrics over their examples, with dropout.

    Raises:
      TypeError: if images are not uint8, or labels or examples are not integers.
      ValueError: if shapes do not fit together.
      ConfigError: as `train_step`.
    """
    inputs = inputs.checked()
    config = with_microbatch_size(config, state, inputs)
    metrics = metrics_lib.zeros(config.log_norms) if metrics is None else metrics

    def loop(
        state: TrainState, metrics: Metrics, inputs: TrainInputs, num_steps: int | jax.Array
    ) -> tuple[TrainState, Metrics]:
        def body(_: jax.Array, carry: tuple[TrainState, Metrics]) -> tuple[TrainState, Metrics]:
            state, metrics = carry
            state, step_metrics = take_step(state, inputs, config=config)
            return state, metrics_lib.merge(metrics, step_metrics)

        return lax.fori_loop(0, num_steps, body, (state, metrics))

    return config.layout.run(loop, state, metrics, inputs, num_steps)


def take_step(
    state: TrainState, inputs: TrainInputs, *, config: StepConfig
) -> tuple[TrainState, Metrics]:
    """Reads the batch of the next step and updates the parameters; as `train_step`."""
    step_inputs = read_step(inputs, state.step, config=config)
    return train_step(state, step_inputs.batch, step_inputs.key, inputs.hyperparams, config=config)


class StepInputs(NamedTuple):
    """What one step reads; with several devices, the part of this device.

    Attributes:
      examples: int32[batch], positions of the images in the training images.
      batch: images, labels and mask.
      key: the step's key for dropout.
    """

    examples: jax.Array
    batch: Batch
    key: jax.Array


def read_step(inputs: TrainInputs, step: jax.Array, *, config: StepConfig) -> StepInputs:
    """Reads what the step with this number, counted from 0, needs.

    Args:
      inputs: with the examples of its epoch in their order.
      step: int32[].
      config: what is fixed at compile time.
    """
    read = functools.partial(
        read_batch,
        inputs.images,
        inputs.labels,
        inputs.examples,
        step,
        inputs.streams,
        batch_size=config.batch_size,
        augment=config.augment,
        strength=inputs.hyperparams.augmentation_strength,
    )
    examples, batch = config.layout.read(read, config.batch_size)
    return StepInputs(examples, batch, jax.random.fold_in(inputs.streams.dropout, step))


def train_epoch(
    state: TrainState,
    inputs: TrainInputs,
    metrics: Metrics | None = None,
    *,
    config: StepConfig,
    next_num_steps: NextNumSteps | None = None,
) -> Iterator[tuple[TrainState, Metrics]]:
    """Takes the remaining steps of the epoch that the state is in.

    Args:
      state: the current state. Donated, like each state that is yielded but the last.
      inputs: what training reads; the order of the examples is drawn for each epoch.
      metrics: sums over the epoch so far; None starts at zero.
      config: what is fixed at compile time.
      next_num_steps: called before each compiled call with the step and the number of steps that
        are left in the epoch; returns how many to take, at least one. None takes them all in one
        call.

    Yields:
      The state and the metrics of the epoch so far, after each compiled call.

    Raises:
      TypeError: as `train_steps`.
      ValueError: as `train_steps`; if the state was donated to an earlier call; if a label or an
        example is outside its range; or if `next_num_steps` returns a number outside its range.
      ConfigError: as `train_step`.

    Example:
      >>> import fmnist_jax as fm
      >>> data = fm.load_fashion_mnist(sample=True)
      >>> config = StepConfig(model=fm.create_model("valid_2x2"), tx=fm.create_optimizer("adam"))
      >>> inputs = TrainInputs(
      ...     data.train_images, data.train_labels, fm.create_streams(0), Hyperparams(1e-3),
      ...     examples=jnp.arange(500),
      ... )
      >>> state = fm.create_train_state(inputs.streams.init, config)
      >>> for state, metrics in train_epoch(state, inputs, config=config):
      ...     print(int(state.step), int(metrics.num_examples))
      4 500
    """
    inputs = config.layout.place(_in_range(inputs.checked(), state, config))
    num_steps = steps_per_epoch(len(inputs.examples), config.batch_size)
    epoch, done = divmod(int(state.step), num_steps)
    order = epoch_order(inputs.streams.shuffle, epoch, inputs.examples)
    metrics = metrics_lib.zeros(config.log_norms) if metrics is None else metrics
    state, metrics, order = config.layout.place((state, metrics, order))
    while done < num_steps:
        left = num_steps - done
        count = left if next_num_steps is None else next_num_steps(int(state.step), left)
        if not 1 <= count <= left:
            raise ValueError(f"next_num_steps returned {count} for {left} steps that are left")
        state, metrics = train_steps(
            state, inputs._replace(examples=order), jnp.int32(count), metrics, config=config
        )
        done += count
        yield state, metrics


def train_epochs(
    state: TrainState,
    inputs: TrainInputs,
    num_epochs: int,
    metrics: Metrics | None = None,
    *,
    config: StepConfig,
    next_num_steps: NextNumSteps | None = None,
) -> Iterator[tuple[TrainState, Metrics]]:
    """Takes the remaining steps of `num_epochs` epochs, counted from step 0, epoch by epoch.

    Args:
      state: as for `train_epoch`.
      inputs: as for `train_epoch`.
      num_epochs: number of epochs after which training ends.
      metrics: sums over the epoch that the state is in; None starts at zero.
      config: as for `train_epoch`.
      next_num_steps: as for `train_epoch`; None makes one call of each epoch.

    Yields:
      The state and the metrics of its epoch so far, after each compiled call.

    Raises:
      TypeError: as `train_epoch`.
      ValueError: as `train_epoch`.
      ConfigError: as `train_epoch`.
    """
    inputs = config.layout.place(_in_range(inputs.checked(), state, config))
    total_steps = num_epochs * steps_per_epoch(len(inputs.examples), config.batch_size)
    while int(state.step) < total_steps:
        calls = train_epoch(state, inputs, metrics, config=config, next_num_steps=next_num_steps)
        for state, metrics in calls:
            yield state, metrics
        metrics = None


def _in_range(inputs: TrainInputs, state: TrainState, config: StepConfig) -> TrainInputs:
    """Returns the inputs, after checking the values that a compiled program cannot refuse."""
    if is_deleted(state.step):
        raise ValueError(
            "the state was donated to an earlier call; continue with the state that it returned"
        )
    image_shape = seen_image_shape(inputs, config)
    num_outputs = abstract_logits(state.variables, image_shape, model=config.model).shape[-1]
    for name, values, size in (
        ("labels", np.asarray(inputs.labels), num_outputs),
        ("examples", np.asarray(inputs.examples), len(inputs.images)),
    ):
        if values.min() < 0 or values.max() >= size:
            noun = "outputs of the model" if name == "labels" else "images"
            raise ValueError(
                f"{name} are from {values.min()} to {values.max()}, but there are {size:,} {noun}"
                f"; expected values from 0 to {size - 1:,}"
            )
    return inputs


def seen_image_shape(inputs: TrainInputs, config: StepConfig) -> tuple[int, ...]:
    """Returns height, width and channels of the images that the model sees."""
    height, width, channels = input_shape(inputs.images.shape[1:])
    size = getattr(config.augment, "image_size", None)
    return (height if size is None else size, width if size is None else size, channels)


def with_microbatch_size(config: StepConfig, state: TrainState, inputs: TrainInputs) -> StepConfig:
    """Fills in the microbatch size that `train_steps` uses for these images."""
    if config.microbatch_size is not None:
        return config
    part_size = config.layout.part_size(config.batch_size)
    image_shape = seen_image_shape(inputs, config)
    size = choose_microbatch_size(state.variables, config.model, image_shape, part_size)
    return dataclasses.replace(config, microbatch_size=size)
