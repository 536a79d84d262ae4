"""`stratified_split`: training and validation examples."""

from collections.abc import Sequence

import jax
import numpy as np

from fmnist_jax.errors import DataError


def stratified_split(
    key: jax.Array,
    labels: np.ndarray,
    val_fraction: float,
    train_examples: int | None = None,
    exclude: Sequence[int] = (),
) -> tuple[np.ndarray, np.ndarray]:
    """Draws training and validation examples, stratified by class.

    Args:
      key: a typed PRNG key, which must not be used again.
      labels: int[n].
      val_fraction: fraction for validation, in [0, 1).
      train_examples: number of training examples; None takes all that are left.
      exclude: positions that are in neither split; the others keep their random order.

    Returns:
      int32 positions of the training and of the validation examples, ascending.

    Raises:
      DataError: if fewer than `train_examples` are left, or a position to exclude does not exist.

    Example:
      >>> labels = np.repeat([0, 1], 10)
      >>> train, val = stratified_split(jax.random.key(0), labels, 0.2)
      >>> np.bincount(labels[train]).tolist(), np.bincount(labels[val]).tolist()
      ([8, 8], [2, 2])
    """
    if len(exclude) and not 0 <= min(exclude) <= max(exclude) < len(labels):
        raise DataError(
            f"exclude has positions from {min(exclude)} to {max(exclude)}; expected 0 to "
            f"{len(labels) - 1}, the training images"
        )
    shuffled = np.asarray(jax.random.permutation(key, len(labels)))
    shuffled = shuffled[~np.isin(shuffled, np.asarray(exclude, int))]
    val, rest = _take(shuffled, labels, round(val_fraction * len(shuffled)))
    if train_examples is not None:
        if train_examples > len(rest):
            raise DataError(
                f"train_examples is {train_examples:,}, but only {len(rest):,} training examples "
                "are left beside the validation split; choose fewer"
            )
        rest, _ = _take(rest, labels, train_examples)
    return np.sort(rest).astype(np.int32), np.sort(val).astype(np.int32)


def _take(positions: np.ndarray, labels: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the `count` positions with the smallest relative ranks in their class, and others."""
    rank = np.empty(len(positions))
    for label in np.unique(labels[positions]):
        members = np.flatnonzero(labels[positions] == label)
        rank[members] = (np.arange(len(members)) + 0.5) / len(members)
    taken = np.zeros(len(positions), bool)
    taken[np.argsort(rank, kind="stable")[:count]] = True
    return positions[taken], positions[~taken]
