"""The house rules that a machine can check."""

import ast
import importlib
import inspect
import re
import subprocess
import sys

import pytest

import fmnist_jax as fm
from tests.conftest import ROOT

PACKAGE = ROOT / "fmnist_jax"

# Only these modules may import that package.
OWNERS = {
    "flax": {
        "nn/adapters",
        "nn/dropout",
        "nn/models",
        "nn/resnet",
        "nn/sprint",
        "runs/classifier",
        "parts/contract",
    },
    "orbax": {"runs/checkpoint"},
    "tensorflow_datasets": {"data/tfds"},
    "onnx": {"export/onnx_graph"},
}

MODULES = sorted(
    path.relative_to(PACKAGE).with_suffix("").as_posix()
    for path in PACKAGE.rglob("*.py")
    if path.stem != "__init__"
)


def imports(path):
    """(module, name) of every import in a file."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module or "", alias.name) for alias in node.names)


@pytest.mark.parametrize("name", MODULES)
def test_each_dependency_has_one_owner(name):
    for module, _ in imports(PACKAGE / f"{name}.py"):
        first = module.partition(".")[0]
        if first in OWNERS:
            assert name in OWNERS[first], f"{name} imports {module}"


def test_no_module_is_shadowed_by_a_name_of_its_package():
    for name in MODULES:
        module = f"fmnist_jax.{name.replace('/', '.')}"
        importlib.import_module(module)
        parent, _, attribute = module.rpartition(".")
        assert getattr(sys.modules[parent], attribute) is sys.modules[module]


def public():
    """Every public function and class of the package, with the module it is in."""
    for name in MODULES:
        module = importlib.import_module(f"fmnist_jax.{name.replace('/', '.')}")
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
    tree = ast.parse((PACKAGE / "__init__.pyi").read_text())
    names = [
        alias for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
    ]
    assert all(alias.asname == alias.name for alias in names)
    assert {alias.name for alias in names} == set(dir(fm))
    assert all(hasattr(fm, alias.name) for alias in names)


def test_import_touches_no_flag_no_file_and_no_device(tmp_path):
    code = """
import os, sys
before = dict(os.environ)
import fmnist_jax
assert "jax" not in sys.modules
for name in fmnist_jax.__all__:
    getattr(fmnist_jax, name)
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


def test_the_stable_names_are_the_public_ones():
    table = (ROOT / "docs" / "stability.md").read_text().partition("## Not stable")[0]
    rows = [line for line in table.splitlines() if line.lstrip().startswith("| ")]
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row)}
    assert named == set(dir(fm))
