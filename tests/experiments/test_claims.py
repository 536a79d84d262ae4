"""The table of claims."""

import dataclasses
import json

import pytest

import fmnist_jax as fm
from tests.conftest import ROOT, load_module


@pytest.fixture(scope="module")
def claims_py():
    return load_module(ROOT / "experiments" / "claims.py")


@pytest.mark.parametrize(
    ("claim", "low", "high", "expected"),
    [
        (0.9, 0.8, 0.95, "the claim is within"),
        (0.9, 0.91, 0.95, "the claim is below"),
        (0.9, 0.8, 0.89, "the claim is above"),
        (None, 0.8, 0.89, "no claim"),
        (0.9, float("nan"), float("nan"), "one run has no interval"),
    ],
)
def test_verdicts(claim, low, high, expected, claims_py):
    recipe = dataclasses.replace(fm.RECIPES["same_3x3"], claimed_test_accuracy=claim)
    assert claims_py.verdict(recipe, low, high) == expected
    other = dataclasses.replace(recipe, not_comparable="other classes")
    assert claims_py.verdict(other, low, high) == "not comparable: other classes"


def test_claims_are_those_of_the_texts():
    for recipe in fm.RECIPES.values():
        claimed = recipe.claimed_test_accuracy
        assert (claimed is None) == ("test" not in recipe.claim)
        if claimed is not None:
            assert f"{100 * claimed:g}%" in recipe.claim


def test_the_command_writes_the_table(claims_py, tmp_path, capsys, monkeypatch):
    quick = {
        name: dataclasses.replace(recipe, epochs=1, batch_size=8, val_fraction=0.01)
        for name, recipe in fm.RECIPES.items()
    }
    monkeypatch.setattr(claims_py.fm, "RECIPES", quick)
    arguments = ["--arch", "valid_2x2", "--sample", "--train-examples", "16", "--seeds", "2"]
    assert claims_py.main([*arguments, "--workdir", str(tmp_path)]) == 0
    assert "verdict" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "claims.json").read_text())
    assert row["verdict"] == "no claim"
    assert row["test_accuracy"]["n"] == 2
    text = (tmp_path / "claims.md").read_text()
    assert text.startswith("| network | claimed |")
    assert "no results" in text
