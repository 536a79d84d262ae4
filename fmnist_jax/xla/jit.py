"""`platform_jit`: `jax.jit` with the compiler options of the default backend."""

import functools
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Generic, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import jaxlib

from fmnist_jax.errors import EnvironmentWarning

P = ParamSpec("P")
R = TypeVar("R")

# XLA:CPU of jaxlib 0.10 lowers unpadded convolutions to YNN fusions. They are 2 to 10 times slower
# than the Eigen convolutions (measured), and return wrong values in one case (jax issue 39103). The
# empty value disables them for one program, without an environment variable.
COMPILER_OPTIONS: dict[str, dict[str, str | bool | int]] = {
    "cpu": {"xla_cpu_experimental_ynn_fusion_type": ""}
}

# For code that runs once. Measured on the initial state of small_dropout: compiled in 0.64 s
# instead of 2.2 s, with the same results.
_QUICK_OPTIONS: dict[str, dict[str, str | bool | int]] = {
    "cpu": {"xla_backend_optimization_level": 1}
}


@functools.cache
def supported_options(backend: str) -> dict[str, str | bool | int]:
    """Returns those of `COMPILER_OPTIONS` that the compiler of this backend knows.

    Options are experimental: a version of XLA may drop one. Each is tried once on an empty program.

    Args:
      backend: as `jax.default_backend()` returns it.

    Warns:
      EnvironmentWarning: if an option is unknown. It is left out.
    """
    supported = {}
    for name, value in COMPILER_OPTIONS.get(backend, {}).items():
        try:
            jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
        except jax.errors.JaxRuntimeError as error:
            if "No such compile option" not in str(error):
                raise
            message = (
                f"XLA of jaxlib {jaxlib.__version__} has no compiler option {name}; it is left "
                "out, and programs may be slower"
            )
            warnings.warn(message, EnvironmentWarning, stacklevel=2)
        else:
            supported[name] = value
    return supported


def platform_jit(
    *, static_argnames: Sequence[str] = (), donate_argnames: Sequence[str] = (), quick: bool = False
) -> Callable[[Callable[P, R]], "PlatformJit[P, R]"]:
    """Returns a decorator like `jax.jit` that sets the default backend's compiler options.

    JAX accepts compiler options on the outermost `jit` only. Called from plain Python, the
    function is compiled with `COMPILER_OPTIONS`. Called under a JAX transformation (`jit`, `vmap`,
    `grad`, `lax.map`), it is an ordinary nested `jit`.

    Args:
      static_argnames: names of arguments that are compile-time constants; values must be hashable.
      donate_argnames: names of arguments whose buffers are donated. They are deleted by the call.
      quick: whether to optimize less, which compiles faster; for functions that run once.

    Example:
      >>> @platform_jit()
      ... def double(x):
      ...     return 2 * x
      >>> print(double(3.0), jax.vmap(double)(jnp.arange(2.0)))
      6.0 [0. 2.]
    """
    return functools.partial(
        PlatformJit,
        static_argnames=tuple(static_argnames),
        donate_argnames=tuple(donate_argnames),
        quick=quick,
    )


class PlatformJit(Generic[P, R]):
    """A function wrapped by `platform_jit`; `__wrapped__` is the original function."""

    def __init__(
        self,
        function: Callable[P, R],
        *,
        static_argnames: tuple[str, ...],
        donate_argnames: tuple[str, ...],
        quick: bool,
    ) -> None:
        functools.update_wrapper(self, function)
        self._function = function
        self._static_argnames = static_argnames
        self._donate_argnames = donate_argnames
        self._quick = quick
        self._inner = jax.jit(function, static_argnames=static_argnames)

    @functools.cached_property
    def _outer(self) -> Any:
        # Created by the first call, because asking for the default backend initializes it.
        backend = jax.default_backend()
        options = supported_options(backend)
        if self._quick:
            options = options | _QUICK_OPTIONS.get(backend, {})
        return jax.jit(
            self._function,
            static_argnames=self._static_argnames,
            donate_argnames=self._donate_argnames,
            compiler_options=options,
        )

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if _is_tracing(args, kwargs):
            return self._inner(*args, **kwargs)
        if self._donate_argnames and any(map(is_deleted, jax.tree.leaves((args, kwargs)))):
            raise ValueError(
                f"an argument of {self._function.__name__} was donated to an earlier call; "
                "continue with what that call returned"
            )
        return self._outer(*args, **kwargs)

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        """Lowers the outermost program for these arguments or their shapes, as `jax.jit` does."""
        return self._outer.lower(*args, **kwargs)


def is_deleted(leaf: Any) -> bool:
    """Whether an array was donated to a call."""
    return isinstance(leaf, jax.Array) and leaf.is_deleted()


def _is_tracing(args: Any, kwargs: Any) -> bool:
    # Under `jit` every new array is a tracer; under `vmap` and `grad` only the arguments are.
    leaves = (*jax.tree.leaves((args, kwargs)), jnp.zeros(()))
    return any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)
