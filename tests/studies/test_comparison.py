"""Comparisons: runs are paired by seed, and the results match scipy and statsmodels."""

import json
import math

import numpy as np
import pytest
import scipy.stats
from statsmodels.stats.power import TTestPower

import fmnist_jax as fm
from fmnist_jax.errors import ConfigError, DamagedFileError
from fmnist_jax.runs import files


def write_run(folder, seed, correct, recipe=None, indices=None, **more):
    """The files of a finished run that got these test images right."""
    folder.mkdir(parents=True)
    files.write_json(folder / files.CONFIG, {"seed": seed, "recipe": recipe or {}})
    correct = np.asarray(correct)
    labels = np.zeros(len(correct), np.int32)
    report = {
        "seed": seed, "arch": "same_3x3", "recipe": recipe or {},
        "test_accuracy": float(correct.mean()), "sample": False,
    } | more  # fmt: skip
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
    """Four seeds of each side; b has the higher accuracy."""
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


def test_results_match_scipy_and_statsmodels(sides):
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
    needed = TTestPower().solve_power(gains.mean() / gains.std(ddof=1), alpha=0.05, power=0.8)
    assert result["seeds_needed"] == math.ceil(needed)
    found = TTestPower().solve_power(nobs=4, alpha=0.05, power=0.8) * gains.std(ddof=1)
    np.testing.assert_allclose(result["minimum_detectable_effect"], found, rtol=1e-4)
    assert result["sign_flip_smallest"] == 2 / 2**4
    json.dumps(result)


def test_scores_over_classes_are_paired_by_seed(tmp_path):
    values = {"a": [0.5, 0.6, 0.8], "b": [0.7, 0.65, 0.9]}
    folders = {
        side: [
            write_run(tmp_path / side / str(seed), seed, [1, 0], test_macro_f1=f1, test_auc=auc)
            for seed, f1, auc in zip(range(3), row, [0.5, None, 0.5], strict=True)
        ]
        for side, row in values.items()
    }
    found = fm.compare(folders["a"], folders["b"][::-1])["macro_differences"]
    # One run has no area, and a report of an earlier version no balanced accuracy.
    assert found["test_balanced_accuracy"] is found["test_auc"] is None
    one = found["test_macro_f1"]
    np.testing.assert_allclose(one["values"], [0.2, 0.05, 0.1])
    interval = scipy.stats.ttest_rel(values["b"], values["a"]).confidence_interval(0.95)
    np.testing.assert_allclose([one["low"], one["high"]], list(interval))


def test_runs_are_paired_by_seed(sides, tmp_path):
    draws, folders = sides
    shuffled = [folders["b"][index] for index in (2, 0, 3)]
    result = fm.compare(folders["a"], shuffled)
    assert result["seeds"] == [0, 2, 3]
    rows = [0, 2, 3]
    expected = (draws["b"][rows].mean(axis=1) - draws["a"][rows].mean(axis=1)).tolist()
    np.testing.assert_allclose(result["difference"]["values"], expected)


def test_one_seed_has_only_the_test_over_images(sides):
    _, folders = sides
    result = fm.compare(folders["a"][:1], folders["b"][:1])
    assert result["sign_flip_p"] is None
    assert result["minimum_detectable_effect"] is None
    assert result["difference"]["low"] is None
    discordant = result["mcnemar"]["only_a_right"], result["mcnemar"]["only_b_right"]
    reference = scipy.stats.binomtest(discordant[0], sum(discordant))
    np.testing.assert_allclose(result["mcnemar"]["p"], reference.pvalue)


def test_a_recipe_does_not_differ_from_itself(sides):
    _, folders = sides
    result = fm.compare(folders["a"], folders["a"])
    assert result["difference"]["mean"] == 0
    assert (result["sign_flip_p"], result["mcnemar"]["p"]) == (1, 1)
    assert (result["minimum_detectable_effect"], result["seeds_needed"]) == (None, None)


def test_folders_may_be_texts(sides):
    _, folders = sides
    texts = [list(map(str, side)) for side in folders.values()]
    assert fm.compare(*texts) == fm.compare(folders["a"], folders["b"])
    with pytest.raises(ConfigError, match="one folder; pass a list"):
        fm.compare(texts[0][0], texts[1])


def test_invalid_comparisons_are_named(sides, tmp_path):
    _, folders = sides
    other = write_run(tmp_path / "c", 9, [1] * 200, {"dropout": "b"})
    with pytest.raises(ConfigError, match="runs are paired by seed"):
        fm.compare(folders["a"], [other])
    other = write_run(tmp_path / "d", 0, [1] * 200, indices=np.arange(200) + 1)
    with pytest.raises(ConfigError, match="tested on different images"):
        fm.compare(folders["a"], [other])
    with pytest.raises(ConfigError, match="both have seed 0"):
        fm.compare(folders["a"], [folders["b"][0], folders["b"][0]])
    with pytest.raises(ConfigError, match="have different settings"):
        fm.compare(folders["a"], [folders["b"][0], folders["a"][1]])
    with pytest.raises(DamagedFileError, match="finish the run first"):
        fm.compare(folders["a"], [tmp_path])
