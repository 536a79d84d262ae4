"""The house rules that a machine can check."""

import ast
import inspect
import subprocess
import sys

import pytest

import fmnist_jax as fm
from tests.conftest import ROOT

PACKAGE = ROOT / "fmnist_jax"

# What each module may import of the package. `__init__` may import everything.
ALLOWED = {
    "config": set(),
    "recipes": {"config"},
    "streams": {"config"},
    "compile": set(),
    "idx": set(),
    "tfds_source": {"idx"},
    "data": {"idx", "tfds_source"},
    "augment": set(),
    "winograd": {"fence"},
    "fence": set(),
    "ops": {"fence", "winograd"},
    "models": {"config", "ops"},
    "optim": {"config"},
    "metrics": set(),
    "slices": set(),
    "train": {"augment", "compile", "fence", "metrics", "slices", "streams"},
    "evaluation": {"compile", "metrics", "slices", "train"},
    "checkpoint": {"config", "files"},
    "files": set(),
    "lock": {"config"},
    "signals": set(),
    "environment": set(),
    "progress": set(),
    "page": set(),
    "stats": set(),
    "calibration": set(),
    "scores": {"calibration"},
    "views": {"evaluation"},
    "plan": {
        "augment", "compile", "config", "data", "metrics", "models", "optim", "streams", "train",
    },
    "program": {"compile", "environment", "files", "metrics", "plan", "train"},
    "results": {
        "augment", "compile", "environment", "evaluation", "files", "plan", "scores", "train",
        "views",
    },
    "fit": {
        "checkpoint", "config", "data", "environment", "evaluation", "files", "lock", "metrics",
        "plan", "program", "progress", "results", "signals", "train",
    },
    "seeds": {"config", "data", "files", "fit", "progress", "scores", "stats"},
    "compare": {"config", "files", "seeds", "stats"},
    "replay": {
        "augment", "checkpoint", "compile", "config", "data", "files", "plan", "slices", "streams",
        "train",
    },
    "report": {"calibration", "config", "files", "page", "recipes", "replay"},
    "seeds_report": {"files", "page", "report"},
    "duplicates": set(),
    "suspects": {"config", "evaluation", "optim", "progress", "streams", "train"},
}  # fmt: skip

# Only this module may import that package.
OWNERS = {"flax": "models", "orbax": "checkpoint", "tensorflow_datasets": "tfds_source"}


def imports(path):
    """(module, name) of every import in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module or "", alias.name) for alias in node.names)


def test_every_module_is_in_the_house():
    assert {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"} == set(ALLOWED)


@pytest.mark.parametrize("name", ALLOWED)
def test_imports_go_one_way(name):
    for module, imported in imports(PACKAGE / f"{name}.py"):
        first, _, rest = module.partition(".")
        if first == "fmnist_jax":
            found = rest or imported
            assert found in ALLOWED[name] or imported == "__version__", f"{name} imports {found}"
        if first in OWNERS:
            assert name == OWNERS[first], f"{name} imports {module}"


def public():
    """Every public function and class of the package, with the module it is in."""
    for name in ALLOWED:
        module = sys.modules.get(f"fmnist_jax.{name}") or __import__(
            f"fmnist_jax.{name}", fromlist=["_"]
        )
        for attribute, value in vars(module).items():
            here = getattr(value, "__module__", None) == module.__name__
            if here and not attribute.startswith("_") and callable(value):
                yield pytest.param(value, id=f"{name}.{attribute}")


@pytest.mark.parametrize("value", list(public()))
def test_public_things_are_described_and_named_alike(value):
    assert (value.__doc__ or "").strip()
    if inspect.isclass(value):
        return
    parameters = inspect.signature(value).parameters
    # One word for one thing.
    assert not set(parameters) & {"rng", "prng", "seed_key", "x_batch", "labels_batch"}
    # The key comes first, except after the state and batch that a step is about.
    if "key" in parameters and "state" not in parameters:
        assert next(iter(parameters)) == "key"


def test_the_public_names_are_re_exported_one_by_one():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    names = [
        alias for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
    ]
    assert all(alias.asname == alias.name for alias in names)
    assert all(hasattr(fm, alias.name) for alias in names)


def test_import_touches_no_flag_no_file_and_no_device(tmp_path):
    code = """
import os, sys
before = dict(os.environ)
import fmnist_jax
assert dict(os.environ) == before
from jax._src import xla_bridge
assert not xla_bridge.backends_are_initialized()
heavy = {"matplotlib", "sklearn", "tensorflow", "tensorflow_datasets", "keras"} & set(sys.modules)
assert not heavy, heavy
"""
    command = [sys.executable, "-B", "-c", code]
    result = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    assert not list(tmp_path.iterdir())
