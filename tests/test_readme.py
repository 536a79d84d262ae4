"""What the README shows, works."""

import ast
import re

import pytest

import fmnist_jax as fm
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()


@pytest.mark.filterwarnings("ignore:.*rank promotion.*")
def test_the_python_of_the_readme_runs(tmp_path, monkeypatch, capsys, sample):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fm, "load_fashion_mnist", lambda: sample)
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) == 4
    namespace: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    printed = capsys.readouterr().out
    assert printed.count("'accuracy'") == 5
    assert namespace["logits"].shape == (1000, 10)  # type: ignore[attr-defined]
    statements = [
        node for node in ast.walk(ast.parse(blocks[0].split("print(fm.evaluate")[0]))
        if isinstance(node, ast.Assign | ast.For | ast.Expr)
    ]  # fmt: skip
    assert len(statements) == 10


def test_the_flags_of_the_readme_exist(run_py):
    options = {option for action in run_py._parser()._actions for option in action.option_strings}
    assert set(re.findall(r"(?<= )--[a-z-]+", README)) <= options
