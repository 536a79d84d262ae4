"""Meshes of devices that share each batch."""

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
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
      The tree; leaves that are already on these devices are not copied.

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
      >>> total = on_each_device(lambda x: jax.lax.psum(jnp.sum(x), AXIS), mesh, split=(0,))
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
