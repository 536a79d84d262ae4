"""`choose_slice_size`: how much of a batch goes through the model at once."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

# What a slice of the batch may leave for the backward pass, in bytes, so that it is still in the
# cache then. Measured in nine interleaved rounds on two cores with 32 MiB of last-level cache: 11
# to 18 MB are equally fast; 8 MB cost he_stack a seventh of its speed, 26 MB some.
SLICE_BYTES = 12_000_000


def choose_slice_size(
    params: Any, model: Any, image_shape: tuple[int, ...], batch_size: int
) -> int:
    """How many images should go through the model at once.

    On a CPU as many as leave `SLICE_BYTES` for the backward pass, or as many bytes as there are in
    the parameters, which each slice reads; on other devices the whole batch. It depends on shapes
    alone.

    Args:
      params: the model's parameters, or their shapes.
      model: see `fmnist_jax.train.loop`.
      image_shape: height and width of the images that the model sees.
      batch_size: images an update; the slices are about equal parts of it.

    Example:
      >>> import optax, fmnist_jax as fm
      >>> model = fm.create_model("he_stack")
      >>> state = fm.create_train_state(jax.random.key(0), model, optax.sgd(0.1))
      >>> size = choose_slice_size(state.params, model, (28, 28), 128)
      >>> size if jax.default_backend() == "cpu" else 15
      15
    """
    if jax.default_backend() != "cpu":
        return batch_size

    # One number of images for all callers, so that the model is traced once for this.
    images = jax.ShapeDtypeStruct((128, *image_shape, 1), jnp.float32)
    key = jax.eval_shape(jax.random.key, 0)
    num_bytes = _num_bytes(_residuals.eval_shape(params, images, key, model=model))
    # The kernels are among them once, however many images there are.
    per_image = max(1, (num_bytes - _num_bytes(params)) // images.shape[0])
    most = -(-max(SLICE_BYTES, _num_bytes(params)) // per_image)
    return -(-batch_size // -(-batch_size // most))


@functools.partial(jax.jit, static_argnames="model")  # for its shapes; it never runs
def _residuals(params: Any, images: jax.Array, key: jax.Array, *, model: Any) -> Any:
    """What the backward pass of the model is handed."""

    def apply(params: Any) -> jax.Array:
        return model.apply({"params": params}, images, train=True, rngs={"dropout": key})

    return jax.vjp(apply, params)[1]


def _num_bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
