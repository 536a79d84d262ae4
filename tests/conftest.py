"""Settings and fixtures of all tests."""

import dataclasses
import importlib.util
import itertools
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

# Before anything imports Keras: the reference runs on JAX, so no TensorFlow is needed.
os.environ["KERAS_BACKEND"] = "jax"

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache.compilation_cache import reset_cache

import fmnist_jax as fm
from fmnist_jax.xla.jit import platform_jit

ROOT = Path(__file__).parent.parent

# A job in the background is started with SIGINT ignored, and so would be what the tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A shape that grows a dimension without being asked to is an error.
jax.config.update("jax_numpy_rank_promotion", "raise")


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


@pytest.fixture(scope="session")
def run_py() -> ModuleType:
    """The command line, as a module."""
    return load_module(ROOT / "experiments" / "run.py")


# By itself each of its hundreds of operations is a program of its own: 57 instead of 23 s for two
# updates of he_stack.
train_step = platform_jit(static_argnames=("model", "tx", "slice_size"))(fm.train_step)


@dataclasses.dataclass(frozen=True)
class Linear:
    """The smallest model: compiled in a moment."""

    num_classes: int = 10

    def init(self, key, images, train):
        shape = images[0].size, self.num_classes
        return {"params": {"kernel": jax.random.normal(key, shape) / 28}}

    def apply(self, variables, images, *, train, rngs=None):
        return images.reshape(len(images), -1) @ variables["params"]["kernel"]


def load_module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all tests: many run the same command, and compile it once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _own_home(
    tmp_path_factory: pytest.TempPathFactory, cache_home: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """No test sees or changes the caches and data sets of the person who runs it."""
    home = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache_home))
    for name in ("TFDS_DATA_DIR", "KERAS_HOME"):
        monkeypatch.delenv(name, raising=False)
    yield
    # The command line may have been called in this process.
    if jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        jax.config.update("jax_compilation_cache_dir", None)
        reset_cache()
