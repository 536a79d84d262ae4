"""The environment of a run: machine, device and versions."""

import contextlib
import os
import platform
import sys
import time
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from fmnist_jax.differences import differences_message
from fmnist_jax.digest import sha256_bytes
from fmnist_jax.errors import EnvironmentWarning
from fmnist_jax.runs import files
from fmnist_jax.version import __version__

# What determines the bits of a run, besides its settings.
DECISIVE = ("source", "versions", "device", "processor", "num_threads", "settings", "sources")

# Settings of JAX that change what a run computes, and their defaults.
_DEFAULTS = {
    "jax_default_matmul_precision": None,
    "jax_disable_jit": False,
    "jax_enable_x64": False,
    "jax_random_seed_offset": 0,
    "jax_threefry_partitionable": True,
}

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def describe() -> dict[str, Any]:
    """Describes this process, its machine and the default device, ready for JSON.

    Example:
      >>> describe()["num_devices"] >= 1
      True
    """
    device = jax.devices()[0]
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "source": _source_sha256(),
        "versions": {"python": platform.python_version()} | versions(),
        "device": device.device_kind,
        "platform": device.platform,
        "num_devices": jax.device_count(),
        "num_processes": jax.process_count(),
        "machine": platform.platform(),
        "processor": _processor(),
        "num_threads": max(num_threads(), jax.local_device_count()),
        "settings": _jax_settings(),
    }


def decisive() -> dict[str, Any]:
    """Returns the part of the description that determines the bits of a run."""
    described = describe()
    return {name: described[name] for name in DECISIVE if name in described}


def record(path: Path, *, sample: bool, sources: dict[str, Any], is_resumed: bool) -> None:
    """Adds this process to environment.json.

    Args:
      path: the file.
      sample: whether the run trains on the embedded sample.
      sources: file and SHA-256 of the source of each part that is not of this package.
      is_resumed: whether the run continues one that another process began.

    Warns:
      EnvironmentWarning: if a resumed run's environment has changed.
    """
    entry = describe()
    if sample:
        entry["sample"] = True
    if sources:
        entry["sources"] = sources
    entries = files.read_json(path) or []
    if entries and is_resumed:
        before, now = ({name: each.get(name) for name in DECISIVE} for each in (entries[-1], entry))
        message = differences_message(
            "the environment has changed, which may change the results of the resumed run:",
            before,
            now,
            ("before", "now"),
        )
        if message:
            warnings.warn(message, EnvironmentWarning, stacklevel=2)
    files.write_json(path, [*entries, entry])


def versions() -> dict[str, str]:
    """Versions of this package and of those that determine what a run computes."""
    return {"fmnist_jax": __version__} | {name: metadata.version(name) for name in _PACKAGES}


def _jax_settings() -> dict[str, Any]:
    """Returns XLA's flags, and the settings of JAX that differ from their defaults."""
    flags = {name: os.environ[name] for name in ("XLA_FLAGS",) if name in os.environ}
    values = {name: getattr(jax.config, name) for name in _DEFAULTS}
    return flags | {name: value for name, value in values.items() if value != _DEFAULTS[name]}


def _source_sha256() -> str:
    """SHA-256 of this package's source."""
    package = Path(__file__).parents[1]
    return sha256_bytes(b"".join(path.read_bytes() for path in sorted(package.rglob("*.py"))))


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def num_threads() -> int:
    """Returns the threads of XLA on a CPU, unless it has more devices: NPROC, or all cores."""
    for name in ("PJRT_NPROC", "NPROC"):
        if os.environ.get(name, "").isdecimal():
            return int(os.environ[name])
    # Those that this process may use.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
