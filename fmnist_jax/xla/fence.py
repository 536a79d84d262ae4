"""`fence` and `isolated`: what XLA:CPU must store, and what it must compile by itself."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax import lax
from jax.experimental.xla_metadata import set_xla_metadata

T = TypeVar("T")

_stored = jax.jit(lax.optimization_barrier)


def fence(arrays: T) -> T:
    """Returns the arrays as they are; on a CPU, what uses them does not compute them anew.

    XLA:CPU writes elementwise operations into each of their consumers, so what leads to an array
    with sixteen consumers is computed sixteen times. It forgets `optimization_barrier` before that
    happens, but never looks across a call that it may not inline. Nothing is copied, and what
    nothing uses is not computed.

    For programs on a CPU only.

    Args:
      arrays: a tree of arrays.

    Example:
      >>> import jax.numpy as jnp
      >>> fence(jnp.arange(3))
      Array([0, 1, 2], dtype=int32)
    """
    with set_xla_metadata(inlineable="false"):
        return jax.tree.map(_stored, arrays)


def isolated(function: Callable[..., T], *arrays: Any) -> T:
    """Calls a pure function so that its bits are the same in every program on a CPU.

    XLA:CPU fuses what a function computes with what is around it, and the rounding follows the
    fusion. It never fuses across a call that it may not inline.

    For programs on a CPU only.

    Args:
      function: hashable.
      *arrays: its arguments.

    Example:
      >>> import jax.numpy as jnp
      >>> isolated(jnp.add, 1.0, 2.0)
      Array(3., dtype=float32, weak_type=True)
    """
    with set_xla_metadata(inlineable="false"):
        return jax.jit(function)(*arrays)
