"""`choose_microbatch_size`: how many examples go through the model at once."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from fmnist_jax.data.batches import input_shape
from fmnist_jax.train.step import apply_in_training

# Bytes of residuals of a microbatch, such that the backward pass reads them from the cache.
# Measured in nine interleaved rounds on two cores with 32 MiB of last-level cache: 11 to 18 MB are
# equally fast; he_stack is a seventh slower with 8 MB, and slower with 26 MB. XLA:CPU of jax 0.12
# computes a matrix product of less than about 2.5 million multiplications on one core: he_stack is
# 1.2 times as fast with the 19 images of 14.5 MB as with the 15 images of 12 MB.
MICROBATCH_BYTES = 15_000_000


def choose_microbatch_size(
    variables: Any, model: Any, image_shape: tuple[int, ...], batch_size: int
) -> int:
    """Chooses how many examples go through the model at once.

    On a CPU as many as have `MICROBATCH_BYTES` of residuals, or as many bytes as the parameters,
    which each microbatch reads. On other devices, and for a model with batch
    statistics or other variables besides its parameters, the whole batch. The result depends on
    shapes alone.

    Args:
      variables: the model's variables, or their shapes and dtypes.
      model: as in `StepConfig`.
      image_shape: height and width of the images that the model sees, and 3 if in colour.
      batch_size: examples per step; the microbatches are about equal parts of it.

    Example:
      >>> import optax, fmnist_jax as fm
      >>> config = fm.StepConfig(model=fm.create_model("he_stack"), tx=optax.sgd(0.1))
      >>> state = fm.create_train_state(jax.random.key(0), config)
      >>> size = choose_microbatch_size(state.variables, config.model, (28, 28), 128)
      >>> size if jax.default_backend() == "cpu" else 19
      19
    """
    if jax.default_backend() != "cpu" or set(variables) != {"params"}:
        return batch_size

    # The same number of images for all callers, so that the model is traced once for this.
    images = jax.ShapeDtypeStruct((128, *input_shape(image_shape)), jnp.float32)
    key = jax.eval_shape(jax.random.key, 0)
    params = variables["params"]
    num_bytes = _num_bytes(_residuals.eval_shape(params, images, key, model=model))
    # The residuals hold the kernels once, however many images there are.
    per_image = max(1, (num_bytes - _num_bytes(params)) // images.shape[0])
    most = -(-max(MICROBATCH_BYTES, _num_bytes(params)) // per_image)
    return -(-batch_size // -(-batch_size // most))


@functools.partial(jax.jit, static_argnames="model")  # for its shapes; it never runs
def _residuals(params: Any, images: jax.Array, key: jax.Array, *, model: Any) -> Any:
    """Returns the residuals of the model's backward pass."""

    def apply(params: Any) -> jax.Array:
        return apply_in_training(key, images, params, {}, model=model)[0]

    return jax.vjp(apply, params)[1]


def _num_bytes(tree: Any) -> int:
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
