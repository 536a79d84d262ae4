"""`Layout`: the devices of a training. Here it is one; `distributed.shards` has several."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Layout:
    """One device that computes every batch as a whole.

    Steps, loop and prediction call these methods where several devices would differ, so that their
    code reads as that of one device. A subclass overrides them.

    Example:
      >>> Layout().run(jnp.add, 1, 2).tolist()
      3
    """

    @property
    def num_devices(self) -> int:
        """Devices that compute."""
        return 1

    def on_one_device(self) -> "Layout":
        """Returns the layout that divides batches in the same way on the default device."""
        return self

    def part_size(self, batch_size: int) -> int:
        """Returns the examples of a batch that are computed together.

        Raises:
          ConfigError: if a batch of this size cannot be divided.
        """
        return batch_size

    def place(self, tree: T) -> T:
        """Returns the tree with its arrays on every device; those in place are not copied."""
        return jax.tree.map(jnp.asarray, tree)

    def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """Calls a function on every device; arguments and results are the same on all."""
        return function(*arguments)

    def map(
        self, function: Callable[[Any, jax.Array], jax.Array], shared: Any, rows: jax.Array
    ) -> jax.Array:
        """Calls `function(shared, rows)`, where each device gets an equal part of the rows.

        The results are concatenated. The number of rows is a multiple of `num_devices`.
        """
        return function(shared, rows)

    def read(self, read: Callable[..., T], batch_size: int) -> T:
        """Reads a batch, or the part of this device, by `read(first=..., num_rows=...)`."""
        return read(first=0, num_rows=batch_size)

    def sum_grads(
        self, compute: Callable[..., Any], shared: tuple[Any, ...], batch: Any, key: jax.Array
    ) -> Any:
        """Sums `compute(*shared, batch, key, num_examples)` over the parts of a batch.

        Args:
          compute: returns a `StepGrads` of a part, for the mean over `num_examples`.
          shared: arguments that are the same for every part.
          batch: a `Batch`, or the part of this device.
          key: a typed PRNG key, used here and nowhere else.
        """
        return compute(*shared, batch, key, jnp.sum(batch.mask))

    def update(self, update: Callable[..., T], *arguments: Any) -> T:
        """Calls the optimizer's update, with the same bits on every device."""
        return update(*arguments)


ONE_DEVICE = Layout()
