"""`fence`, `reproducible`: calls that XLA:CPU does not inline, so it does not fuse across them."""

import contextlib
import functools
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import jax
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint

from fmnist_jax.errors import EnvironmentWarning

try:
    from jax.experimental.xla_metadata import set_xla_metadata
except ImportError:
    set_xla_metadata = None  # type: ignore[assignment]

T = TypeVar("T")

_barrier = jax.jit(lax.optimization_barrier)


@functools.cache
def _not_inlined() -> Callable[[], AbstractContextManager[Any]]:
    """Returns a function whose contexts mark the calls that are traced in them."""
    if set_xla_metadata is None:
        message = (
            f"jax {jax.__version__} has no set_xla_metadata; programs may be slower on a CPU, and "
            "rounding may differ between them"
        )
        warnings.warn(message, EnvironmentWarning, stacklevel=2)
        return contextlib.nullcontext
    return functools.partial(set_xla_metadata, inlineable="false")


def fence(arrays: T) -> T:
    """Returns the arrays unchanged; XLA:CPU does not recompute them in their consumers.

    XLA:CPU duplicates elementwise operations into each consumer, so the producers of an array with
    sixteen consumers are computed sixteen times. It drops `optimization_barrier` before fusion, but
    does not fuse across a call that it may not inline. The call copies nothing, and unused arrays
    are not computed.

    For programs on a CPU only.

    Args:
      arrays: a pytree of arrays.

    Example:
      >>> import jax.numpy as jnp
      >>> fence(jnp.arange(3))
      Array([0, 1, 2], dtype=int32)
    """
    with _not_inlined()():
        return jax.tree.map(_barrier, arrays)


def fenced_transpose(matrix: jax.Array) -> jax.Array:
    """Returns the transpose of a matrix, stored by rows.

    Without the constraint XLA chooses the layout. That of jax 0.12 then copies the matrix twice:
    before the fence by columns, which changes nothing, and behind it by rows.

    For programs on a CPU only.

    Args:
      matrix: [m, n].

    Returns:
      [n, m].

    Example:
      >>> import jax.numpy as jnp
      >>> fenced_transpose(jnp.ones((2, 3))).shape
      (3, 2)
    """
    return fence(with_layout_constraint(matrix.T, Layout((0, 1))))


def reproducible(function: Callable[..., T], *arrays: Any) -> T:
    """Calls a pure function such that its result has the same bits in every program.

    XLA:CPU fuses a function with the operations around it, and rounding depends on the fusion. It
    does not fuse across a call that it may not inline. On other devices this is a plain call,
    because their compilers have no such call.

    Args:
      function: hashable.
      *arrays: its arguments.

    Example:
      >>> import jax.numpy as jnp
      >>> print(reproducible(jnp.add, 1.0, 2.0))
      3.0
    """

    def call(*arrays: Any) -> T:
        with _not_inlined()():
            return jax.jit(function)(*arrays)

    return lax.platform_dependent(*arrays, cpu=call, default=function)


def inlining(function: Callable[..., T]) -> Callable[..., T]:
    """Lets XLA:CPU inline the calls inside a function that `reproducible` calls.

    Without it these calls are not inlined either, which makes a large function slow.

    Args:
      function: pure.

    Example:
      >>> import jax.numpy as jnp
      >>> print(reproducible(inlining(jnp.add), 1.0, 2.0))
      3.0
    """

    @functools.wraps(function)
    def call(*arrays: Any) -> T:
        if set_xla_metadata is None:
            return function(*arrays)
        with set_xla_metadata(inlineable=None):
            return function(*arrays)

    return call
