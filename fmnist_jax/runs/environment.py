"""The environment of a run: machine, device and versions."""

import contextlib
import os
import platform
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from fmnist_jax.digest import sha256_bytes
from fmnist_jax.version import __version__

# What determines the bits of a run, besides its settings.
DECISIVE = ("source", "versions", "device", "num_devices", "processor", "num_cpus", "settings")

# Variables that XLA reads: its flags, and the number of its threads.
_SETTINGS = ("XLA_FLAGS", "PJRT_NPROC", "NPROC")

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
        "machine": platform.platform(),
        "processor": _processor(),
        "num_cpus": _num_cpus(),
        "settings": {name: os.environ[name] for name in _SETTINGS if name in os.environ},
    }


def versions() -> dict[str, str]:
    """Versions of this package and of those that determine what a run computes."""
    return {"fmnist_jax": __version__} | {name: metadata.version(name) for name in _PACKAGES}


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


def _num_cpus() -> int:
    # Those that this process may use.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
