"""Many seeds: the runs are those of `fit`, the figures those of their files."""

import dataclasses
import json
import shutil

import chex
import numpy as np
import pytest
import scipy.stats

import fmnist_jax as fm
from fmnist_jax.runs import files
from fmnist_jax.runs.checkpoint import Checkpoints
from fmnist_jax.studies import seeds
from fmnist_jax.train.loop import train_steps

RECIPE = dataclasses.replace(
    fm.RECIPES["small_dropout"], epochs=2, batch_size=16, augmentation="keras"
)


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, tiny):
    """Three seeds, 5 to 7, and the folder that they are in."""
    place = tmp_path_factory.mktemp("seeds") / "many"
    run = fm.Run(recipe=RECIPE, workdir=place, seed=5)
    fm.fit_seeds(run, tiny, 3, progress=fm.NullProgress())
    return place


def test_a_seed_alone_has_the_bits_of_that_seed_among_many(workdir, tiny, tmp_path):
    alone = fm.fit(fm.Run(recipe=RECIPE, workdir=tmp_path, seed=6), tiny, progress=fm.NullProgress())
    among = fm.load_checkpoint(workdir / "seed-6")
    own = fm.load_checkpoint(tmp_path)
    chex.assert_trees_all_equal(among.arrays, own.arrays)
    report = files.read_json(workdir / "seed-6" / files.REPORT)
    assert report["params_sha256"] == alone.report["params_sha256"]
    ours, theirs = (
        files.read_arrays(place / files.PREDICTIONS) for place in (tmp_path, workdir / "seed-6")
    )
    chex.assert_trees_all_equal(ours, theirs)


def test_all_seeds_are_one_program(tiny, tmp_path):
    # A shape of its own, so that no other test has compiled it.
    recipe = dataclasses.replace(RECIPE, batch_size=13)
    run = fm.Run(recipe=recipe, workdir=tmp_path)
    before = train_steps._outer._cache_size()
    fm.fit_seeds(run, tiny, 3, progress=fm.NullProgress())
    assert train_steps._outer._cache_size() == before + 1


def test_the_summary_is_that_of_the_files(workdir):
    summary = json.loads((workdir / "seeds.json").read_text())
    assert summary["seeds"] == [5, 6, 7]
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


def test_the_ensemble_is_the_mean_probability(workdir):
    predictions = [
        files.read_arrays(workdir / f"seed-{seed}" / files.PREDICTIONS) for seed in (5, 6, 7)
    ]
    shares = [np.exp(one["logits"].astype(np.float64)) for one in predictions]
    mean = np.mean([share / share.sum(axis=1, keepdims=True) for share in shares], axis=0)
    labels = predictions[0]["labels"]
    ensemble = files.read_json(workdir / files.SEEDS)["ensemble"]
    assert ensemble["accuracy"] == np.mean(mean.argmax(axis=1) == labels)
    np.testing.assert_allclose(
        ensemble["loss"], -np.log(mean[np.arange(len(labels)), labels]).mean(), rtol=1e-6
    )


def test_more_seeds_keep_those_that_are_there(workdir, tiny, tmp_path):
    more = shutil.copytree(workdir, tmp_path / "more")
    times = {path: path.stat().st_mtime_ns for path in more.glob("seed-*/report.json")}
    result = fm.fit_seeds(
        fm.Run(recipe=RECIPE, workdir=more, seed=5), tiny, 4, progress=fm.NullProgress()
    )
    assert result.report["seeds"] == [5, 6, 7, 8]
    before = files.read_json(workdir / files.SEEDS)["params_sha256"]
    assert result.report["params_sha256"][:3] == before
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_an_unfinished_seed_is_named(workdir, tmp_path):
    with pytest.raises(fm.DamagedFileError, match="the run is not complete"):
        seeds.summarize([workdir / "seed-5", tmp_path])


@pytest.mark.parametrize("count", [0, -1, 1.5, True])
def test_a_count_that_is_none_is_refused(count, tiny, tmp_path):
    run = fm.Run(recipe=RECIPE, workdir=tmp_path)
    with pytest.raises(fm.ConfigError, match="count is"):
        fm.fit_seeds(run, tiny, count)


def test_progress_is_over_all_seeds(tiny, tmp_path):
    starts, steps = [], []

    class Recorder(fm.NullProgress):
        def start(self, *, step, total_steps):
            starts.append((step, total_steps))

        def update(self, *, step, epoch, images_per_second, loss):
            steps.append(step)

    run = fm.Run(recipe=dataclasses.replace(RECIPE, epochs=1), workdir=tmp_path)
    fm.fit_seeds(run, tiny, 2, progress=Recorder())
    # 54 images in batches of 16 are four updates.
    assert starts == [(0, 8), (4, 8)]
    assert steps == sorted(steps)
    assert steps[-1] == 8


def test_a_run_that_is_stopped_between_seeds_goes_on(workdir, tiny, tmp_path):
    class StoppedError(Exception):
        pass

    class Stopper(fm.NullProgress):
        def say(self, text):
            if text.startswith("Seed 7"):
                raise StoppedError

    run = fm.Run(recipe=RECIPE, workdir=tmp_path, seed=5)
    with pytest.raises(StoppedError):
        fm.fit_seeds(run, tiny, 3, progress=Stopper())
    assert Checkpoints(tmp_path / "seed-6" / files.CHECKPOINTS).steps()
    result = fm.fit_seeds(run, tiny, 3, progress=fm.NullProgress())
    expected = files.read_json(workdir / files.SEEDS)["params_sha256"]
    assert result.report["params_sha256"] == expected
