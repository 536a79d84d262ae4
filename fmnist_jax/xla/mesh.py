"""Meshes of devices that share each batch, and sums with the same bits on any number of them."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

T = TypeVar("T")

# Name of the axis over which a batch is split.
AXIS = "data"


def create_mesh(num_devices: int) -> Mesh:
    """Creates a mesh of the first devices, in the order of `jax.devices()`.

    Args:
      num_devices: 1 to `jax.device_count()`; with several processes, all devices.

    Example:
      >>> create_mesh(1).size
      1
    """
    devices = jax.devices()[:num_devices]
    return jax.make_mesh((num_devices,), (AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def replicate(tree: Any, mesh: Mesh | None) -> Any:
    """Returns a copy of the arrays for every device of the mesh.

    Args:
      tree: a pytree of arrays. With several processes, all have the same values.
      mesh: None is the default device.

    Returns:
      The tree; leaves that are in place already are not copied.

    Example:
      >>> import numpy as np
      >>> replicate(np.zeros(3, np.float32), None)
      Array([0., 0., 0.], dtype=float32)
    """
    if mesh is None:
        return jax.tree.map(jnp.asarray, tree)
    sharding = NamedSharding(mesh, PartitionSpec())

    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)
    # `device_put` refuses typed keys for devices of other processes.
    copy = _copy_to(sharding)
    return jax.tree.map(
        lambda leaf: leaf if getattr(leaf, "sharding", None) == sharding else copy(leaf), tree
    )


@functools.cache
def _copy_to(sharding: NamedSharding) -> Callable[[Any], jax.Array]:
    return jax.jit(lambda array: array, out_shardings=sharding)


def on_each_device(function: Callable[..., T], mesh: Mesh, *, split: tuple[int, ...] = ()) -> Any:
    """Returns a function that runs on every device of the mesh, with one result for all.

    Args:
      function: its results must be the same on every device.
      mesh: the devices.
      split: positions of the arguments that are split along their first axis; every device gets an
        equal part. The others are whole.

    Example:
      >>> mesh = create_mesh(1)
      >>> total = on_each_device(lambda x: lax.psum(jnp.sum(x), AXIS), mesh, split=(0,))
      >>> print(total(jnp.ones(4)))
      4.0
    """

    def call(*arguments: Any) -> Any:
        specs = tuple(
            PartitionSpec(AXIS) if position in split else PartitionSpec()
            for position in range(len(arguments))
        )
        # With check_vma, models with a gradient of their own would need `lax.pcast`.
        mapped = jax.shard_map(
            function, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False
        )
        return mapped(*arguments)

    return call


def local_shards(num_shards: int, mesh: Mesh | None) -> jax.Array:
    """Returns int32[k], the numbers of the shards that this device computes.

    Args:
      num_shards: shards of a batch.
      mesh: None if one device computes all; otherwise call it on each device of the mesh.

    Example:
      >>> local_shards(4, None).tolist()
      [0, 1, 2, 3]
    """
    if mesh is None:
        return jnp.arange(num_shards)
    num_local = num_shards // mesh.size
    return lax.axis_index(AXIS) * num_local + jnp.arange(num_local)


def sum_shards(tree: T, mesh: Mesh | None) -> T:
    """Sums over the shards of a batch, in an order that does not depend on the number of devices.

    The order is that of a binary tree: neighbours are added, then neighbouring sums. A device adds
    its own shards; across devices, each one adds a part of the elements of all. `lax.psum` has the
    order that the backend chooses.

    Args:
      tree: float and integer leaves [k, ...] of the `k` shards of this device, a power of two. Sums
        of integers are exact up to 2**24.
      mesh: as for `local_shards`.

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
