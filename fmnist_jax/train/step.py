"""The training step: one optimizer update as a pure function.

`StepConfig` holds what is fixed when a step is compiled. `Hyperparams` holds scalars that may be
traced: other values reuse the compiled program, and `vmap` or `lax.map` can train with many.
"""

import contextlib
import dataclasses
import functools
import inspect
from typing import Any, NamedTuple, Protocol, get_args

import jax
import jax.numpy as jnp
import optax
from jax import lax

from fmnist_jax.config import DtypeName
from fmnist_jax.data.augment import Augmentation
from fmnist_jax.data.batches import Batch, input_shape, join, split
from fmnist_jax.errors import ConfigError
from fmnist_jax.fast.rewrite import optimize_for_cpu
from fmnist_jax.nn.adapters import init_variables
from fmnist_jax.train import metrics as metrics_lib
from fmnist_jax.train.layout import ONE_DEVICE, Layout
from fmnist_jax.train.metrics import Metrics, Norms, cross_entropy
from fmnist_jax.train.optim import Schedule, check_scalars_act
from fmnist_jax.xla.jit import platform_jit


class Model(Protocol):
    """A network: a Linen module, or any hashable object with these two methods."""

    def init(self, key: jax.Array, images: jax.Array, /, *, train: bool) -> Any:
        """Returns the variables, {"params": ..., and other collections, if any}."""

    def apply(self, variables: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Returns the logits, float[batch, num_classes].

        Args:
          variables: as `init` returns them.
          *args: the images, float[batch, height, width, channels], values in [0, 1].
          **kwargs: `train`, whether dropout and batch statistics are those of training. In
            training also `rngs`, {"dropout": a typed key}; for a model with collections besides
            its parameters `mutable`, their names, and it then returns logits and their new
            values; and with `Hyperparams.dropout` that rate as `dropout`, for all layers.
        """


class Loss(Protocol):
    """A loss function, which maps logits and labels to one value per example."""

    def __call__(
        self, logits: jax.Array, labels: jax.Array, /, *args: Any, **kwargs: Any
    ) -> jax.Array:
        """Returns float[batch].

        Args:
          logits: float[batch, num_classes].
          labels: int[batch], values in [0, num_classes).
          *args: `Hyperparams.label_smoothing`, where it is not None. A parameter with a default
            must have that name, so that it is no other option.
          **kwargs: none.
        """


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepConfig:
    """Everything that is fixed at compile time; each distinct value is one compiled program.

    Attributes:
      model: the network.
      tx: an optax transformation. `learning_rate` and `weight_decay` of `Hyperparams` are passed
        to its `update` as extra arguments, and refused if they have no effect on it.
      batch_size: examples per step, at least 1.
      loss: the loss of each example; the gradient is that of their mean.
      augment: applied to every training image; None only scales to [0, 1].
      schedule: maps the fraction of the run that is done to a fraction of the learning rate; None
        is constant. It needs `Hyperparams.total_steps`.
      dtype: the model computes in it, from parameters and images that are cast to it; bfloat16 is
        for accelerators. Parameters, updates, loss and metrics stay float32.
      microbatch_size: examples that go through the model at once; their gradients are summed. The
        update is the same except for rounding, for dropout, where each microbatch has its own
        key, and for batch normalization, which uses the statistics of each microbatch. None chooses
        (`train_steps`) or takes the whole batch (`train_step`).
      layout: the devices, and how they divide a batch; `distributed.shards.Shards` has several.
      log_norms: whether the metrics have the norms of gradient, parameters and updates.
      optimize: whether slow operations of the model are replaced by faster forms on a CPU
        (`optimize_for_cpu`); values differ by rounding only.
      matmul_precision: "bfloat16" rounds the factors of the products that `optimize_for_cpu`
        replaces, and of all products and convolutions on other devices; everything else stays in
        `dtype`.

    Raises:
      ValueError: if a size is below 1, or the precision is another, or needs `optimize`.
      ConfigError: if the layout cannot divide the batch size.
    """

    model: Model
    tx: optax.GradientTransformation
    batch_size: int = 128
    loss: Loss = cross_entropy
    augment: Augmentation | None = None
    schedule: Schedule | None = None
    dtype: Any = jnp.float32
    microbatch_size: int | None = None
    layout: Layout = ONE_DEVICE
    log_norms: bool = False
    optimize: bool = True
    matmul_precision: DtypeName = "float32"

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", jnp.dtype(self.dtype))
        for name in ("batch_size", "microbatch_size"):
            size = getattr(self, name)
            if size is not None and size < 1:
                raise ValueError(f"{name} is {size}; expected at least 1")
        if self.matmul_precision not in get_args(DtypeName):
            raise ValueError(
                f"matmul_precision is {self.matmul_precision!r}; expected float32 or bfloat16"
            )
        if self.matmul_precision == "bfloat16" and not self.optimize:
            raise ValueError("matmul_precision is 'bfloat16', which needs optimize=True")
        self.layout.part_size(self.batch_size)


class Hyperparams(NamedTuple):
    """Scalars of a training that may be traced.

    Attributes:
      learning_rate: peak of the schedule, above 0; None for an optimizer with its own.
      total_steps: length of the schedule in steps; None where the schedule is constant.
      weight_decay: decoupled, at least 0; None is none.
      dropout: one rate in [0, 1) for all dropout layers; None keeps the rate of each layer.
      label_smoothing: fraction of the target spread over all classes, in [0, 1); None is 0.
      augmentation_strength: scales every range of the augmentation, at least 0; None is 1.
    """

    learning_rate: float | jax.Array | None = None
    total_steps: int | jax.Array | None = None
    weight_decay: float | jax.Array | None = None
    dropout: float | jax.Array | None = None
    label_smoothing: float | jax.Array | None = None
    augmentation_strength: float | jax.Array | None = None


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
    key: jax.Array, config: StepConfig, *, image_shape: tuple[int, ...] = (28, 28)
) -> TrainState:
    """Draws the initial state.

    Args:
      key: a typed PRNG key, used here and nowhere else.
      config: its model and optimizer.
      image_shape: height and width of the images that the model will see, and 3 if in colour.

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
    key: jax.Array, *, model: Model, tx: optax.GradientTransformation, image_shape: tuple[int, ...]
) -> TrainState:
    images = jnp.zeros((1, *input_shape(image_shape)), jnp.float32)
    variables = init_variables(key, images, model=model)
    params = variables.pop("params", {})
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

    A pure function, to be called directly or under `jit`, `vmap` and loops. With several devices,
    each of them calls it (`Layout.run`).

    Args:
      state: the current state.
      batch: images, labels and mask; with several devices, the part of this device.
      key: a typed PRNG key for dropout, used here and nowhere else.
      hyperparams: scalars that may be traced.
      config: what is fixed at compile time; `augment` is not applied here.

    Returns:
      The next state, and the metrics of the batch before the update, with dropout.

    Raises:
      TypeError: if the images are not float.
      ValueError: if the loss does not return one value per example, or the batch cannot be divided
        into the parts of the layout, or, for a model with collections besides its parameters, into
        equal microbatches.
      ConfigError: if the optimizer needs a learning rate and none is given, or if a learning rate,
        a schedule or a weight decay is given that has no effect on its update.
    """
    grads, model_state, metrics, _ = compute_grads(state, batch, key, hyperparams, config=config)
    scalars = {
        "learning_rate": _learning_rate(state.step, hyperparams, config.schedule),
        "weight_decay": hyperparams.weight_decay,
    }
    check_scalars_act(config.tx, state.params, scalars)
    update = functools.partial(_update, config.tx)
    params, opt_state = config.layout.update(
        update, grads, state.opt_state, state.params, *scalars.values()
    )
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


def check_hyperparams(hyperparams: Any) -> None:
    """Raises TypeError if these are no `Hyperparams`."""
    if not isinstance(hyperparams, Hyperparams):
        raise TypeError(
            f"hyperparams are {hyperparams!r}; expected Hyperparams, such as "
            "Hyperparams(learning_rate=1e-3)"
        )


class StepGrads(NamedTuple):
    """What `compute_grads` returns.

    Attributes:
      grads: the gradient of the mean loss over the batch's unmasked examples, like `params`.
      model_state: the next `model_state`.
      metrics: those of the batch.
      losses: float[batch]; with several devices, of this device's part.
    """

    grads: Any
    model_state: Any
    metrics: Metrics
    losses: jax.Array


def compute_grads(
    state: TrainState,
    batch: Batch,
    key: jax.Array,
    hyperparams: Hyperparams = DEFAULTS,
    *,
    config: StepConfig,
) -> StepGrads:
    """Computes the gradient that `train_step` applies; the same arguments and errors."""
    check_hyperparams(hyperparams)
    if not jnp.issubdtype(batch.images.dtype, jnp.floating):
        raise TypeError(f"batch.images are {batch.images.dtype}; expected float in [0, 1]")
    compute = functools.partial(_compute_part_grads, config=config)
    shared = (state.params, state.model_state, hyperparams)
    return config.layout.sum_grads(compute, shared, batch, key)


def _compute_part_grads(
    params: Any,
    model_state: Any,
    hyperparams: Hyperparams,
    batch: Batch,
    key: jax.Array,
    num_examples: jax.Array,
    *,
    config: StepConfig,
) -> StepGrads:
    """Computes what a part of a batch contributes to the gradient of the mean over the batch."""
    grad = jax.grad(functools.partial(_mean_loss, config=config), has_aux=True)
    size = config.microbatch_size
    if size is None or size >= len(batch.labels):
        grads, (model_state, losses, logits) = grad(
            params, model_state, hyperparams, batch, key, num_examples
        )
    else:
        if model_state and len(batch.labels) % size:
            raise ValueError(
                f"microbatch_size is {size} for batches of {len(batch.labels)}, but the model has "
                f"{', '.join(model_state)}, which would see the padding of the last microbatch; "
                "use a divisor of the batch size"
            )
        microbatches = split(batch, size)
        keys = jax.random.split(key, len(microbatches.labels))

        def add(carry: Any, microbatch: tuple[Batch, jax.Array]) -> Any:
            sums, model_state = carry
            grads, (model_state, losses, logits) = grad(
                params, model_state, hyperparams, *microbatch, num_examples
            )
            return (jax.tree.map(jnp.add, sums, grads), model_state), (losses, logits)

        zeros = jax.tree.map(jnp.zeros_like, params)
        (grads, model_state), outputs = lax.scan(add, (zeros, model_state), (microbatches, keys))
        losses, logits = jax.tree.map(lambda array: array[: len(batch.labels)], join(outputs))
    metrics = metrics_lib.measure(losses, logits, batch.labels, batch.mask)
    return StepGrads(grads, model_state, metrics, losses)


def _mean_loss(
    params: Any,
    model_state: Any,
    hyperparams: Hyperparams,
    batch: Batch,
    key: jax.Array,
    num_examples: jax.Array,
    *,
    config: StepConfig,
) -> tuple[jax.Array, Any]:
    params = jax.tree.map(lambda leaf: leaf.astype(config.dtype), params)
    logits, model_state = apply_in_training(
        key, batch.images.astype(config.dtype), params, model_state, hyperparams.dropout,
        model=config.model, optimize=config.optimize, matmul_precision=config.matmul_precision,
    )  # fmt: skip
    logits = logits.astype(batch.images.dtype)
    smoothing = hyperparams.label_smoothing
    losses = example_losses(
        config.loss, logits, batch.labels, *(() if smoothing is None else (smoothing,))
    )
    loss = jnp.sum(jnp.where(batch.mask, losses, 0)) / num_examples
    return loss, (model_state, losses, logits)


def apply_in_training(
    key: jax.Array,
    images: jax.Array,
    params: Any,
    model_state: Any,
    dropout: float | jax.Array | None = None,
    *,
    model: Model,
    optimize: bool = True,
    matmul_precision: DtypeName = "float32",
) -> tuple[jax.Array, Any]:
    """Calls the model as training does; returns the logits and the next `model_state`."""
    options: dict[str, Any] = {} if dropout is None else {"dropout": dropout}
    if model_state:
        options["mutable"] = list(model_state)
    variables = {"params": params, **model_state}
    apply = optimize_for_cpu(model.apply) if optimize else model.apply
    # In float32, the default of JAX stays: a GPU may round to TF32, unless the user forbids it.
    is_bfloat16 = matmul_precision == "bfloat16"
    with jax.default_matmul_precision("bfloat16") if is_bfloat16 else contextlib.nullcontext():
        outputs = apply(variables, images, train=True, rngs={"dropout": key}, **options)
    return outputs if model_state else (outputs, model_state)


def example_losses(loss: Loss, logits: jax.Array, labels: jax.Array, *options: Any) -> jax.Array:
    """Calls the loss and checks that it returns float[batch].

    Raises:
      ConfigError: if it has no argument for the label smoothing that is given.
      ValueError: if it does not return one value per example.
    """
    signature = inspect.signature(loss)
    try:
        signature.bind(logits, labels, *options)
        third = list(signature.parameters.values())[2:3] if options else []
        if third and third[0].name != "label_smoothing" and third[0].default is not third[0].empty:
            raise TypeError(f"its third is {third[0].name}")
    except TypeError as error:
        third_text = ", and a third for label_smoothing, which is given" if options else ""
        raise ConfigError(f"the loss must take logits and labels{third_text}: {error}") from error
    losses = loss(logits, labels, *options)
    if losses.shape != labels.shape:
        raise ValueError(
            f"the loss has shape {losses.shape}; expected one value per example, {labels.shape}"
        )
    return losses


@dataclasses.dataclass(frozen=True)
class WeightedLoss:
    """A loss times a weight of the label's class, as Keras' `class_weight`.

    The mean over a batch is divided by the number of examples, not by the sum of their weights.

    Attributes:
      loss: the loss of each example, as in `StepConfig`.
      weights: one number per class, at least 0.

    Example:
      >>> loss = WeightedLoss(cross_entropy, (1.0, 10.0))
      >>> print(loss(jnp.zeros((2, 2)), jnp.array([0, 1])))
      [0.6931472 6.931472 ]
    """

    loss: Loss
    weights: tuple[float, ...]

    def __call__(self, logits: jax.Array, labels: jax.Array, /, *options: Any) -> jax.Array:
        """Returns float[batch]; see `Loss`. Raises ValueError for another number of classes."""
        if len(self.weights) != logits.shape[-1]:
            raise ValueError(
                f"there are {len(self.weights)} weights for {logits.shape[-1]} classes"
            )
        losses = example_losses(self.loss, logits, labels, *options)
        return losses * jnp.asarray(self.weights, losses.dtype)[labels]


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
