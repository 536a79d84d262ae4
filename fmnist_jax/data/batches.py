"""Batches of an epoch: order, gather, scaling and augmentation, all traceable.

Training images stay on the device as uint8. A batch is gathered, scaled to [0, 1] and augmented
inside the compiled training loop.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from fmnist_jax.data.augment import Augmentation, with_channels
from fmnist_jax.rng import Streams
from fmnist_jax.xla.jit import platform_jit
from fmnist_jax.xla.noinline import reproducible

T = TypeVar("T")


class Batch(NamedTuple):
    """The input of one training step.

    Attributes:
      images: float32[batch, height, width, channels], values in [0, 1].
      labels: int32[batch].
      mask: bool[batch], False for the padding of an epoch's last batch.
    """

    images: jax.Array
    labels: jax.Array
    mask: jax.Array


def read_batch(
    images: jax.Array,
    labels: jax.Array,
    order: jax.Array,
    step: jax.Array,
    streams: Streams,
    *,
    batch_size: int,
    augment: Augmentation | None = None,
    strength: float | jax.Array | None = None,
    first: int | jax.Array = 0,
    num_rows: int | None = None,
) -> tuple[jax.Array, Batch]:
    """Gathers the batch of one step, or some of its rows.

    The last batch of an epoch is filled up with the epoch's first examples. They are masked: they
    count in no loss and no metric, and only batch statistics see them.

    Args:
      images: uint8[n, height, width], or [n, height, width, 3] in colour, all training images.
      labels: int32[n], values in [0, num_classes).
      order: int32[m], the examples of the epoch in their order.
      step: int32[], number of steps taken so far in the run.
      streams: the run's random streams; only `augment` is used.
      batch_size: at least 1.
      augment: applied to every image; None only scales to [0, 1].
      strength: scales every range of the augmentation; None is 1.
      first: the first row of the batch to gather.
      num_rows: how many to gather; None is all.

    Returns:
      int32[num_rows], the positions of the examples in `images`; and these rows of the batch.
    """
    epoch, index = jnp.divmod(step, steps_per_epoch(len(order), batch_size))
    rows = first + jnp.arange(batch_size if num_rows is None else num_rows)
    positions = index * batch_size + rows
    examples = order[positions % len(order)]
    if augment is None:
        pixels = scale(images[examples])
    else:
        pixels = augmented(
            streams.augment, epoch, examples, images[examples], strength, augment=augment
        )
    return examples, Batch(pixels, labels[examples], positions < len(order))


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Number of steps in an epoch; the last one may see fewer images.

    Example:
      >>> steps_per_epoch(1001, 500)
      3
    """
    return -(-num_examples // batch_size)


@platform_jit(quick=True)
def epoch_order(key: jax.Array, epoch: int | jax.Array, examples: jax.Array) -> jax.Array:
    """Shuffles the examples of an epoch.

    Args:
      key: the shuffle stream of the run.
      epoch: int32[], counted from 0.
      examples: int32[m], positions of the training examples.

    Returns:
      int32[m], the examples in the order of the epoch.
    """
    return jax.random.permutation(jax.random.fold_in(key, epoch), examples)


def augmented(
    key: jax.Array,
    epoch: jax.Array,
    examples: jax.Array,
    images: jax.Array,
    strength: float | jax.Array | None = None,
    *,
    augment: Augmentation,
) -> jax.Array:
    """Calls `augment` such that every program computes the same bits as the training loop."""
    strength = jnp.float32(1.0 if strength is None else strength)
    return reproducible(augment, key, epoch, examples, images, strength)


def split(tree: T, size: int) -> T:
    """Cuts leaves [n, ...] into [parts, size, ...]; the last part is filled up with zeros.

    Example:
      >>> split(jnp.arange(1, 4), 2).tolist()
      [[1, 2], [3, 0]]
    """

    def cut(array: jax.Array) -> jax.Array:
        num_parts = -(-len(array) // size)
        missing = num_parts * size - len(array)
        padded = jnp.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1))
        return padded.reshape(num_parts, size, *array.shape[1:])

    return jax.tree.map(cut, tree)


def join(tree: T) -> T:
    """Joins the parts of leaves [parts, size, ...] to [parts * size, ...]."""
    return jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:]), tree)


def scale(images: jax.Array) -> jax.Array:
    """Maps uint8 images to float32[batch, height, width, channels], values in [0, 1]."""
    return with_channels(images).astype(jnp.float32) / 255


def as_stored(images: Any) -> Any:
    """Returns images without their last axis, the channels, if it has size 1: grey images."""
    return images[..., 0] if images.shape[-1] == 1 else images


def input_shape(image_shape: Sequence[int]) -> tuple[int, ...]:
    """Returns height, width and channels that a network sees of stored images.

    Example:
      >>> input_shape((28, 28)), input_shape((32, 32, 3))
      ((28, 28, 1), (32, 32, 3))
    """
    return (*image_shape, 1)[:3]


def checked_images(images: jax.Array) -> jax.Array:
    """Returns the images as uint8[n, height, width], or [n, height, width, 3] in colour.

    Raises:
      TypeError: if they are not uint8.
      ValueError: if their shape is neither one of these nor [n, height, width, 1].
    """
    if images.dtype != jnp.uint8:
        raise TypeError(f"images are {images.dtype}; expected uint8 with values 0 to 255")
    if images.ndim == 4:
        images = as_stored(images)
    if images.ndim != 3 and (images.ndim, *images.shape[3:]) != (4, 3):
        raise ValueError(
            f"images have shape {images.shape}; expected [n, height, width], or "
            "[n, height, width, channels] with 1 or 3 channels"
        )
    return images


def check_labels(images: jax.Array, labels: jax.Array) -> None:
    """Checks that there is one integer label per image.

    Raises:
      TypeError: if the labels are not integers.
      ValueError: if their number differs from that of the images, or is 0.
    """
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f"labels are {labels.dtype}; expected integers")
    if labels.shape != images.shape[:1] or len(labels) == 0:
        raise ValueError(
            f"labels have shape {labels.shape} for {len(images)} images; expected one label per "
            "image and at least one image"
        )
