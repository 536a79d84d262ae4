"""JAX's persistent compilation cache, and what its entries depend on."""

import contextlib
import glob
import hashlib
import os
import platform
import re
from importlib import metadata
from pathlib import Path

import jax

from fmnist_jax.paths import user_folder


def enable_compilation_cache(directory: Path | None = None) -> Path | None:
    """Enables JAX's persistent compilation cache for this process.

    JAX keys an entry by program, compiler options and device. The directory adds the versions of
    JAX and the processor, because a program may use instructions that another processor lacks.
    Unreadable entries are recompiled.

    Args:
      directory: parent of the cache directory. If None, `fmnist_jax` in `$XDG_CACHE_HOME` or
        `~/.cache`. A cache directory that JAX has already (`JAX_COMPILATION_CACHE_DIR`) is kept.

    Returns:
      The cache directory; None without a home folder, where nothing is cached.
    """
    present = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if present:
        return Path(present)
    if directory is None:
        cache = user_folder("~/.cache", "XDG_CACHE_HOME")
        if cache is None:
            return None
        directory = cache / "fmnist_jax"
    folder = directory / f"compiled-{machine_sha256()[:16]}"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    # A run compiles dozens of small programs, which together take as long as the training loop.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return folder


def remove_unreadable_entry(message: str) -> None:
    """Removes the cache entry that a warning of JAX reports as unreadable.

    A killed process or a full disk leaves a truncated entry. JAX recompiles the program, but does
    not overwrite the entry, so every later process would recompile it.

    Args:
      message: text of a warning. Any other message is ignored.
    """
    found = re.match(
        r"Error (?:reading|writing) persistent compilation cache entry for '([^']+)'", message
    )
    folder = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    if found and folder:
        for path in Path(folder).glob(f"{glob.escape(found[1])}-*-cache"):
            with contextlib.suppress(OSError):  # an entry that remains only costs time
                path.unlink()


def machine_sha256() -> str:
    """Returns the SHA-256 of what a compiled program depends on: processor, XLA flags, versions."""
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
