"""`evaluate`: a program, operation by operation; `inlined_jaxpr`: a program without calls."""

from collections import Counter
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
    inlined = jax.make_jaxpr(lambda *values: evaluate(closed, values, _apply))(
        *(jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in closed.in_avals)
    )
    return inlined.replace(jaxpr=inlined.jaxpr.replace(eqns=_needed(inlined.jaxpr)))


def evaluate(
    program: Any,
    arguments: Sequence[Any],
    apply: Callable[[Any, list[Any]], Sequence[Any]],
    share: Callable[[Any], Any] = lambda value: value,
) -> list[Any]:
    """Evaluates a program, and returns its results.

    Args:
      program: a jaxpr, closed or without constants.
      arguments: its arguments.
      apply: maps an operation and its inputs to its results.
      share: applied to a value each time that it is read, if it is read more than once.
    """
    jaxpr, constants = getattr(program, "jaxpr", program), getattr(program, "consts", ())
    values = dict(zip(jaxpr.constvars, constants, strict=True))
    values |= dict(zip(jaxpr.invars, arguments, strict=True))
    inputs = [v for equation in jaxpr.eqns for v in equation.invars] + list(jaxpr.outvars)
    uses = Counter(v for v in inputs if not isinstance(v, core.Literal))

    def read(variable: Any) -> Any:
        if isinstance(variable, core.Literal):
            return variable.val
        value = values[variable]
        return share(value) if uses[variable] > 1 else value

    for equation in jaxpr.eqns:
        results = apply(equation, [read(variable) for variable in equation.invars])
        values |= dict(zip(equation.outvars, results, strict=True))
    return [read(variable) for variable in jaxpr.outvars]


def _apply(equation: Any, inputs: Sequence[Any]) -> Sequence[Any]:
    kind, params = equation.primitive.name, equation.params
    if kind == "platform_index":
        platforms = params["platforms"]
        return [platforms.index(None) if None in platforms else 0]
    if kind == "cond" and isinstance(inputs[0], int):
        return evaluate(params["branches"][inputs[0]], inputs[1:], _apply)
    if kind in _CALLS:
        return evaluate(params.get("call_jaxpr") or params.get("jaxpr"), inputs, _apply)
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
