"""Prediction and evaluation without dropout."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fmnist_jax.data.batches import check_labels, checked_images, input_shape, join, scale
from fmnist_jax.fast.rewrite import optimize_for_cpu
from fmnist_jax.train import metrics as metrics_lib
from fmnist_jax.train.layout import ONE_DEVICE, Layout
from fmnist_jax.train.metrics import Metrics, cross_entropy
from fmnist_jax.train.microbatch import choose_microbatch_size
from fmnist_jax.train.step import Loss, Model, example_losses
from fmnist_jax.xla.jit import platform_jit

# Most images per pass through the model; on a CPU it is the microbatch size of such a batch.
# Measured on two cores (Zen 3), against 128: 1.3 to 1.4 times as fast for valid_2x2 and same_3x3,
# 1.1 for he_stack, 1.2 for deep_augmented, the same for small_dropout.
EVAL_BATCH_SIZE = 128

# Images per compiled call, about. Python sees signals and shows progress between calls.
_CALL_SIZE = 1024

# Rows and columns. The image and its shifts by one pixel along a diagonal, each with its mirror
# image, as in airbench94 (Jordan 2024).
_TTA_SHIFTS = ((0, 0), (1, 1), (-1, -1))
_TTA_WEIGHTS = (0.25, 0.25, 0.125, 0.125, 0.125, 0.125)
NUM_VIEWS = len(_TTA_WEIGHTS)

OnCall = Callable[[int], None]


def predict(
    variables: Any,
    images: Any,
    *,
    model: Model,
    batch_size: int | None = None,
    on_call: OnCall | None = None,
    layout: Layout = ONE_DEVICE,
) -> jax.Array:
    """Computes the logits of any number of images.

    Args:
      variables: the model's variables, `state.variables`.
      images: uint8[n, height, width], or [n, height, width, channels] with 1 or 3 channels, values
        0 to 255.
      model: as in `StepConfig`.
      batch_size: images per pass. It bounds the memory and changes results by rounding only. None
        chooses (`choose_microbatch_size`).
      on_call: called with the number of images that are done, after each compiled call of about
        1,000 images.
      layout: the devices, which share the passes.

    Returns:
      float32[n, num_classes], in the order of the images.

    Raises:
      TypeError: if the images are not uint8.
      ValueError: if they have another shape, or `batch_size` is below 1.

    Example:
      >>> import optax, fmnist_jax as fm
      >>> config = fm.StepConfig(model=fm.create_model("small_dropout"), tx=optax.sgd(0.1))
      >>> state = fm.create_train_state(jax.random.key(0), config)
      >>> predict(state.variables, np.zeros((5, 28, 28), np.uint8), model=config.model).shape
      (5, 10)
    """
    images = checked_images(images)
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; expected at least 1")
    if batch_size is None:
        batch_size = choose_microbatch_size(variables, model, images.shape[1:], EVAL_BATCH_SIZE)
    # On the host, so that one program serves any number of images.
    is_traced = isinstance(images, jax.core.Tracer)
    images, pad = (images, jnp.pad) if is_traced else (np.asarray(images), np.pad)
    num_devices = layout.num_devices
    num_batches = -(-len(images) // (batch_size * num_devices))  # on each device
    num_batches = num_devices * max(1, min(num_batches, _CALL_SIZE // batch_size))
    call_size = num_batches * batch_size
    variables = layout.place(variables)
    logits = []
    for start in range(0, max(len(images), 1), call_size):
        part = images[start : start + call_size]
        part = pad(part, ((0, call_size - len(part)), *((0, 0) for _ in images.shape[1:])))
        batches: Any = part.reshape(num_batches, batch_size, *images.shape[1:])
        logits.append(_predict(variables, batches, model=model, layout=layout))
        if on_call is not None:
            logits[-1].block_until_ready()
            on_call(min(start + call_size, len(images)))
    return jnp.concatenate(logits)[: len(images)]


def abstract_logits(variables: Any, image_shape: Sequence[int], *, model: Model) -> Any:
    """Returns shape and dtype of the logits of one image; traced once for the same shapes."""
    images = jax.ShapeDtypeStruct((1, *input_shape(image_shape)), jnp.float32)
    return _logits.eval_shape(variables, images, model=model)


@functools.partial(jax.jit, static_argnames="model")  # for its shape; it never runs
def _logits(variables: Any, images: jax.Array, *, model: Model) -> jax.Array:
    return model.apply(variables, images, train=False)


@platform_jit(static_argnames=("model", "layout"))
def _predict(variables: Any, batches: jax.Array, *, model: Model, layout: Layout) -> jax.Array:
    """Maps uint8[batches, batch, height, width, ...] to float32[batches * batch, num_classes]."""

    def apply(variables: Any, batches: jax.Array) -> jax.Array:
        logits = optimize_for_cpu(functools.partial(model.apply, train=False))
        return join(lax.map(lambda batch: logits(variables, scale(batch)), batches))

    return layout.map(apply, variables, batches)


def evaluate(
    variables: Any,
    images: Any,
    labels: Any,
    *,
    model: Model,
    loss: Loss = cross_entropy,
    batch_size: int | None = None,
    on_call: OnCall | None = None,
    layout: Layout = ONE_DEVICE,
) -> Metrics:
    """Computes the metrics of a split.

    Args:
      variables: the model's variables, `state.variables`.
      images: as for `predict`.
      labels: int32[n], values in [0, num_classes).
      model: as in `StepConfig`.
      loss: as in `StepConfig`.
      batch_size: as for `predict`.
      on_call: as for `predict`.
      layout: as for `predict`.

    Raises:
      TypeError: if the images are not uint8, or the labels are not integers.
      ValueError: if shapes do not fit together, or a label is outside its range.
    """
    check_labels(checked_images(images), labels)
    logits = predict(
        variables, images, model=model, batch_size=batch_size, on_call=on_call, layout=layout
    )
    size = logits.shape[-1]
    if not isinstance(labels, jax.core.Tracer) and not 0 <= labels.min() <= labels.max() < size:
        raise ValueError(
            f"labels are from {labels.min()} to {labels.max()}, but the model has {size} outputs; "
            f"expected values from 0 to {size - 1}"
        )
    return _measure(logits, labels, loss=loss)


@platform_jit(static_argnames=("loss",))
def _measure(logits: jax.Array, labels: jax.Array, *, loss: Loss) -> Metrics:
    losses = example_losses(loss, logits, labels)
    return metrics_lib.measure(losses, logits, labels, jnp.ones(len(labels), bool))


def predict_tta(
    variables: Any,
    images: Any,
    *,
    model: Model,
    on_call: OnCall | None = None,
    layout: Layout = ONE_DEVICE,
) -> jax.Array:
    """Computes log probabilities with test-time augmentation.

    The probabilities are averaged over six views: the image, two diagonal shifts by one pixel, and
    the mirror images of the three. The unshifted views have half of the weight. Pixels that a
    shift uncovers are 0, the background of Fashion-MNIST. A network that was trained without
    mirrored images loses 3 to 7 points of accuracy.

    Args:
      variables: the model's variables, `state.variables`.
      images: as for `predict`.
      model: as in `StepConfig`.
      on_call: as for `predict`, with the images of all views counted.
      layout: as for `predict`.

    Returns:
      float32[n, num_classes], in the order of the images.

    Raises:
      TypeError: if the images are not uint8.
      ValueError: if they have another shape.

    Example:
      >>> import optax, fmnist_jax as fm
      >>> config = fm.StepConfig(model=fm.create_model("same_3x3"), tx=optax.sgd(0.1))
      >>> state = fm.create_train_state(jax.random.key(0), config)
      >>> images = np.zeros((5, 28, 28), np.uint8)
      >>> log_probabilities = predict_tta(state.variables, images, model=config.model)
      >>> bool(jnp.allclose(jnp.exp(log_probabilities).sum(axis=1), 1))
      True
    """
    images = np.asarray(checked_images(images))
    height, width = images.shape[1:3]
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0))[: images.ndim])
    views = []
    for row, column in _TTA_SHIFTS:
        view = padded[:, 1 - row : 1 - row + height, 1 - column : 1 - column + width]
        views += [view, view[:, :, ::-1]]
    logits = predict(variables, np.concatenate(views), model=model, on_call=on_call, layout=layout)
    shape = (NUM_VIEWS, len(images), logits.shape[-1])
    log_probabilities = jax.nn.log_softmax(logits).reshape(shape)
    weights = jnp.array(_TTA_WEIGHTS)[:, None, None]
    return jax.nn.logsumexp(log_probabilities + jnp.log(weights), axis=0)
