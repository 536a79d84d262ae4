"""Comparing recipes: the pairs, the figures, and the command."""

import json
import math

import numpy as np
import pytest
import scipy.stats
from statsmodels.stats.power import TTestPower

import fmnist_jax as fm
from fmnist_jax.runs import files
from tests.conftest import ROOT, load_module


def write_run(folder, seed, correct, recipe=None, indices=None):
    """A complete run's files, with these test images recognized."""
    folder.mkdir(parents=True)
    files.write_json(folder / files.CONFIG, {"seed": seed, "recipe": recipe or {}})
    correct = np.asarray(correct)
    labels = np.zeros(len(correct), np.int32)
    report = {
        "seed": seed, "arch": "same_3x3", "recipe": recipe or {},
        "test_accuracy": float(correct.mean()), "sample": False,
    }  # fmt: skip
    files.write_json(folder / files.REPORT, report)
    files.write_arrays(
        folder / files.PREDICTIONS,
        logits=np.stack([correct, 1 - correct], axis=1).astype(np.float32),
        labels=labels,
        indices=np.arange(len(correct)) if indices is None else indices,
    )
    return folder


@pytest.fixture
def sides(tmp_path):
    """Four seeds of each; the second is right more often."""
    rng = np.random.default_rng(0)
    draws = {side: rng.random((4, 200)) < share for side, share in (("a", 0.8), ("b", 0.9))}
    folders = {
        side: [
            write_run(tmp_path / side / str(seed), seed, row, {"dropout": side})
            for seed, row in enumerate(rows.astype(int))
        ]
        for side, rows in draws.items()
    }
    return draws, folders


def test_the_figures_are_those_of_scipy(sides):
    draws, folders = sides
    result = fm.compare(folders["a"], folders["b"])
    gains = draws["b"].mean(axis=1) - draws["a"].mean(axis=1)
    reference = scipy.stats.ttest_rel(draws["b"].mean(axis=1), draws["a"].mean(axis=1))
    np.testing.assert_allclose(result["difference"]["mean"], gains.mean())
    interval = reference.confidence_interval(0.95)
    np.testing.assert_allclose(
        [result["difference"]["low"], result["difference"]["high"]], list(interval)
    )
    permutations = scipy.stats.permutation_test(
        (gains,), np.mean, permutation_type="samples", n_resamples=np.inf
    )
    np.testing.assert_allclose(result["sign_flip_p"], permutations.pvalue)
    only_a = int((draws["a"] & ~draws["b"]).sum())
    only_b = int((draws["b"] & ~draws["a"]).sum())
    assert result["mcnemar"]["only_a_right"] == only_a
    assert result["mcnemar"]["only_b_right"] == only_b
    assert result["differs_in"] == ["recipe.dropout: a in a, b in b"]
    assert result["seeds"] == [0, 1, 2, 3]
    # statsmodels counts them with a power of 80%.
    needed = TTestPower().solve_power(gains.mean() / gains.std(ddof=1), alpha=0.05, power=0.8)
    assert result["seeds_needed"] == math.ceil(needed)
    found = TTestPower().solve_power(nobs=4, alpha=0.05, power=0.8) * gains.std(ddof=1)
    np.testing.assert_allclose(result["minimum_detectable_effect"], found, rtol=1e-4)
    assert result["sign_flip_smallest"] == 2 / 2**4
    json.dumps(result)


def test_runs_are_paired_by_seed(sides, tmp_path):
    draws, folders = sides
    shuffled = [folders["b"][index] for index in (2, 0, 3)]
    result = fm.compare(folders["a"], shuffled)
    assert result["seeds"] == [0, 2, 3]
    rows = [0, 2, 3]
    expected = (draws["b"][rows].mean(axis=1) - draws["a"][rows].mean(axis=1)).tolist()
    np.testing.assert_allclose(result["difference"]["values"], expected)


def test_one_seed_has_a_test_over_images_alone(sides):
    _, folders = sides
    result = fm.compare(folders["a"][:1], folders["b"][:1])
    assert result["sign_flip_p"] is None
    assert result["minimum_detectable_effect"] is None
    assert result["difference"]["low"] is None
    discordant = result["mcnemar"]["only_a_right"], result["mcnemar"]["only_b_right"]
    reference = scipy.stats.binomtest(discordant[0], sum(discordant))
    np.testing.assert_allclose(result["mcnemar"]["p"], reference.pvalue)


def test_a_recipe_is_as_good_as_itself(sides):
    _, folders = sides
    result = fm.compare(folders["a"], folders["a"])
    assert result["difference"]["mean"] == 0
    assert (result["sign_flip_p"], result["mcnemar"]["p"]) == (1, 1)
    assert (result["minimum_detectable_effect"], result["seeds_needed"]) == (None, None)


def test_what_cannot_be_compared_is_refused(sides, tmp_path):
    _, folders = sides
    other = write_run(tmp_path / "c", 9, [1] * 200, {"dropout": "b"})
    with pytest.raises(fm.ConfigError, match="runs are compared by seed"):
        fm.compare(folders["a"], [other])
    other = write_run(tmp_path / "d", 0, [1] * 200, indices=np.arange(200) + 1)
    with pytest.raises(fm.ConfigError, match="tested on different images"):
        fm.compare(folders["a"], [other])
    with pytest.raises(fm.ConfigError, match="both have seed 0"):
        fm.compare(folders["a"], [folders["b"][0], folders["b"][0]])
    with pytest.raises(fm.ConfigError, match="have different settings"):
        fm.compare(folders["a"], [folders["b"][0], folders["a"][1]])
    with pytest.raises(fm.DamagedFileError, match="not complete"):
        fm.compare(folders["a"], [tmp_path])


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
