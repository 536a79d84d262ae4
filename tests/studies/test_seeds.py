"""Several seeds: their runs equal those of `fit`, the summary equals their files."""

import dataclasses
import io
import json
import re
import shutil

import chex
import numpy as np
import pytest
import scipy.stats
from rich.console import Console

import fmnist_jax as fm
from fmnist_jax.errors import ConfigError, DamagedFileError
from fmnist_jax.runs import console, files
from fmnist_jax.runs.checkpoint import Checkpoints
from fmnist_jax.studies import seeds
from fmnist_jax.train.loop import train_steps
from tests.small import SMALL

RECIPE = dataclasses.replace(
    fm.RECIPES["small_dropout"], arch=SMALL, epochs=2, batch_size=16, augmentation="none"
)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, tiny):
    """Finished runs of the seeds 5 to 7."""
    place = tmp_path_factory.mktemp("seeds") / "several"
    run = fm.Run(recipe=RECIPE, workdir=place, seed=5, tta=True)
    fm.fit_seeds(run, tiny, 3, hooks=())
    return place


def test_a_seed_is_bitwise_identical_to_its_own_run(workdir, tiny, tmp_path):
    run = fm.Run(recipe=RECIPE, workdir=tmp_path, seed=6, tta=True)
    alone = fm.fit(run, tiny, hooks=())
    chex.assert_trees_all_equal(
        fm.load_checkpoint(workdir / "seed-6").arrays, fm.load_checkpoint(tmp_path).arrays
    )
    report = files.read_json(workdir / "seed-6" / files.REPORT)
    assert report["params_sha256"] == alone.report["params_sha256"]
    ours, theirs = (
        files.read_arrays(place / files.PREDICTIONS) for place in (tmp_path, workdir / "seed-6")
    )
    chex.assert_trees_all_equal(ours, theirs)


def test_all_seeds_share_one_program(tiny, tmp_path):
    # A batch size of its own, so that no other test has compiled it.
    run = fm.Run(recipe=dataclasses.replace(RECIPE, batch_size=13, epochs=1), workdir=tmp_path)
    before = train_steps._outer(is_bfloat16=False)._cache_size()
    fm.fit_seeds(run, tiny, 3, hooks=())
    assert train_steps._outer(is_bfloat16=False)._cache_size() == before + 1


def test_the_summary_equals_the_files(workdir):
    summary = json.loads((workdir / files.SEEDS).read_text())
    assert summary["seeds"] == [5, 6, 7]
    assert summary["runs"] == ["seed-5", "seed-6", "seed-7"]
    reports = [files.read_json(workdir / f"seed-{seed}" / files.REPORT) for seed in (5, 6, 7)]
    for name in seeds.FIGURES:
        values = [report[name] for report in reports]
        figures = summary[name]
        assert figures["values"] == values
        np.testing.assert_allclose(figures["mean"], np.mean(values))
        np.testing.assert_allclose(figures["std"], np.std(values, ddof=1), atol=1e-12)
        half = scipy.stats.t.ppf(0.975, 2) * scipy.stats.sem(values)
        ends = np.mean(values) - half, np.mean(values) + half
        np.testing.assert_allclose([figures["low"], figures["high"]], ends, atol=1e-12)
    assert len(set(summary["params_sha256"])) == 3


def test_runs_of_earlier_versions_are_summarized(workdir, tmp_path):
    old = shutil.copytree(workdir / "seed-5", tmp_path / "seed-5")
    report = files.read_json(old / files.REPORT)
    assert report.pop("test_macro_f1") is not None
    files.write_json(old / files.REPORT, report)
    summary = seeds.summarize([old, workdir / "seed-6"])
    assert summary["test_macro_f1"] is None
    assert summary["test_auc"]["n"] == summary["test_accuracy"]["n"] == 2


def test_the_ensemble_averages_probabilities(workdir):
    predictions = [
        files.read_arrays(workdir / f"seed-{seed}" / files.PREDICTIONS) for seed in (5, 6, 7)
    ]
    exponentials = [np.exp(one["logits"].astype(np.float64)) for one in predictions]
    mean = np.mean([row / row.sum(axis=1, keepdims=True) for row in exponentials], axis=0)
    labels = predictions[0]["labels"]
    ensemble = files.read_json(workdir / files.SEEDS)["ensemble"]
    assert ensemble["accuracy"] == np.mean(mean.argmax(axis=1) == labels)
    np.testing.assert_allclose(
        ensemble["loss"], -np.log(mean[np.arange(len(labels)), labels]).mean(), rtol=1e-6
    )


def test_added_seeds_keep_the_finished_ones(workdir, tiny, tmp_path):
    more = shutil.copytree(workdir, tmp_path / "more")
    times = {path: path.stat().st_mtime_ns for path in more.glob("seed-*/report.json")}
    run = fm.Run(recipe=RECIPE, workdir=more, seed=5, tta=True)
    result = fm.fit_seeds(run, tiny, 4, hooks=())
    assert result.report["seeds"] == [5, 6, 7, 8]
    before = files.read_json(workdir / files.SEEDS)["params_sha256"]
    assert result.report["params_sha256"][:3] == before
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_an_unfinished_seed_is_named(workdir, tmp_path):
    with pytest.raises(
        DamagedFileError, match=rf"{tmp_path}/report.json is missing .*; finish the run"
    ):
        seeds.summarize([workdir / "seed-5", tmp_path])


@pytest.mark.parametrize("num_seeds", [0, -1, 1.5, True])
def test_invalid_number_of_seeds_is_named(num_seeds, tiny, tmp_path):
    run = fm.Run(recipe=RECIPE, workdir=tmp_path)
    with pytest.raises(ConfigError, match=f"num_seeds is {num_seeds}"):
        fm.fit_seeds(run, tiny, num_seeds)


def test_progress_counts_the_steps_of_all_seeds(tiny, tmp_path, monkeypatch):
    splits = set()

    class Recorder(fm.Hook):
        def evaluate(self, *, split, num_done, num_images):
            splits.add(split)

    monkeypatch.setattr(console, "_LINE_SECONDS", 0.0)
    output = Console(file=io.StringIO(), width=120)
    run = fm.Run(recipe=dataclasses.replace(RECIPE, epochs=1), workdir=tmp_path)
    result = fm.fit_seeds(run, tiny, 2, hooks=[fm.ConsoleProgress(output), Recorder()])
    # 54 images in batches of 16 are four steps.
    assert isinstance(output.file, io.StringIO)
    found = re.findall(r"step (\d)/(\d):", output.file.getvalue())
    steps = [int(step) for step, _ in found]
    assert {total for _, total in found} == {"8"}
    assert steps == sorted(steps)
    assert steps[-1] == 8
    assert splits == {"val", "test"}
    assert result.report["tta_accuracy"] is None


def test_seeds_stopped_in_between_resume(workdir, tiny, tmp_path):
    class StoppedError(Exception):
        pass

    class Stopper(fm.Hook):
        def message(self, text):
            if "seed 7" in text:
                raise StoppedError

    run = fm.Run(recipe=RECIPE, workdir=tmp_path, seed=5, tta=True)
    with pytest.raises(StoppedError):
        fm.fit_seeds(run, tiny, 3, hooks=[Stopper()])
    assert Checkpoints(tmp_path / "seed-6" / files.CHECKPOINTS).steps()
    result = fm.fit_seeds(run, tiny, 3, hooks=())
    expected = files.read_json(workdir / files.SEEDS)["params_sha256"]
    assert result.report["params_sha256"] == expected
