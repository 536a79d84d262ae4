"""Dropout with one random byte per activation."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

Rate = float | jax.Array


class Dropout(nn.Module):
    """`dropout` with a key from the "dropout" stream; the `rate` of a call takes precedence."""

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, rate: Rate | None = None) -> jax.Array:
        """Applies dropout if `train`."""
        if not train:
            return x
        return dropout(self.make_rng("dropout"), x, self.rate if rate is None else rate)


def dropout(key: jax.Array, activations: jax.Array, rate: Rate) -> jax.Array:
    """Sets a random fraction of the activations to zero and scales up the rest.

    Each activation uses one random byte, a quarter of a 32-bit draw. The rate is therefore rounded
    to a multiple of 1/256: 0.2 becomes 0.19922, 0.3 becomes 0.30078, 0.5 is exact. The scale uses
    the rounded rate, so the expected value is exact.

    Args:
      key: a typed PRNG key.
      activations: float[...].
      rate: fraction to drop, in [0, 1); may be traced. At most 255/256 are dropped.

    Returns:
      float[...], with the shape and dtype of `activations`.

    Example:
      >>> import jax
      >>> dropout(jax.random.key(0), jax.numpy.ones((8,)), 0.5).tolist()
      [2.0, 0.0, 2.0, 2.0, 2.0, 0.0, 2.0, 2.0]
    """
    threshold = jnp.clip(jnp.round(256 * jnp.asarray(rate)), 0, 255)
    words = jax.random.bits(key, (-(-activations.size // 4),), jnp.uint32)
    draws = lax.bitcast_convert_type(words, jnp.uint8).reshape(-1)[: activations.size]
    kept = (draws >= threshold.astype(jnp.uint8)).reshape(activations.shape)
    scale = (256 / (256 - threshold)).astype(activations.dtype)
    return jnp.where(kept, activations * scale, 0)
