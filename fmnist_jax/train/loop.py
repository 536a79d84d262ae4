"""The training step and the training loop: pure functions.

The model, the optimizer and the loss are arguments, so any of them can be your own:

- model: has `init(key, images, train=False)` and `apply(variables, images, train=..., rngs=...)`
  as a Linen module does, and is hashable. It sees images as float32[batch, height, width, 1] in
  [0, 1] and returns logits, float[batch, num_classes].
- tx: an optax transformation.
- loss: maps logits and labels, int32[batch], to float[batch].
- regularization: strengths that may be traced. What is None in it is left to model and loss; what
  is not is handed to the model as `dropout=` and to the loss as its third argument.

Everything here that is compiled keeps its program: it is compiled anew only for another shape,
model, optimizer, loss, augmentation, dtype or size of the slices.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from fmnist_jax.data.augment import RandomAffine
from fmnist_jax.rng import Streams
from fmnist_jax.train import metrics as metrics_lib
from fmnist_jax.train.metrics import Metrics, cross_entropy
from fmnist_jax.train.microbatch import choose_slice_size
from fmnist_jax.xla.jit import platform_jit
from fmnist_jax.xla.noinline import noinline

LossFn = Callable[..., jax.Array]


class TrainState(NamedTuple):
    """All that training changes, as arrays.

    Attributes:
      step: int32[], updates made so far.
      params: the model's parameters.
      opt_state: the optimizer's state.
    """

    step: jax.Array
    params: Any
    opt_state: Any


class Regularization(NamedTuple):
    """What holds the network back while it is trained; each a scalar that may be traced, or None.

    Attributes:
      dropout: one rate in [0, 1) for every dropout of the network; None leaves each its own.
      label_smoothing: share of the target spread over all classes, in [0, 1); None is 0.
      augmentation: share of every range of the augmentation, at least 0; None is 1.
    """

    dropout: float | jax.Array | None = None
    label_smoothing: float | jax.Array | None = None
    augmentation: float | jax.Array | None = None


_NONE = Regularization()


class Batch(NamedTuple):
    """What one update sees.

    Attributes:
      images: float32[batch, height, width, 1], values in [0, 1].
      labels: int32[batch].
      mask: bool[batch], False for the padding of an epoch's last batch.
    """

    images: jax.Array
    labels: jax.Array
    mask: jax.Array


def create_train_state(
    key: jax.Array,
    model: Any,
    tx: optax.GradientTransformation,
    *,
    image_shape: tuple[int, int] = (28, 28),
) -> TrainState:
    """Draws the first parameters.

    Args:
      key: a typed PRNG key, used here and nowhere else.
      model: see the module.
      tx: see the module.
      image_shape: height and width of the images that the model will see.

    Example:
      >>> import fmnist_jax as fm
      >>> state = create_train_state(jax.random.key(0), fm.create_model("same_3x3"), optax.sgd(0.1))
      >>> sum(leaf.size for leaf in jax.tree.leaves(state.params))
      423338
    """
    params = _create_params(key, model=model, image_shape=image_shape)
    # Copied, because an optimizer may put one array in two places, and a donated array must not be.
    return TrainState(jnp.int32(0), params, jax.tree.map(jnp.copy, tx.init(params)))


@platform_jit(static_argnames=("model", "image_shape"), quick=True)
def _create_params(key: jax.Array, *, model: Any, image_shape: tuple[int, int]) -> Any:
    images = jnp.zeros((1, *image_shape, 1), jnp.float32)
    return model.init(key, images, train=False)["params"]


def train_step(
    state: TrainState,
    batch: Batch,
    key: jax.Array,
    *,
    model: Any,
    tx: optax.GradientTransformation,
    loss: LossFn = cross_entropy,
    dtype: Any = jnp.float32,
    slice_size: int | None = None,
    regularization: Regularization = _NONE,
) -> tuple[TrainState, Metrics]:
    """One update by the mean loss over the batch's real examples.

    A plain function: call it, or `jit`, `vmap` and loop it as you like.

    Args:
      state: what training changes.
      batch: images, labels and mask.
      key: a typed PRNG key for dropout, used here and nowhere else.
      model: see the module.
      tx: see the module.
      loss: see the module.
      dtype: the model computes in it, from parameters and images that are cast to it; bfloat16 is
        for accelerators. Parameters, updates, loss and metrics stay as they are.
      slice_size: images that go through the model at once; their gradients are summed. The update
        is the same but for rounding, and for dropout, where each slice has a key of its own. None
        takes the whole batch.
      regularization: see the module; the augmentation is the images' and not the step's.

    Returns:
      The next state, and the batch's metrics before the update, dropout on.

    Raises:
      TypeError: if the images are not float.
      ValueError: if the loss does not give one number an example.
    """
    grads, losses, logits = gradients(
        state,
        batch,
        key,
        model=model,
        loss=loss,
        dtype=dtype,
        slice_size=slice_size,
        regularization=regularization,
    )
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = metrics_lib.measure(losses, logits, batch.labels, batch.mask)
    return TrainState(state.step + 1, params, opt_state), metrics


def gradients(
    state: TrainState,
    batch: Batch,
    key: jax.Array,
    *,
    model: Any,
    loss: LossFn = cross_entropy,
    dtype: Any = jnp.float32,
    slice_size: int | None = None,
    regularization: Regularization = _NONE,
) -> tuple[Any, jax.Array, jax.Array]:
    """What `train_step` follows; its arguments.

    Returns:
      The gradient of the mean loss over the batch's real examples, a tree like `params`; the
      losses, float[batch]; the logits, float[batch, num_classes]; all with dropout on.
    """
    if not jnp.issubdtype(batch.images.dtype, jnp.floating):
        raise TypeError(
            f"batch.images are {batch.images.dtype}; they must be float with values in [0, 1]"
        )
    num_examples = jnp.sum(batch.mask)
    dropout, label_smoothing, _ = regularization
    model_options = {} if dropout is None else {"dropout": dropout}
    loss_options = () if label_smoothing is None else (label_smoothing,)

    def mean_loss(params: Any, part: Batch, key: jax.Array) -> tuple[jax.Array, Any]:
        params = jax.tree.map(lambda leaf: leaf.astype(dtype), params)
        images = part.images.astype(dtype)
        logits = model.apply(
            {"params": params}, images, train=True, rngs={"dropout": key}, **model_options
        )
        logits = logits.astype(part.images.dtype)
        losses = example_losses(loss, logits, part.labels, *loss_options)
        return jnp.sum(jnp.where(part.mask, losses, 0)) / num_examples, (losses, logits)

    gradient = jax.grad(mean_loss, has_aux=True)
    if slice_size is None or slice_size >= len(batch.labels):
        grads, (losses, logits) = gradient(state.params, batch, key)
        return grads, losses, logits

    slices = _split(batch, slice_size)
    keys = jax.random.split(key, len(slices.labels))

    def add(sums: Any, part: tuple[Batch, jax.Array]) -> Any:
        grads, outputs = gradient(state.params, *part)
        return jax.tree.map(jnp.add, sums, grads), outputs

    grads, outputs = lax.scan(add, jax.tree.map(jnp.zeros_like, state.params), (slices, keys))
    losses, logits = jax.tree.map(
        lambda array: array.reshape(-1, *array.shape[2:])[: len(batch.labels)], outputs
    )
    return grads, losses, logits


@platform_jit(
    static_argnames=("batch_size", "model", "tx", "augment", "loss", "dtype", "slice_size"),
    donate_argnames=("state",),
)
def train_steps(
    state: TrainState,
    images: jax.Array,
    labels: jax.Array,
    order: jax.Array,
    streams: Streams,
    count: int | jax.Array,
    metrics: Metrics | None = None,
    *,
    batch_size: int,
    model: Any,
    tx: optax.GradientTransformation,
    augment: RandomAffine | None = None,
    loss: LossFn = cross_entropy,
    dtype: Any = jnp.float32,
    slice_size: int | None = None,
    regularization: Regularization = _NONE,
) -> tuple[TrainState, Metrics]:
    """`count` updates in one compiled loop.

    `count` is data: one program serves every value, and however an epoch is cut into calls, the
    bits of the state are the same, and so are those of the metrics if they are handed on. The step
    number says where in the epoch and in the random streams the state is.

    Args:
      state: what training changes. Donated: its arrays are gone afterwards.
      images: uint8[n, height, width], all training images.
      labels: int32[n], values in [0, num_classes).
      order: int32[m], the examples of this epoch in their order. The last batch of an epoch holds
        what is left; each example counts once.
      streams: the run's streams; used are `augment` and `dropout`.
      count: number of updates. Stop at the end of the epoch to give the next one its order;
        further updates would go through the same order again.
      metrics: sums over the epoch so far; None starts at zero.
      batch_size: images an update.
      model: see the module.
      tx: see the module.
      augment: applied to every image; None only scales to [0, 1].
      loss: see the module.
      dtype: as for `train_step`.
      slice_size: as for `train_step`; None takes what `choose_slice_size` finds.
      regularization: see the module.

    Returns:
      The state after `count` updates, and the metrics over their examples, dropout on.

    Raises:
      TypeError: if the images are not uint8, or labels or order not whole numbers.
      ValueError: if shapes do not fit together.
    """
    images = checked_images(images)
    check_labels(images, labels)
    if order.ndim != 1 or not jnp.issubdtype(order.dtype, jnp.integer):
        raise TypeError(f"order is {order.dtype}{list(order.shape)}; it must be int32[m]")
    if batch_size < 1 or order.size < 1:
        raise ValueError(
            f"batch_size is {batch_size} and order has {order.size} examples; both must be at "
            "least 1"
        )
    side = None if augment is None else augment.image_size
    image_shape = images.shape[1:3] if side is None else (side, side)
    if slice_size is None:
        slice_size = choose_slice_size(state.params, model, image_shape, batch_size)

    def body(_: jax.Array, carry: tuple[TrainState, Metrics]) -> tuple[TrainState, Metrics]:
        state, metrics = carry
        _, batch = read_batch(
            images,
            labels,
            order,
            state.step,
            streams,
            batch_size=batch_size,
            augment=augment,
            strength=regularization.augmentation,
        )
        state, step_metrics = train_step(
            state,
            batch,
            jax.random.fold_in(streams.dropout, state.step),
            model=model,
            tx=tx,
            loss=loss,
            dtype=dtype,
            slice_size=slice_size,
            regularization=regularization,
        )
        return state, metrics_lib.merge(metrics, step_metrics)

    sums = metrics_lib.zeros() if metrics is None else metrics
    return lax.fori_loop(0, count, body, (state, sums))


def read_batch(
    images: jax.Array,
    labels: jax.Array,
    order: jax.Array,
    step: jax.Array,
    streams: Streams,
    *,
    batch_size: int,
    augment: RandomAffine | None = None,
    strength: float | jax.Array | None = None,
) -> tuple[jax.Array, Batch]:
    """What the update after `step` others sees.

    Args:
      images: as for `train_steps`, like all that is not named here.
      labels: as there.
      order: as there, of the epoch that the step is in.
      step: int32[], updates made so far.
      streams: as there.
      batch_size: as there.
      augment: as there.
      strength: of the augmentation; None is 1.

    Returns:
      The examples, int32[batch_size], positions in `images`; and the batch. Past the end of an
      epoch the last example is repeated, masked.
    """
    epoch, index = jnp.divmod(step, steps_per_epoch(len(order), batch_size))
    positions = index * batch_size + jnp.arange(batch_size)
    examples = order[jnp.minimum(positions, len(order) - 1)]
    picked = images[examples]
    if augment is None:
        pixels = scale(picked)
    else:
        keys = example_keys(streams.augment, epoch, examples)
        pixels = augmented(keys, picked, strength, augment=augment)
    return examples, Batch(pixels, labels[examples], positions < len(order))


def _split(batch: Batch, size: int) -> Batch:
    """Arrays of [slices, size, ...]; the last slice is filled up with what the mask leaves out."""
    count = -(-len(batch.labels) // size)

    def split(array: jax.Array) -> jax.Array:
        missing = count * size - len(array)
        padded = jnp.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1))
        return padded.reshape(count, size, *array.shape[1:])

    return jax.tree.map(split, batch)


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Updates an epoch; the last one may see fewer images.

    Example:
      >>> steps_per_epoch(1001, 500)
      3
    """
    return -(-num_examples // batch_size)


@platform_jit(quick=True)
def epoch_order(key: jax.Array, epoch: int | jax.Array, examples: jax.Array) -> jax.Array:
    """The examples, int32[m], in the random order of an epoch, from the shuffle stream."""
    return jax.random.permutation(jax.random.fold_in(key, epoch), examples)


def example_keys(key: jax.Array, epoch: jax.Array, examples: jax.Array) -> jax.Array:
    """One key for each example of an epoch, from the augment stream: the same in any batch."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, epoch), examples)


def augmented(
    keys: jax.Array,
    images: jax.Array,
    strength: float | jax.Array | None = None,
    *,
    augment: RandomAffine,
) -> jax.Array:
    """Calls `augment` so that any program makes the bits that the training loop makes."""
    return lax.platform_dependent(
        keys,
        images,
        jnp.float32(1.0 if strength is None else strength),
        cpu=functools.partial(noinline, augment),
        default=augment,
    )


def scale(images: jax.Array) -> jax.Array:
    """uint8[batch, height, width] to float32[batch, height, width, 1] in [0, 1]."""
    return images[..., None].astype(jnp.float32) / 255


def checked_images(images: jax.Array) -> jax.Array:
    """The images as uint8[n, height, width].

    Raises:
      TypeError: if they are not uint8.
      ValueError: if their shape is neither this nor [n, height, width, 1].
    """
    if images.dtype != jnp.uint8:
        raise TypeError(f"images are {images.dtype}; they must be uint8 with values 0 to 255")
    if images.ndim == 4 and images.shape[-1] == 1:
        images = images[..., 0]
    if images.ndim != 3:
        raise ValueError(
            f"images have shape {images.shape}; expected [n, height, width] or "
            "[n, height, width, 1]"
        )
    return images


def check_labels(images: jax.Array, labels: jax.Array) -> None:
    """Refuses what is not one label an image.

    Raises:
      TypeError: if they are not whole numbers.
      ValueError: if their number is not that of the images, or 0.
    """
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels are {labels.dtype}; they must be whole numbers")
    if labels.shape != images.shape[:1] or len(labels) == 0:
        raise ValueError(
            f"{len(images)} images have labels of shape {labels.shape}; there must be one label an "
            "image, and at least one image"
        )


def example_losses(loss: LossFn, logits: jax.Array, labels: jax.Array, *options: Any) -> jax.Array:
    """Calls the loss.

    Raises:
      ValueError: if it does not give one number an example.
    """
    losses = loss(logits, labels, *options)
    if losses.shape != labels.shape:
        raise ValueError(
            f"the loss has shape {losses.shape}; it must be one number an example, {labels.shape}"
        )
    return losses
