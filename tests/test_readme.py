"""The README's Python and flags work."""

import ast
import re

import pytest

import fmnist_jax as fm
from fmnist_jax.commands import predict as predict_command
from fmnist_jax.commands import run as run_command
from fmnist_jax.commands import sweep as sweep_command
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()


@pytest.mark.filterwarnings("ignore:.*rank promotion.*")
def test_python_runs(tmp_path, monkeypatch, capsys, tiny):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fm, "load_fashion_mnist", lambda: tiny)
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) == 1
    exec(compile(blocks[0], "README.md", "exec"), {})
    assert capsys.readouterr().out.count("'accuracy'") == 4
    statements = [
        node for node in ast.walk(ast.parse(blocks[0].split("print(fm.evaluate")[0]))
        if isinstance(node, ast.Assign | ast.For | ast.Expr)
    ]  # fmt: skip
    assert len(statements) <= 10


def test_results_name_every_recipe():
    table = README.split("<!-- results -->")[1].split("<!-- end results -->")[0]
    assert re.findall(r"^\| `(\w+)`", table, flags=re.MULTILINE) == list(fm.RECIPES)
    assert len(fm.RECIPES) == 10
    assert "one of ten recipes" in README


def test_readme_is_short():
    assert len(README.splitlines()) <= 120


def test_flags_exist():
    modules = [predict_command, run_command, sweep_command]
    options = {
        option
        for module in modules
        for action in module.create_parser()._actions
        for option in action.option_strings
    }
    assert set(re.findall(r"(?<= )--[a-z-]+", README)) <= options
