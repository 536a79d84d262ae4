"""A run: its files, going on, stopping, and what it refuses."""

import dataclasses
import importlib
import json
import os
import shutil
import signal

import chex
import jax
import numpy as np
import pytest

import fmnist_jax as fm
from fmnist_jax import files

# `fm.fit` is the function.
fit_module = importlib.import_module("fmnist_jax.fit")

RECIPE = dataclasses.replace(
    fm.RECIPES["small_dropout"], epochs=3, batch_size=16, val_fraction=0.2, augmentation="geometric"
)


def make_run(workdir, seed=0, train_examples=None, **changes):
    recipe = dataclasses.replace(RECIPE, **changes)
    return fm.Run(recipe=recipe, workdir=workdir, seed=seed, train_examples=train_examples)


@pytest.fixture(scope="module")
def straight(tmp_path_factory, tiny):
    """A run from start to end, and its folder."""
    workdir = tmp_path_factory.mktemp("straight")
    return fm.fit(make_run(workdir), tiny, progress=fm.Silence()), workdir


def figures(line):
    """A line of metrics.jsonl without what a clock wrote."""
    return {
        key: value for key, value in line.items() if key not in ("seconds", "images_per_second")
    }


class Stop(fm.Silence):
    """Sends a signal when a step is reached."""

    def __init__(self, step, number=signal.SIGINT):
        self.step, self.number = step, number

    def update(self, *, step, epoch, images_per_second, loss):
        if step == self.step:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("steps", [[1], [4], [3, 4, 8], [5, 6, 7, 9]])
def test_an_interrupted_run_goes_on_to_the_same_bits(steps, straight, tmp_path, tiny, monkeypatch):
    # One update a call, so that the signal comes at the very step.
    monkeypatch.setattr(fit_module, "_CALL_SECONDS", 0.0)
    for step in steps:
        with pytest.raises(fm.Interrupted, match=f"after step {step} of 9, saved") as caught:
            fm.fit(make_run(tmp_path), tiny, progress=Stop(step))
        assert caught.value.signal_number == signal.SIGINT
    result = fm.fit(make_run(tmp_path), tiny, progress=fm.Silence())
    expected, _ = straight
    chex.assert_trees_all_equal(result.state, expected.state)
    assert [figures(line) for line in result.history] == [
        figures(line) for line in expected.history
    ]
    assert result.report["params_sha256"] == expected.report["params_sha256"]
    entries = json.loads((tmp_path / files.ENVIRONMENT).read_text())
    assert len(entries) == len(steps) + 1


def test_sigterm_stops_likewise_and_the_handlers_come_back(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(fit_module, "_CALL_SECONDS", 0.0)
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(fm.Interrupted) as caught:
        fm.fit(make_run(tmp_path), tiny, progress=Stop(2, signal.SIGTERM))
    assert caught.value.signal_number == signal.SIGTERM
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_complete_run_returns_what_it_has(straight, tiny):
    expected, workdir = straight
    before = {path: path.read_bytes() for path in workdir.iterdir() if path.is_file()}
    again = fm.fit(make_run(workdir), tiny, progress=fm.Silence())
    chex.assert_trees_all_equal(again.state, expected.state)
    assert again.report == expected.report
    assert again.history == expected.history
    assert {path: path.read_bytes() for path in workdir.iterdir() if path.is_file()} == before


def test_a_complete_run_without_checkpoints_keeps_its_results(straight, tmp_path, tiny):
    _, workdir = straight
    moved = shutil.copytree(workdir, tmp_path / "run", ignore=lambda *_: ["checkpoints"])
    before = {path: path.read_bytes() for path in moved.iterdir() if path.is_file()}
    with pytest.raises(fm.CheckpointError, match="is complete, but it has no checkpoint"):
        fm.fit(make_run(moved), tiny, progress=fm.Silence())
    assert {path: path.read_bytes() for path in moved.iterdir() if path.is_file()} == before


def test_the_files(straight, tiny):
    result, workdir = straight
    names = {path.name for path in workdir.iterdir()}
    assert names == {
        "config.json", "environment.json", "metrics.jsonl", "predictions.npz", "examples.npz",
        "report.json", "checkpoints",
    }  # fmt: skip
    lines = files.read_lines(workdir / files.METRICS)
    assert [(line["epoch"], line["split"], line["step"]) for line in lines] == [
        (1, "train", 3), (1, "val", 3), (2, "train", 6), (2, "val", 6), (3, "train", 9),
        (3, "val", 9),
    ]  # fmt: skip
    report = json.loads((workdir / files.REPORT).read_text())
    assert report == result.report
    assert set(report) >= {
        "arch", "recipe", "seed", "epochs", "steps", "params", "train_accuracy", "val_accuracy",
        "test_accuracy", "test_loss", "classes", "confusion_matrix", "compile_seconds",
        "train_seconds", "images_per_second", "data", "params_sha256", "versions", "device",
    }  # fmt: skip
    assert report["steps"] == 9
    assert (report["data"]["train"], report["data"]["val"], report["data"]["test"]) == (48, 12, 20)
    assert report["train_accuracy"] == lines[-2]["accuracy"]
    assert report["val_accuracy"] == lines[-1]["accuracy"]
    with np.load(workdir / files.PREDICTIONS) as predictions:
        logits = predictions["logits"]
        np.testing.assert_array_equal(predictions["labels"], tiny.test_labels)
        np.testing.assert_array_equal(predictions["indices"], np.arange(20))
    assert report["test_accuracy"] == np.mean(logits.argmax(axis=1) == tiny.test_labels)
    expected = fm.predict(result.state.params, tiny.test_images, model=result.model)
    chex.assert_trees_all_equal(logits, np.asarray(expected))


def test_the_augmented_examples_are_those_that_were_trained_on(straight, tiny):
    _, workdir = straight
    with np.load(workdir / files.EXAMPLES) as examples:
        originals, augmented = examples["originals"], examples["augmented"]
    assert augmented.shape == (6, 5, 28, 28)
    streams = fm.create_streams(0)
    train_examples, _ = fm.stratified_split(streams.split, tiny.train_labels, 0.2)
    index = int(train_examples[2])
    np.testing.assert_array_equal(originals[2], tiny.train_images[index])
    key = jax.random.fold_in(jax.random.fold_in(streams.augment, 4), index)
    image = fm.AUGMENTATIONS["geometric"](key[None], tiny.train_images[index][None])
    np.testing.assert_allclose(augmented[2, 4], image[0, ..., 0], atol=1e-6)


def test_seeds_differ_and_repeat(straight, tmp_path, tiny):
    expected, _ = straight
    again = fm.fit(make_run(tmp_path / "a"), tiny, progress=fm.Silence())
    other = fm.fit(make_run(tmp_path / "b", seed=1), tiny, progress=fm.Silence())
    assert again.report["params_sha256"] == expected.report["params_sha256"]
    assert other.report["params_sha256"] != expected.report["params_sha256"]


def test_without_validation(tmp_path, tiny):
    result = fm.fit(make_run(tmp_path, epochs=1, val_fraction=0.0), tiny, progress=fm.Silence())
    assert result.report["val_accuracy"] is None
    assert [line["split"] for line in result.history] == ["train"]


def test_the_sample_is_marked_in_every_file(tmp_path, sample):
    run = make_run(tmp_path, epochs=1, train_examples=32)
    fm.fit(run, sample, progress=fm.Silence())
    assert json.loads((tmp_path / files.CONFIG).read_text())["sample"]
    assert json.loads((tmp_path / files.REPORT).read_text())["sample"]
    assert all(entry["sample"] for entry in json.loads((tmp_path / files.ENVIRONMENT).read_text()))
    assert all(line["sample"] for line in files.read_lines(tmp_path / files.METRICS))
    for name in (files.PREDICTIONS, files.EXAMPLES):
        with np.load(tmp_path / name) as arrays:
            assert arrays["sample"]


def test_a_loss_that_is_not_finite_names_epoch_and_step(tmp_path, tiny):
    run = make_run(tmp_path, optimizer="sgd", learning_rate=1e30, schedule="constant")
    with pytest.raises(fm.DivergedError, match=r"in epoch 1, step [23];"):
        fm.fit(run, tiny, progress=fm.Silence())
    assert not (tmp_path / files.REPORT).exists()


def test_a_folder_with_another_run_is_refused(straight, tiny):
    _, workdir = straight
    with pytest.raises(fm.ConfigError, match="holds another run") as caught:
        fm.fit(make_run(workdir, seed=7, epochs=5), tiny, progress=fm.Silence())
    assert "  seed: 0 there, 7 asked for" in str(caught.value)
    assert "  recipe.epochs: 3 there, 5 asked for" in str(caught.value)
    fewer = dataclasses.replace(tiny, sha256="", test_images=tiny.test_images[::-1])
    with pytest.raises(fm.ConfigError, match="data_sha256"):
        fm.fit(make_run(workdir), fewer, progress=fm.Silence())


def test_the_words_of_a_recipe_do_not_make_another_run(straight, tiny):
    expected, workdir = straight
    again = fm.fit(make_run(workdir, claim="none"), tiny, progress=fm.Silence())
    assert again.report == expected.report


def test_a_folder_that_cannot_be_one(tmp_path, tiny):
    (tmp_path / "file").write_text("")
    with pytest.raises(fm.ConfigError, match="cannot be used"):
        fm.fit(make_run(tmp_path / "file"), tiny, progress=fm.Silence())


def test_a_batch_larger_than_the_data(tmp_path, tiny):
    with pytest.raises(fm.ConfigError, match="batch_size is 49, but there are only 48"):
        fm.fit(make_run(tmp_path, batch_size=49), tiny, progress=fm.Silence())
