"""`Shards`: a batch in equal parts, with the same bits on any number of devices."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh

from fmnist_jax.config import check_shards
from fmnist_jax.data.batches import Batch, join, split
from fmnist_jax.distributed.mesh import AXIS, on_each_device, replicate
from fmnist_jax.train.layout import Layout
from fmnist_jax.train.step import StepGrads
from fmnist_jax.xla.noinline import inlining, reproducible

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Shards(Layout):
    """A fixed number of shards of each batch, which one device or several compute.

    The gradients of the shards are computed apart, each with its own dropout key, batch
    normalization and microbatches, and summed in a fixed order. Batch statistics are averaged over
    the shards. The bits of a training depend on the number of shards, and not on the number of
    devices.

    Attributes:
      num_shards: a power of two that divides the batch size.
      mesh: devices that share the shards, from `create_mesh`; their number divides `num_shards`.
        None is one device.

    Raises:
      ValueError: if `num_shards` is no multiple of the number of devices.

    Example:
      >>> import optax, fmnist_jax as fm
      >>> model, layout = fm.create_model("same_3x3"), Shards(8)
      >>> config = fm.StepConfig(model=model, tx=optax.sgd(0.1), layout=layout)
      >>> layout.part_size(config.batch_size)
      16
    """

    num_shards: int
    mesh: Mesh | None = None

    def __post_init__(self) -> None:
        if self.num_shards % self.num_devices:
            raise ValueError(
                f"num_shards is {self.num_shards}, but the mesh has {self.num_devices} devices"
            )

    @property
    def num_devices(self) -> int:
        return 1 if self.mesh is None else self.mesh.size

    def on_one_device(self) -> Layout:
        return dataclasses.replace(self, mesh=None)

    def part_size(self, batch_size: int) -> int:
        check_shards(self.num_shards, batch_size)
        return batch_size // self.num_shards

    def place(self, tree: T) -> T:
        return replicate(tree, self.mesh)

    def run(self, function: Callable[..., T], *arguments: Any) -> T:
        if self.mesh is None:
            return function(*arguments)
        return on_each_device(function, self.mesh)(*arguments)

    def map(
        self, function: Callable[[Any, jax.Array], jax.Array], shared: Any, rows: jax.Array
    ) -> jax.Array:
        if self.mesh is None:
            return function(shared, rows)

        def gather(shared: Any, rows: jax.Array) -> jax.Array:
            return lax.all_gather(function(shared, rows), AXIS, tiled=True)

        return on_each_device(gather, self.mesh, split=(1,))(shared, rows)

    def read(self, read: Callable[..., T], batch_size: int) -> T:
        size = self.part_size(batch_size)
        return join(
            lax.map(lambda shard: read(first=shard * size, num_rows=size), self._local_shards())
        )

    def sum_grads(
        self,
        compute: Callable[..., StepGrads],
        shared: tuple[Any, ...],
        batch: Batch,
        key: jax.Array,
    ) -> StepGrads:
        num_examples = jnp.sum(batch.mask)
        if self.mesh is not None:
            num_examples = lax.psum(num_examples, AXIS)
        numbers, num_rows = self._local_shards(), len(batch.labels)
        if num_rows % len(numbers):
            raise ValueError(
                f"the batch has {num_rows} examples; expected a multiple of the {len(numbers)} "
                "shards"
            )
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)
        # Sequentially, so that a shard's bits do not depend on their number on this device.
        parts = lax.map(
            lambda part: reproducible(inlining(compute), *shared, *part, num_examples),
            (split(batch, num_rows // len(numbers)), keys),
        )
        grads, model_state, metrics = sum_shards(tuple(parts[:3]), self.mesh)
        model_state = jax.tree.map(
            lambda leaf: (leaf / self.num_shards).astype(leaf.dtype), model_state
        )
        metrics = metrics._replace(finite_steps=jnp.isfinite(metrics.loss).astype(jnp.int32))
        return StepGrads(grads, model_state, metrics, join(parts.losses))

    def update(self, update: Callable[..., T], *arguments: Any) -> T:
        return reproducible(inlining(update), *arguments)

    def _local_shards(self) -> jax.Array:
        """Returns int32[k], the numbers of the shards that this device computes."""
        num_local = self.num_shards // self.num_devices
        first = 0 if self.mesh is None else lax.axis_index(AXIS) * num_local
        return first + jnp.arange(num_local)


def sum_shards(tree: T, mesh: Mesh | None) -> T:
    """Sums over the shards of a batch, in an order that does not depend on the number of devices.

    The order is that of a binary tree: neighbours are added, then neighbouring sums. A device adds
    its own shards; across devices, each one adds a part of the elements of all. `lax.psum` has the
    order that the backend chooses.

    Args:
      tree: float and integer leaves [k, ...] of the `k` shards of this device, a power of two. Sums
        of integers are exact up to 2**24.
      mesh: None if one device computes all; otherwise call it on each device of the mesh.

    Returns:
      The sums, on every device.

    Example:
      >>> print(sum_shards(jnp.float32([1, 2, 3, 4]), None))
      10.0
    """
    rows = jax.vmap(lambda shard: ravel_pytree(shard)[0])(tree)
    unravel = ravel_pytree(jax.tree.map(lambda leaf: leaf[0], tree))[1]
    total = _sum_pairwise(rows)
    if mesh is not None:
        size = len(total)
        parts = jnp.pad(total, (0, -size % mesh.size)).reshape(mesh.size, -1)
        parts = lax.all_to_all(parts, AXIS, split_axis=0, concat_axis=0)
        total = lax.all_gather(_sum_pairwise(parts), AXIS, tiled=True)[:size]
    return unravel(total)


def _sum_pairwise(rows: jax.Array) -> jax.Array:
    while len(rows) > 1:
        rows = rows[::2] + rows[1::2]
    return rows[0]
