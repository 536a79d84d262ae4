"""`with_gradients`: a function whose gradients are programs of their own, in every mode of JAX."""

import functools
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.interpreters import ad, batching, mlir

from fmnist_jax.fast.precision import default_precision

R = TypeVar("R")
Arrays = tuple[jax.Array, ...]
Pull = Callable[[Arrays, jax.Array], Arrays]


class Push(Protocol):
    """Maps residuals and tangents of the arguments to the tangent of the result."""

    def __call__(self, residuals: Arrays, tangents: Arrays, /) -> jax.Array:
        """Is linear in the tangents."""


def with_gradients(
    function: Callable[..., jax.Array],
    forward: Callable[..., tuple[jax.Array, Arrays]],
    push: Push,
    pull: Pull,
) -> Callable[..., jax.Array]:
    """Returns a function with gradients of its own that all transformations of JAX take.

    `jax.custom_vjp` would refuse forward mode. Here the derivative is one operation, which is
    linear in the tangents. Reverse mode transposes it, by `pull`; forward mode computes it, by
    `push`; a second derivative is that of `push`. The default precision of products where this is
    called is that of the gradients as well.

    Args:
      function: maps arrays to an array.
      forward: as `function`, called where a gradient is taken; returns the residuals as well.
      push: linear in the tangents; any form, because training needs it for its shape only.
      pull: maps residuals and the cotangent of the result to those of the arguments.

    Example:
      >>> import jax.numpy as jnp
      >>> square = with_gradients(
      ...     jnp.square, lambda x: (x * x, (x,)), lambda r, t: 2 * r[0] * t[0],
      ...     lambda r, cotangent: (2 * r[0] * cotangent,),
      ... )
      >>> print(square(3.0), jax.grad(square)(3.0), jax.jvp(square, (3.0,), (1.0,))[1])
      9.0 6.0 6.0
    """
    # All but `function` are traced later, where another precision may be the default.
    forward, pull = _with_precision(forward), _with_precision(pull)
    push = _with_precision(push)

    @jax.custom_jvp
    def operation(*arrays: jax.Array) -> jax.Array:
        return function(*arrays)

    @operation.defjvp
    def _(arrays: Arrays, tangents: Arrays) -> tuple[jax.Array, jax.Array]:
        result, residuals = forward(*arrays)
        count = len(residuals)
        return result, _tangent.bind(*residuals, *tangents, count=count, push=push, pull=pull)

    return operation


def _with_precision(rule: Callable[..., R]) -> Callable[..., R]:
    """Returns a function that is traced in the default precision of now."""
    precision = default_precision()

    def traced(*arrays: Any) -> R:
        with jax.default_matmul_precision(precision):
            return rule(*arrays)

    return traced


# The tangent of the result: of `count` residuals, then of the tangents of the arguments.
_tangent = core.Primitive("tangent")


def _compute(*values: jax.Array, count: int, push: Push, pull: Pull) -> jax.Array:
    return push(values[:count], values[count:])


def _abstract(*avals: Any, **params: Any) -> Any:
    return jax.make_jaxpr(functools.partial(_compute, **params))(*avals).out_avals[0]


def _transpose(cotangent: Any, *values: Any, count: int, push: Push, pull: Pull) -> list[Any]:
    cotangents = pull(values[:count], ad.instantiate_zeros(cotangent))
    wanted = map(ad.is_undefined_primal, values[count:])
    return [None] * count + [c if w else None for c, w in zip(cotangents, wanted, strict=True)]


def _differentiate(primals: Any, tangents: Any, **params: Any) -> Any:
    return jax.jvp(
        lambda *values: _compute(*values, **params),
        primals,
        [ad.instantiate_zeros(tangent) for tangent in tangents],
    )


def _map(values: Any, axes: Any, *, count: int, push: Push, pull: Pull) -> tuple[jax.Array, int]:
    """Adds a leading axis to the values that have an axis in `axes`, and to the tangent."""
    values = [v if a is None else jnp.moveaxis(v, a, 0) for v, a in zip(values, axes, strict=True)]
    axes = tuple(None if axis is None else 0 for axis in axes)
    mapped = axes[:count], axes[count:]

    def pull_mapped(residuals: Arrays, cotangent: jax.Array) -> Arrays:
        cotangents = jax.vmap(pull, in_axes=(mapped[0], 0))(residuals, cotangent)
        pairs = zip(cotangents, mapped[1], strict=True)
        return tuple(c.sum(0) if axis is None else c for c, axis in pairs)

    tangent = _tangent.bind(
        *values, count=count, push=jax.vmap(push, in_axes=mapped), pull=pull_mapped
    )
    return tangent, 0


_tangent.def_impl(_compute)
_tangent.def_abstract_eval(_abstract)
mlir.register_lowering(_tangent, mlir.lower_fun(_compute, multiple_results=False))
ad.primitive_jvps[_tangent] = _differentiate
ad.primitive_transposes[_tangent] = _transpose
batching.primitive_batchers[_tangent] = _map
