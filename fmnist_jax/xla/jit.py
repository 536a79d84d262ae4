"""`platform_jit`: `jax.jit` with the compiler options of the default backend."""

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
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

# For programs with products of bfloat16, where the processor has instructions for them. YNN
# multiplies matrices of 2048 x 2048 at 387 GFLOP/s, XLA without it at 208 (Zen 4). Without the
# instructions YNN is the slower one. It also slows down products of float32, by a tenth to a fifth
# of a step.
_BFLOAT16_OPTIONS: dict[str, str | bool | int] = {
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"
}
_BFLOAT16_FLAGS = {"avx512_bf16", "amx_bf16"}

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
        self._outer = functools.cache(self._compiled)

    def _compiled(self, *, is_bfloat16: bool) -> Any:
        # Called by the first call, because asking for the default backend initializes it.
        backend = jax.default_backend()
        options = supported_options(backend)
        if self._quick:
            options = options | _QUICK_OPTIONS.get(backend, {})
        if is_bfloat16 and backend == "cpu" and has_bfloat16_instructions():
            options = {name: _BFLOAT16_OPTIONS.get(name, old) for name, old in options.items()}
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
        return self._outer(is_bfloat16=_is_bfloat16(kwargs))(*args, **kwargs)

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        """Lowers the outermost program for these arguments or their shapes, as `jax.jit` does."""
        return self._outer(is_bfloat16=_is_bfloat16(kwargs)).lower(*args, **kwargs)


def is_deleted(leaf: Any) -> bool:
    """Whether an array was donated to a call."""
    return isinstance(leaf, jax.Array) and leaf.is_deleted()


@functools.cache
def has_bfloat16_instructions() -> bool:
    """Whether this processor multiplies bfloat16; False where it cannot be told, as on macOS."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return not _BFLOAT16_FLAGS.isdisjoint(text.split())


def _is_bfloat16(kwargs: Mapping[str, Any]) -> bool:
    """Whether a static argument, such as a `StepConfig`, asks for products of bfloat16."""
    return any(getattr(arg, "matmul_precision", None) == "bfloat16" for arg in kwargs.values())


def _is_tracing(args: Any, kwargs: Any) -> bool:
    # Under `jit` every new array is a tracer; under `vmap` and `grad` only the arguments are.
    leaves = (*jax.tree.leaves((args, kwargs)), jnp.zeros(()))
    return any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)
