"""`inlined_jaxpr`: a program as one flat list of operations."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core

_CALLS = ("jit", "custom_jvp_call", "custom_vjp_call", "closed_call", "composite", "remat2")


def inlined_jaxpr(function: Callable[..., Any], *arguments: Any) -> core.ClosedJaxpr:
    """Traces a function and replaces each call by the operations that it consists of.

    Of platform-dependent operations it takes the default form, that of GPUs and TPUs, or the first
    if there is no default. Loops, and conditions that depend on an argument, stay single
    operations. Operations that no result needs are left out.

    Args:
      function: of arrays and trees of arrays.
      *arguments: arrays, or their shapes and dtypes.

    Example:
      >>> import jax.numpy as jnp
      >>> closed = inlined_jaxpr(lambda x: jax.nn.relu(x) + 1, jnp.zeros(2))
      >>> [equation.primitive.name for equation in closed.eqns]
      ['max', 'add']
    """
    closed = jax.make_jaxpr(function)(*arguments)
    inlined = jax.make_jaxpr(lambda *values: _evaluate(closed.jaxpr, closed.consts, values))(
        *(jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in closed.in_avals)
    )
    return inlined.replace(jaxpr=inlined.jaxpr.replace(eqns=_needed(inlined.jaxpr)))


def _evaluate(jaxpr: Any, constants: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
    values = dict(zip(jaxpr.constvars, constants, strict=True))
    values |= dict(zip(jaxpr.invars, arguments, strict=True))

    def read(variable: Any) -> Any:
        return variable.val if isinstance(variable, core.Literal) else values[variable]

    for equation in jaxpr.eqns:
        inputs = [read(variable) for variable in equation.invars]
        values |= dict(zip(equation.outvars, _apply(equation, inputs), strict=True))
    return [read(variable) for variable in jaxpr.outvars]


def _apply(equation: Any, inputs: Sequence[Any]) -> Sequence[Any]:
    kind, params = equation.primitive.name, equation.params
    if kind == "platform_index":
        platforms = params["platforms"]
        return [platforms.index(None) if None in platforms else 0]
    if kind == "cond" and isinstance(inputs[0], int):
        branch = params["branches"][inputs[0]]
        return _evaluate(branch.jaxpr, branch.consts, inputs[1:])
    if kind in _CALLS:
        called = params.get("call_jaxpr") or params.get("jaxpr")
        jaxpr, constants = getattr(called, "jaxpr", called), getattr(called, "consts", ())
        return _evaluate(jaxpr, constants, inputs)
    result = equation.primitive.bind(*inputs, **equation.primitive.get_bind_params(params))
    return result if equation.primitive.multiple_results else [result]


def _needed(jaxpr: Any) -> list[Any]:
    """Returns the equations that the results need, in order."""
    wanted = {variable for variable in jaxpr.outvars if not isinstance(variable, core.Literal)}
    needed = []
    for equation in reversed(jaxpr.eqns):
        if wanted.intersection(equation.outvars):
            needed.append(equation)
            wanted.update(v for v in equation.invars if not isinstance(v, core.Literal))
    return needed[::-1]
