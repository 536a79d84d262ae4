"""`compiled`: `jax.jit` for the outermost call, with what each platform's compiler needs.

`keep_compiled` lets later processes find what this one compiles, `forget_damaged` removes what they
cannot read.
"""

import contextlib
import functools
import glob
import hashlib
import os
import platform
import re
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Generic, ParamSpec, TypeVar

import jax
import jax.numpy as jnp

P = ParamSpec("P")
R = TypeVar("R")

# XLA:CPU of jaxlib 0.10 hands unpadded convolutions to its YNN fusions: measured 2 to 10 times
# slower than the Eigen path, and wrong without a word in one case (jax issue 39103). The
# empty value turns them off for the one program; no environment variable is touched.
COMPILER_OPTIONS: dict[str, dict[str, str | bool | int]] = {
    "cpu": {"xla_cpu_experimental_ynn_fusion_type": ""}
}

# Code that runs once needs no better. Measured for the first state of small_dropout: compiled in
# 0.64 s instead of 2.2, the same bits as fast.
_QUICK_OPTIONS: dict[str, dict[str, str | bool | int]] = {
    "cpu": {"xla_backend_optimization_level": 1}
}


def compiled(
    *,
    static_argnames: Sequence[str] = (),
    donate_argnames: Sequence[str] = (),
    quick: bool = False,
) -> Callable[[Callable[P, R]], "Compiled[P, R]"]:
    """Compiles a pure function on its first call, as `jax.jit` does; a decorator.

    JAX accepts compiler options on the outermost `jit` only. Called from plain Python, the
    function is therefore compiled with `COMPILER_OPTIONS` of the default backend; called while
    something else is being traced (`jit`, `vmap`, `grad`, `lax.map`), it is an ordinary nested
    `jit` and composes freely.

    Args:
      static_argnames: arguments that are part of the program; they must be hashable.
      donate_argnames: arguments whose buffers the result may reuse. They are gone afterwards.
      quick: whether to compile in less time, into code that may be slower.

    Example:
      >>> @compiled()
      ... def double(x):
      ...     return 2 * x
      >>> print(double(3.0), jax.vmap(double)(jnp.arange(2.0)))
      6.0 [0. 2.]
    """
    return functools.partial(
        Compiled,
        static_argnames=tuple(static_argnames),
        donate_argnames=tuple(donate_argnames),
        quick=quick,
    )


class Compiled(Generic[P, R]):
    """A function under `compiled`; `__wrapped__` is the function itself."""

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
        # Made at the first call, not on import: asking for the backend starts it.
        backend = jax.default_backend()
        options = COMPILER_OPTIONS.get(backend, {})
        if self._quick:
            options = options | _QUICK_OPTIONS.get(backend, {})
        return jax.jit(
            self._function,
            static_argnames=self._static_argnames,
            donate_argnames=self._donate_argnames,
            compiler_options=options,
        )

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        return (self._inner if _is_tracing(args, kwargs) else self._outer)(*args, **kwargs)

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        """The outermost program, lowered for these arguments or their shapes, as `jax.jit`'s."""
        return self._outer.lower(*args, **kwargs)

    def trace(self, *args: Any, **kwargs: Any) -> Any:
        """The same, traced only; a call with arguments of these shapes finds it done."""
        return self._outer.trace(*args, **kwargs)


def _is_tracing(args: Any, kwargs: Any) -> bool:
    # Under `jit` every new array is a tracer; under `vmap` and `grad` only the arguments are.
    leaves = (*jax.tree.leaves((args, kwargs)), jnp.zeros(()))
    return any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)


def keep_compiled(directory: Path | None = None) -> Path:
    """Keeps what this process compiles, and takes what an earlier one has kept.

    It sets JAX's configuration for the process. JAX keys each program by its content, its options
    and the device; the folder is moreover one for each version of JAX and each kind of processor,
    because a program for one processor may use instructions that another has not. What cannot be
    read is compiled anew. `fit` keeps its training loop there as well, in a form that needs no
    tracing (`program.py`).

    Args:
      directory: None takes `fmnist_jax` in `$XDG_CACHE_HOME`, or in `~/.cache`. Where JAX has a
        folder already (`JAX_COMPILATION_CACHE_DIR`), that one stays.

    Returns:
      The folder.
    """
    present = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if present:
        return Path(present)
    if directory is None:
        directory = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fmnist_jax"
    folder = directory / f"compiled-{machine_sha256()[:16]}"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # A run has dozens of small programs, which together take as long as the training loop.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return folder


def forget_damaged(message: str) -> None:
    """Removes the kept programs that a warning of JAX is about.

    A process that is killed while it keeps a program, or a full disk, leaves a part of it. JAX
    compiles it anew, but writes over nothing: it would do so in every process.

    Args:
      message: of the warning; of any other nothing is removed.
    """
    found = re.match(
        r"Error (?:reading|writing) persistent compilation cache entry for '([^']+)'", message
    )
    folder = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if found and folder:
        for path in Path(folder).glob(f"{glob.escape(found[1])}-*-cache"):
            with contextlib.suppress(OSError):  # where it stays, it costs time alone
                path.unlink()


def machine_sha256() -> str:
    """Of what decides whether a compiled program runs here: processor, flags, versions of JAX."""
    parts = [platform.machine(), platform.system(), os.environ.get("XLA_FLAGS", "")]
    parts += [metadata.version(name) for name in ("jax", "jaxlib")]
    processor = Path("/proc/cpuinfo")
    if processor.exists():
        names = ("model name", "flags", "Features", "CPU part")
        lines = processor.read_text().splitlines()
        parts += sorted({line for line in lines if line.startswith(names)})
    else:
        parts += [platform.processor(), platform.node()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
