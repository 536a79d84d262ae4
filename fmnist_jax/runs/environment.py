"""What a run ran on: machine, device and versions."""

import contextlib
import os
import platform
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

# What decides the bits of a run, besides its settings.
DECISIVE = ("program", "versions", "device", "num_devices", "processor", "num_cpus", "settings")

# What XLA takes from the environment: its flags, and the number of its threads.
_SETTINGS = ("XLA_FLAGS", "PJRT_NPROC", "NPROC")

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def describe() -> dict[str, Any]:
    """This process, its machine and the default device, ready for JSON.

    Example:
      >>> describe()["num_devices"] >= 1
      True
    """
    device = jax.devices()[0]
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
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
    """Versions of this package and of those that decide what a run computes."""
    from fmnist_jax.version import __version__

    return {"fmnist_jax": __version__} | {name: metadata.version(name) for name in _PACKAGES}


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _num_cpus() -> int:
    # What this process may use, which is what decides the speed.
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
