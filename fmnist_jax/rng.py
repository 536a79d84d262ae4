"""The random streams of a run: one key a purpose, all from one seed."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import jax

from fmnist_jax.errors import ConfigError


class Streams(NamedTuple):
    """One typed PRNG key a purpose. Exchange one of them and the others' draws stay as they were.

    Nothing here changes during a run. A key for one use is folded in from the stream's key:
    `fold_in(dropout, step)`, `fold_in(shuffle, epoch)` and
    `fold_in(fold_in(augment, epoch), example)`. Seed and step are therefore all that a run needs
    to go on.
    """

    init: jax.Array
    split: jax.Array
    shuffle: jax.Array
    augment: jax.Array
    dropout: jax.Array


def create_streams(
    seed: int | jax.Array, stream_seeds: Mapping[str, int | jax.Array] = MappingProxyType({})
) -> Streams:
    """Folds a fixed number for each purpose into the seed's key.

    Args:
      seed: whole number in [0, 2**32), or an array of it, which may be traced.
      stream_seeds: the same for single streams, by name, in place of `seed`.

    Raises:
      ConfigError: if the seed is outside its range; JAX would drop the bits above 32 in silence.

    Example:
      >>> a, b = create_streams(0), create_streams(1)
      >>> bool((jax.random.bits(a.init) == jax.random.bits(b.init)))
      False
    """
    if isinstance(seed, int) and not 0 <= seed < 2**32:
        raise ConfigError(f"seed is {seed}; it must be a whole number from 0 to 2**32 - 1")
    root = jax.random.key(seed)
    streams = Streams(*(jax.random.fold_in(root, number) for number in range(len(Streams._fields))))
    others = {name: getattr(create_streams(other), name) for name, other in stream_seeds.items()}
    return streams._replace(**others)
