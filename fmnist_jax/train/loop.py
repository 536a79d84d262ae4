"""The training loop: many steps in one compiled program, and an epoch of such calls."""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from jax import lax

from fmnist_jax.data.batches import (
    Batch,
    check_labels,
    checked_images,
    epoch_order,
    read_batch,
    steps_per_epoch,
)
from fmnist_jax.rng import Streams
from fmnist_jax.train import metrics as metrics_lib
from fmnist_jax.train.metrics import Metrics
from fmnist_jax.train.microbatch import choose_microbatch_size
from fmnist_jax.train.step import DEFAULTS, Hyperparams, StepConfig, TrainState, train_step
from fmnist_jax.xla.jit import platform_jit
from fmnist_jax.xla.mesh import local_shards, on_each_device, replicate


@platform_jit(static_argnames=("config",), donate_argnames=("state",))
def train_steps(
    state: TrainState,
    images: jax.Array,
    labels: jax.Array,
    order: jax.Array,
    streams: Streams,
    num_steps: int | jax.Array,
    hyperparams: Hyperparams = DEFAULTS,
    metrics: Metrics | None = None,
    *,
    config: StepConfig,
) -> tuple[TrainState, Metrics]:
    """Takes `num_steps` steps in one compiled loop.

    `num_steps` is traced: one program serves every value. However an epoch is cut into calls, the
    bits of the state are the same, and those of the metrics too if they are passed on. The step
    number tells where in the epoch and in the random streams the state is.

    Args:
      state: the current state. Donated: its arrays are invalid afterwards.
      images: uint8[n, height, width], all training images.
      labels: int32[n], values in [0, num_classes).
      order: int32[m], the examples of this epoch in their order. The last batch of the epoch holds
        the remainder; each example counts once.
      streams: the run's random streams; `augment` and `dropout` are used.
      num_steps: int32[]. Stop at the end of an epoch to pass the order of the next one; further
        steps would repeat the same order.
      hyperparams: scalars that may be traced.
      metrics: sums over the epoch so far; None starts at zero.
      config: what is fixed at compile time.

    Returns:
      The state after `num_steps` steps, and the metrics over their examples, with dropout.

    Raises:
      TypeError: if the images are not uint8, or labels or order are not integers.
      ValueError: if shapes do not fit together.
      ConfigError: if the optimizer needs a learning rate and none is given.
    """
    images = checked_images(images)
    check_labels(images, labels)
    if order.ndim != 1 or order.size < 1 or not jnp.issubdtype(order.dtype, jnp.integer):
        raise TypeError(f"order is {order.dtype}{list(order.shape)}; expected int32[m], m >= 1")
    config = with_microbatch_size(config, state, images.shape[1:3])

    sums = metrics_lib.zeros(config.log_norms) if metrics is None else metrics
    loop = functools.partial(_loop, config=config)
    if config.mesh is not None:
        loop = on_each_device(loop, config.mesh)
    return loop(state, sums, images, labels, order, streams, num_steps, hyperparams)


def _loop(
    state: TrainState,
    metrics: Metrics,
    images: jax.Array,
    labels: jax.Array,
    order: jax.Array,
    streams: Streams,
    num_steps: int | jax.Array,
    hyperparams: Hyperparams,
    *,
    config: StepConfig,
) -> tuple[TrainState, Metrics]:
    def body(_: jax.Array, carry: tuple[TrainState, Metrics]) -> tuple[TrainState, Metrics]:
        state, metrics = carry
        _, batch = read_shards(
            images, labels, order, state.step, streams, hyperparams, config=config
        )
        key = jax.random.fold_in(streams.dropout, state.step)
        state, step_metrics = train_step(state, batch, key, hyperparams, config=config)
        return state, metrics_lib.merge(metrics, step_metrics)

    return lax.fori_loop(0, num_steps, body, (state, metrics))


def read_shards(
    images: jax.Array,
    labels: jax.Array,
    order: jax.Array,
    step: jax.Array,
    streams: Streams,
    hyperparams: Hyperparams,
    *,
    config: StepConfig,
) -> tuple[jax.Array, Batch]:
    """Reads the batch of a step as `read_batch` does; with a mesh, the shards of this device."""
    read = functools.partial(
        read_batch,
        images,
        labels,
        order,
        step,
        streams,
        batch_size=config.batch_size,
        augment=config.augment,
        strength=hyperparams.augmentation,
    )
    if config.shards == 1:
        return read()
    shards = lax.map(
        lambda shard: read(first=shard * config.shard_size, num_rows=config.shard_size),
        local_shards(config.shards, config.mesh),
    )
    return jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:]), shards)


def train_epoch(
    state: TrainState,
    images: jax.Array,
    labels: jax.Array,
    examples: jax.Array,
    streams: Streams,
    hyperparams: Hyperparams = DEFAULTS,
    metrics: Metrics | None = None,
    *,
    config: StepConfig,
    next_num_steps: Callable[[int], int] | None = None,
) -> Iterator[tuple[TrainState, Metrics]]:
    """Takes the remaining steps of the epoch that the state is in.

    Args:
      state: the current state. Donated, like each state that is yielded but the last.
      images: as for `train_steps`.
      labels: as for `train_steps`.
      examples: int32[m], positions of the training examples in `images`.
      streams: the run's random streams.
      hyperparams: scalars that may be traced.
      metrics: sums over the epoch so far; None starts at zero.
      config: what is fixed at compile time.
      next_num_steps: called before each compiled call with the number of steps that are left;
        returns how many to take, at least one. None takes them all in one call.

    Yields:
      The state and the metrics of the epoch so far, after each compiled call.

    Raises:
      TypeError: as `train_steps`.
      ValueError: as `train_steps`, or if there are no examples, or `next_num_steps` returns a
        number outside its range.

    Example:
      >>> import fmnist_jax as fm
      >>> data, streams = fm.load_fashion_mnist(sample=True), fm.create_streams(0)
      >>> config = StepConfig(model=fm.create_model("valid_2x2"), tx=fm.create_optimizer("adam"))
      >>> state = fm.create_train_state(streams.init, config)
      >>> images, labels = jnp.asarray(data.train_images), jnp.asarray(data.train_labels)
      >>> for state, metrics in train_epoch(
      ...     state, images, labels, jnp.arange(500), streams, Hyperparams(1e-3), config=config
      ... ):
      ...     print(int(state.step), int(metrics.num_examples))
      4 500
    """
    if not len(examples):
        raise ValueError("examples is empty; expected at least one position")
    num_steps = steps_per_epoch(len(examples), config.batch_size)
    epoch, done = divmod(int(state.step), num_steps)
    order = epoch_order(streams.shuffle, epoch, examples)
    metrics = metrics_lib.zeros(config.log_norms) if metrics is None else metrics
    if config.mesh is not None:
        state, images, labels, order, streams, hyperparams, metrics = replicate(
            (state, images, labels, order, streams, hyperparams, metrics), config.mesh
        )
    while done < num_steps:
        left = num_steps - done
        count = left if next_num_steps is None else next_num_steps(left)
        if not 1 <= count <= left:
            raise ValueError(f"next_num_steps returned {count} for {left} steps that are left")
        state, metrics = train_steps(
            state,
            images,
            labels,
            order,
            streams,
            jnp.int32(count),
            hyperparams,
            metrics,
            config=config,
        )
        done += count
        yield state, metrics


def with_microbatch_size(
    config: StepConfig, state: TrainState, image_shape: tuple[int, ...]
) -> StepConfig:
    """Fills in the microbatch size that `train_steps` uses for images of this height and width."""
    if config.microbatch_size is not None:
        return config
    if config.augment is not None and config.augment.image_size is not None:
        image_shape = (config.augment.image_size,) * 2
    size = choose_microbatch_size(state.variables, config.model, image_shape, config.shard_size)
    return dataclasses.replace(config, microbatch_size=size)
