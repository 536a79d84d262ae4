"""The comparison command."""

import json

import pytest

import fmnist_jax as fm
from tests.conftest import ROOT, load_module


@pytest.fixture(scope="module")
def compare_py():
    return load_module(ROOT / "experiments" / "compare.py")


def test_the_command_trains_recipes_and_compares(compare_py, tmp_path, capsys):
    small = "valid_2x2,epochs=1,batch_size=8,val_fraction=0.01"
    arguments = [
        small, f"{small},dropout=0.0", "--sample", "--train-examples", "40", "--seeds", "2",
        "--workdir", str(tmp_path),
    ]  # fmt: skip
    assert compare_py.main(arguments) == 0
    output = capsys.readouterr().out
    for expected in (
        "dropout: None in a, 0.0 in b",
        "no results",
        "b over a",
        "sign-flip",
        "McNemar",
    ):
        assert expected in output
    comparison = json.loads((tmp_path / "comparison.json").read_text())
    assert comparison["seeds"] == [0, 1]
    assert f"{100 * comparison['difference']['mean']:+.2f} points" in output

    # The folders that it left can be compared as well.
    folders = [str(tmp_path / name) for name in (small, f"{small},dropout=0.0")]
    assert compare_py.main([*folders, "--workdir", str(tmp_path / "again")]) == 0
    assert json.loads((tmp_path / "again" / "comparison.json").read_text()) == comparison

    # A recipe beside a folder is trained on the folder's seeds and as many images.
    sides = [folders[0], "valid_2x2,epochs=1,batch_size=4,val_fraction=0.01", "--sample"]
    assert compare_py.main([*sides, "--workdir", str(tmp_path / "third")]) == 0
    third = json.loads((tmp_path / "third" / "comparison.json").read_text())
    assert third["seeds"] == [0, 1]
    assert third["differs_in"] == ["recipe.batch_size: 8 in a, 4 in b"]


@pytest.mark.parametrize(
    ("side", "message"),
    [
        ("resnet", "'resnet' is neither a folder nor a recipe"),
        ("same_3x3,width=3", "'width=3' is no setting of a recipe"),
        ("same_3x3,epochs", "'epochs' is no setting of a recipe"),
        ("same_3x3,epochs=0", "epochs is 0"),
    ],
)
def test_the_command_refuses_what_is_no_recipe(side, message, compare_py, capsys, monkeypatch):
    monkeypatch.setattr(fm, "fit", None)  # before anything is trained
    for sides in ([side, "same_3x3"], ["same_3x3", side]):
        assert compare_py.main([*sides, "--sample"]) == 2
        assert message in capsys.readouterr().err.replace("\n", " ")


def test_none_is_a_word_or_nothing(compare_py):
    recipe = compare_py.parse_recipe("deep_augmented,augmentation=none,image_size=none")
    assert (recipe.augmentation, recipe.image_size) == ("none", None)
