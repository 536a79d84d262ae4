"""The training step: one optimizer update as a pure function.

`StepConfig` holds what is fixed when a step is compiled. `Hyperparams` holds scalars that may be
traced: other values reuse the compiled program, and `vmap` or `lax.map` can train with many.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from fmnist_jax.config import check_shards
from fmnist_jax.data.augment import Augmentation
from fmnist_jax.data.batches import Batch
from fmnist_jax.train import metrics as metrics_lib
from fmnist_jax.train.metrics import Metrics, Norms, cross_entropy
from fmnist_jax.train.optim import Schedule
from fmnist_jax.xla.jit import platform_jit
from fmnist_jax.xla.mesh import AXIS, local_shards, sum_shards
from fmnist_jax.xla.noinline import inlining, reproducible

LossFn = Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepConfig:
    """Everything that is fixed at compile time; each distinct value is one compiled program.

    Attributes:
      model: a Linen module, or any hashable object with its `init` and `apply`. It is called as
        `model.apply(variables, images, train=..., rngs={"dropout": key})` with images
        float32[batch, height, width, 1] in [0, 1], and returns logits, float[batch, num_classes].
        Variables other than its parameters, such as batch statistics, are updated in training:
        then `mutable` is passed too, and with `Hyperparams.dropout` the rate as `dropout`.
      tx: an optax transformation. `learning_rate` and `weight_decay` of `Hyperparams` are passed
        to its `update` as extra arguments; optax's own optimizers ignore them.
      batch_size: examples per step, at least 1.
      loss: maps logits, float[batch, num_classes], and labels, int32[batch], to float[batch]. With
        `Hyperparams.label_smoothing` it gets that as a third argument.
      augment: applied to every training image; None only scales to [0, 1].
      schedule: maps the fraction of the run that is done to a fraction of the learning rate; None
        is constant. It needs `Hyperparams.total_steps`.
      dtype: the model computes in it, from parameters and images that are cast to it; bfloat16 is
        for accelerators. Parameters, updates, loss and metrics stay float32.
      microbatch_size: examples that go through the model at once; their gradients are summed. The
        update is the same but for rounding, for dropout, where each microbatch has its own key,
        and for batch normalization, which sees each microbatch alone. None chooses
        (`train_steps`) or takes the whole batch (`train_step`).
      shards: equal parts of a batch whose gradients are computed apart, each with its own dropout
        key, batch normalization and microbatches, and summed in a fixed order; a power of two that
        divides `batch_size`. Batch statistics are averaged over them. The bits of a training depend
        on the number of shards, and not on the number of devices that compute them.
      mesh: devices that share the shards of each batch, from `create_mesh`; their number divides
        `shards`. None is one device.
      log_norms: whether the metrics have the norms of gradient, parameters and updates.

    Raises:
      ValueError: if a size is below 1, or `shards` is no multiple of the number of devices.
      ConfigError: if `shards` is no power of two that divides the batch size.
    """

    model: Any
    tx: optax.GradientTransformation
    batch_size: int = 128
    loss: LossFn = cross_entropy
    augment: Augmentation | None = None
    schedule: Schedule | None = None
    dtype: Any = jnp.float32
    microbatch_size: int | None = None
    shards: int = 1
    mesh: jax.sharding.Mesh | None = None
    log_norms: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        for name in ("batch_size", "microbatch_size"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"{name} is {size}; expected at least 1")
        check_shards(self.shards, self.batch_size)
        if self.mesh is not None and self.shards % self.mesh.size:
            raise ValueError(f"shards is {self.shards}, but the mesh has {self.mesh.size} devices")

    @property
    def shard_size(self) -> int:
        """Examples in a shard."""
        return self.batch_size // self.shards


class Hyperparams(NamedTuple):
    """Scalars of a training that may be traced.

    Attributes:
      learning_rate: peak of the schedule, above 0; None for an optimizer with its own.
      total_steps: length of the schedule in steps; None where the schedule is constant.
      weight_decay: decoupled, at least 0; None is none.
      dropout: one rate in [0, 1) for all dropout layers; None leaves each layer its own.
      label_smoothing: fraction of the target spread over all classes, in [0, 1); None is 0.
      augmentation: scales every range of the augmentation, at least 0; None is 1.
    """

    learning_rate: float | jax.Array | None = None
    total_steps: int | jax.Array | None = None
    weight_decay: float | jax.Array | None = None
    dropout: float | jax.Array | None = None
    label_smoothing: float | jax.Array | None = None
    augmentation: float | jax.Array | None = None


DEFAULTS = Hyperparams()


class TrainState(NamedTuple):
    """Everything that training changes, as a pytree of arrays.

    Attributes:
      step: int32[], number of steps taken.
      params: the model's parameters.
      model_state: the model's other collections, such as {"batch_stats": ...}; {} if none.
      opt_state: the optimizer's state.
    """

    step: jax.Array
    params: Any
    model_state: Any
    opt_state: Any

    @property
    def variables(self) -> dict[str, Any]:
        """The model's variables, as its `apply` takes them."""
        return {"params": self.params, **self.model_state}


def create_train_state(
    key: jax.Array, config: StepConfig, *, image_shape: tuple[int, int] = (28, 28)
) -> TrainState:
    """Draws the initial state.

    Args:
      key: a typed PRNG key, used here and nowhere else.
      config: its model and optimizer.
      image_shape: height and width of the images that the model will see.

    Example:
      >>> import fmnist_jax as fm
      >>> config = StepConfig(model=fm.create_model("same_3x3"), tx=optax.sgd(0.1))
      >>> state = create_train_state(jax.random.key(0), config)
      >>> sum(leaf.size for leaf in jax.tree.leaves(state.params))
      423338
    """
    return _create_train_state(key, model=config.model, tx=config.tx, image_shape=image_shape)


# One program in place of some twenty small ones.
@platform_jit(static_argnames=("model", "tx", "image_shape"), quick=True)
def _create_train_state(
    key: jax.Array, *, model: Any, tx: optax.GradientTransformation, image_shape: tuple[int, int]
) -> TrainState:
    images = jnp.zeros((1, *image_shape, 1), jnp.float32)
    variables = dict(model.init(key, images, train=False))
    params = variables.pop("params")
    # Copied, because an optimizer may return one array twice, and donated arrays must be distinct.
    opt_state = jax.tree.map(jnp.copy, tx.init(params))
    return TrainState(jnp.int32(0), params, variables, opt_state)


def train_step(
    state: TrainState,
    batch: Batch,
    key: jax.Array,
    hyperparams: Hyperparams = DEFAULTS,
    *,
    config: StepConfig,
) -> tuple[TrainState, Metrics]:
    """Updates the parameters by the mean loss over a batch.

    A plain function, to be called as it is or under `jit`, `vmap` and loops. With a mesh, it is
    called on each of its devices (`on_each_device`).

    Args:
      state: the current state.
      batch: images, labels and mask; with a mesh, the shards of this device.
      key: a typed PRNG key for dropout, used here and nowhere else.
      hyperparams: scalars that may be traced.
      config: what is fixed at compile time; `augment` is not applied here.

    Returns:
      The next state, and the metrics of the batch before the update, with dropout.

    Raises:
      TypeError: if the images are not float.
      ValueError: if the loss does not return one value per example, the batch cannot be split into
        shards, or that of a model with other variables than parameters into equal microbatches.
      ConfigError: if the optimizer needs a learning rate and none is given.
    """
    grads, model_state, metrics, _, _ = compute_grads(state, batch, key, hyperparams, config=config)
    learning_rate = _learning_rate(state.step, hyperparams, config.schedule)
    arguments = (grads, state.opt_state, state.params, learning_rate, hyperparams.weight_decay)
    update = functools.partial(_update, config.tx)
    if config.shards == 1:
        params, opt_state = update(*arguments)
    else:
        params, opt_state = reproducible(inlining(update), *arguments)
    if config.log_norms:
        updates = jax.tree.map(jnp.subtract, params, state.params)
        trees = (grads, state.params, updates)
        metrics = metrics._replace(norms=Norms(*(optax.tree.norm(tree) for tree in trees)))
    return TrainState(state.step + 1, params, model_state, opt_state), metrics


def _update(
    tx: optax.GradientTransformation,
    grads: Any,
    opt_state: Any,
    params: Any,
    learning_rate: jax.Array | None,
    weight_decay: float | jax.Array | None,
) -> tuple[Any, Any]:
    updates, opt_state = optax.with_extra_args_support(tx).update(
        grads, opt_state, params, learning_rate=learning_rate, weight_decay=weight_decay
    )
    return optax.apply_updates(params, updates), opt_state


class StepGrads(NamedTuple):
    """What `compute_grads` returns.

    Attributes:
      grads: the gradient of the mean loss over the batch's unmasked examples, like `params`.
      model_state: the next `model_state`.
      metrics: those of the batch.
      losses: float[batch]; with a mesh, of this device's shards.
      logits: float[batch, num_classes], likewise.
    """

    grads: Any
    model_state: Any
    metrics: Metrics
    losses: jax.Array
    logits: jax.Array


def compute_grads(
    state: TrainState,
    batch: Batch,
    key: jax.Array,
    hyperparams: Hyperparams = DEFAULTS,
    *,
    config: StepConfig,
) -> StepGrads:
    """Computes the gradient that `train_step` applies; the same arguments and errors."""
    if not jnp.issubdtype(batch.images.dtype, jnp.floating):
        raise TypeError(f"batch.images are {batch.images.dtype}; expected float in [0, 1]")
    num_examples = jnp.sum(batch.mask)
    compute = functools.partial(_compute_shard, config=config)
    if config.shards == 1:
        return compute(state.params, state.model_state, batch, key, hyperparams, num_examples)

    if config.mesh is not None:
        num_examples = lax.psum(num_examples, AXIS)
    numbers = local_shards(config.shards, config.mesh)
    if len(batch.labels) != len(numbers) * config.shard_size:
        raise ValueError(
            f"the batch has {len(batch.labels)} examples; expected {len(numbers)} shards of "
            f"{config.shard_size}"
        )
    # One after the other, so that their number on this device changes nothing in one of them.
    computed = lax.map(
        lambda shard: reproducible(
            inlining(compute), state.params, state.model_state, *shard, hyperparams, num_examples
        ),
        (_split(batch, config.shard_size), jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)),
    )
    losses, logits = _join((computed.losses, computed.logits))
    grads, model_state, metrics = sum_shards(computed[:3], config.mesh)
    model_state = jax.tree.map(lambda leaf: (leaf / config.shards).astype(leaf.dtype), model_state)
    metrics = metrics._replace(finite_steps=jnp.isfinite(metrics.loss).astype(jnp.int32))
    return StepGrads(grads, model_state, metrics, losses, logits)


def _compute_shard(
    params: Any,
    model_state: Any,
    batch: Batch,
    key: jax.Array,
    hyperparams: Hyperparams,
    num_examples: jax.Array,
    *,
    config: StepConfig,
) -> StepGrads:
    """Computes the part of the gradient that a shard contributes to the mean of the batch."""
    grad = jax.grad(functools.partial(_mean_loss, config=config), has_aux=True)
    size = config.microbatch_size
    if size is None or size >= len(batch.labels):
        grads, (model_state, losses, logits) = grad(
            params, model_state, batch, key, hyperparams, num_examples
        )
    else:
        if model_state and len(batch.labels) % size:
            raise ValueError(
                f"microbatch_size is {size} for batches of {len(batch.labels)}, but the model has "
                f"{', '.join(model_state)}, which would see the padding of the last microbatch; "
                "use a divisor of the batch size"
            )
        microbatches = _split(batch, size)
        keys = jax.random.split(key, len(microbatches.labels))

        def add(carry: Any, microbatch: tuple[Batch, jax.Array]) -> Any:
            sums, model_state = carry
            grads, (model_state, losses, logits) = grad(
                params, model_state, *microbatch, hyperparams, num_examples
            )
            return (jax.tree.map(jnp.add, sums, grads), model_state), (losses, logits)

        zeros = jax.tree.map(jnp.zeros_like, params)
        (grads, model_state), outputs = lax.scan(add, (zeros, model_state), (microbatches, keys))
        losses, logits = jax.tree.map(lambda array: array[: len(batch.labels)], _join(outputs))
    metrics = metrics_lib.measure(losses, logits, batch.labels, batch.mask)
    return StepGrads(grads, model_state, metrics, losses, logits)


def _mean_loss(
    params: Any,
    model_state: Any,
    batch: Batch,
    key: jax.Array,
    hyperparams: Hyperparams,
    num_examples: jax.Array,
    *,
    config: StepConfig,
) -> tuple[jax.Array, Any]:
    params = jax.tree.map(lambda leaf: leaf.astype(config.dtype), params)
    options: dict[str, Any] = {}
    if hyperparams.dropout is not None:
        options["dropout"] = hyperparams.dropout
    if model_state:
        options["mutable"] = list(model_state)
    outputs = config.model.apply(
        {"params": params, **model_state},
        batch.images.astype(config.dtype),
        train=True,
        rngs={"dropout": key},
        **options,
    )
    logits, model_state = outputs if model_state else (outputs, model_state)
    logits = logits.astype(batch.images.dtype)
    smoothing = hyperparams.label_smoothing
    losses = example_losses(
        config.loss, logits, batch.labels, *(() if smoothing is None else (smoothing,))
    )
    loss = jnp.sum(jnp.where(batch.mask, losses, 0)) / num_examples
    return loss, (model_state, losses, logits)


def example_losses(loss: LossFn, logits: jax.Array, labels: jax.Array, *options: Any) -> jax.Array:
    """Calls the loss and checks that it returns float[batch].

    Raises:
      ValueError: if it does not return one value per example.
    """
    losses = loss(logits, labels, *options)
    if losses.shape != labels.shape:
        raise ValueError(
            f"the loss has shape {losses.shape}; expected one value per example, {labels.shape}"
        )
    return losses


def _learning_rate(
    step: jax.Array, hyperparams: Hyperparams, schedule: Schedule | None
) -> jax.Array | None:
    learning_rate, total_steps = hyperparams.learning_rate, hyperparams.total_steps
    if learning_rate is None:
        if schedule is not None:
            raise ValueError(
                "the schedule scales Hyperparams.learning_rate, which is None; leave it out for an "
                "optimizer with a learning rate of its own"
            )
        return None
    learning_rate = jnp.asarray(learning_rate, jnp.float32)
    if schedule is None:
        return learning_rate
    if total_steps is None:
        raise ValueError("the schedule needs total_steps, the length of the run; it is None")
    return learning_rate * schedule(jnp.minimum(step / total_steps, 1.0))


def _split(batch: Batch, size: int) -> Batch:
    """Reshapes to [num_microbatches, size, ...]; the last one is filled up with masked zeros."""
    num_microbatches = -(-len(batch.labels) // size)

    def split(array: jax.Array) -> jax.Array:
        missing = num_microbatches * size - len(array)
        padded = jnp.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1))
        return padded.reshape(num_microbatches, size, *array.shape[1:])

    return jax.tree.map(split, batch)


def _join(tree: Any) -> Any:
    """Reshapes leaves [parts, size, ...] to [parts * size, ...]."""
    return jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:]), tree)
