"""The random streams of a run: one key per purpose, all derived from one seed."""

from typing import NamedTuple

import jax
import numpy as np

from fmnist_jax.errors import ConfigError


class Streams(NamedTuple):
    """One typed PRNG key per purpose; replacing one leaves the draws of the others unchanged.

    The streams are constant during a run. Each use folds in what it is for:
    `fold_in(dropout, step)`, `fold_in(shuffle, epoch)` and
    `fold_in(fold_in(augment, epoch), example)`. Seed and step are therefore enough to resume.

    Attributes:
      init: initial parameters.
      split: validation split.
      shuffle: order of the examples in an epoch.
      augment: augmentation of an example in an epoch.
      dropout: dropout masks of a step.
    """

    init: jax.Array
    split: jax.Array
    shuffle: jax.Array
    augment: jax.Array
    dropout: jax.Array


def create_streams(seed: int | np.integer | jax.Array) -> Streams:
    """Derives the streams from a seed by folding in one number per purpose.

    Args:
      seed: integer in [0, 2**32), or a traced integer array.

    Raises:
      ConfigError: if the seed is outside its range; JAX would silently drop its higher bits.

    Example:
      >>> a, b = create_streams(0), create_streams(1)
      >>> bool(jax.random.bits(a.init) == jax.random.bits(b.init))
      False
    """
    if isinstance(seed, int | np.integer) and not 0 <= seed < 2**32:
        raise ConfigError(f"seed is {seed}; expected an integer in [0, 2**32)")
    # By name, because the default can be changed. With other implementations the numbers of an
    # example depend on its batch.
    root = jax.random.key(seed, impl="threefry2x32")
    return Streams(*(jax.random.fold_in(root, number) for number in range(len(Streams._fields))))
