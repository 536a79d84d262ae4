"""Settings and fixtures of all tests."""

import contextlib
import ctypes
import importlib.util
import itertools
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from tests.flags import QUICK

# Before anything imports Keras: the reference runs on JAX, so no TensorFlow is needed.
os.environ["KERAS_BACKEND"] = "jax"
# The gate runs the slow tests with an empty value, as in production.
os.environ.setdefault("XLA_FLAGS", QUICK)

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache

import fmnist_jax as fm
from fmnist_jax.recipes import CLAIMS
from fmnist_jax.xla.jit import platform_jit

ROOT = Path(__file__).parent.parent

# A recipe of each network.
ONE_PER_NETWORK = [
    *CLAIMS,
    "sprint_91",
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("sprint_93", "resnet20")),
]

# A background job is started with SIGINT ignored, and under nohup with SIGHUP ignored. So would be
# the processes of the tests.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Implicit rank promotion is an error.
jax.config.update("jax_numpy_rank_promotion", "raise")

# Uncompiled, each of its hundreds of operations is a program of its own: 57 instead of 23 s for two
# steps of he_stack.
train_step = platform_jit(static_argnames=("config",))(fm.train_step)


@pytest.fixture(scope="session")
def sample() -> fm.Dataset:
    """The embedded sample: 6,000 training and 1,000 test images."""
    return fm.load_fashion_mnist(sample=True)


@pytest.fixture(scope="session")
def tiny(sample: fm.Dataset) -> fm.Dataset:
    """Sixty training and twenty test images, all ten classes."""
    rng = np.random.default_rng(0)
    train, test = rng.permutation(6000)[:60], rng.permutation(1000)[:20]
    return fm.Dataset(
        sample.train_images[train],
        sample.train_labels[train],
        sample.test_images[test],
        sample.test_labels[test],
    )


@pytest.fixture
def getkey():
    """A function that never returns the same key twice."""
    seeds = itertools.count()
    return lambda: jax.random.key(next(seeds))


def load_module(path: Path) -> ModuleType:
    """Imports a file that is not on the path."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiled programs of all tests, workers and processes."""
    root = tmp_path_factory.getbasetemp()
    return (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "cache"


@pytest.fixture(autouse=True)
def _isolated_home(
    tmp_path_factory: pytest.TempPathFactory, cache_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No test reads or changes the caches and data sets of the person who runs it."""
    programs = str(cache_home / "programs")
    monkeypatch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_home))
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", programs)
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    for name in ("TFDS_DATA_DIR", "KERAS_HOME"):
        monkeypatch.delenv(name, raising=False)
    if jax.config.jax_compilation_cache_dir != programs:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", programs)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
        reset_cache()


@pytest.fixture(autouse=True, scope="module")
def _bounded_memory() -> Iterator[None]:
    """Compiled programs of a module are dropped at its end; other modules read them from disk."""
    yield
    jax.clear_caches()
    with contextlib.suppress(OSError):  # without it glibc keeps a gigabyte of what was freed
        ctypes.CDLL("libc.so.6").malloc_trim(0)
