"""A run: its files, going on, stopping, and what it refuses."""

import dataclasses
import importlib
import itertools
import json
import os
import shutil
import signal
import time
import types

import chex
import numpy as np
import pytest

import fmnist_jax as fm
from fmnist_jax.runs import environment, files
from fmnist_jax.runs.checkpoint import Checkpoints
from fmnist_jax.runs.lock import locked
from fmnist_jax.runs.plan import create_plan
from fmnist_jax.runs.program import program_sha256

# `fm.fit` is the function.
fit_module = importlib.import_module("fmnist_jax.runs.fit")

RECIPE = dataclasses.replace(
    fm.RECIPES["small_dropout"],
    epochs=3,
    batch_size=16,
    val_fraction=0.2,
    augmentation="geometric",
    augmentation_strength=0.5,
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
    """Sends a signal when a step is reached, and keeps what is said."""

    def __init__(self, step, number=signal.SIGINT):
        self.step, self.number, self.texts = step, number, []

    def say(self, text):
        self.texts.append(text)

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


@pytest.mark.parametrize(
    ("steps_a_call", "checkpoint_every"),
    [(1, "1st"), (7, "2ep"), (100, "2st"), (100, "1s"), (1, "1ep")],
)
def test_neither_calls_nor_checkpoints_change_a_bit(
    steps_a_call, checkpoint_every, straight, tmp_path, tiny, monkeypatch
):
    monkeypatch.setattr(fit_module, "_next_call_steps", lambda count, seconds: steps_a_call)
    expected, _ = straight
    run = dataclasses.replace(make_run(tmp_path), checkpoint_every=checkpoint_every)
    result = fm.fit(run, tiny, progress=fm.Silence())
    assert result.report["params_sha256"] == expected.report["params_sha256"]
    chex.assert_trees_all_equal(result.state, expected.state)


def test_calls_of_many_updates_change_no_bit(tmp_path, sample, monkeypatch):
    counts = []
    run_steps = fit_module._Loop._run_steps

    def run_and_count(self, *arguments):
        counts.append(arguments[-1])
        return run_steps(self, *arguments)

    monkeypatch.setattr(fit_module._Loop, "_run_steps", run_and_count)
    hashes = set()
    for steps in (1, 7, 100):
        monkeypatch.setattr(fit_module, "_next_call_steps", lambda *_, steps=steps: steps)
        counts.clear()
        run = make_run(tmp_path / str(steps), epochs=1, batch_size=2, train_examples=240)
        report = fm.fit(run, sample, progress=fm.Silence()).report
        assert (max(counts), sum(counts)) == (steps, 120)
        hashes.add(report["params_sha256"])
    assert len(hashes) == 1


@pytest.fixture
def saved(monkeypatch):
    """The steps that are saved."""
    steps = []
    save = Checkpoints.save

    def save_and_note(self, step, *rest):
        steps.append(step)
        save(self, step, *rest)

    monkeypatch.setattr(Checkpoints, "save", save_and_note)
    return steps


def test_checkpoints_by_a_clock_that_cannot_jump(straight, saved, tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(fit_module, "_next_call_steps", lambda *_: 1)
    # The clock is asked after each update but an epoch's last, and when something was saved.
    clock = types.SimpleNamespace(
        perf_counter=time.perf_counter, monotonic=itertools.count(step=35.0).__next__
    )
    monkeypatch.setattr(fit_module, "time", clock)
    run = dataclasses.replace(make_run(tmp_path), checkpoint_every="60s")
    result = fm.fit(run, tiny, progress=fm.Silence())
    assert saved == [2, 3, 5, 6, 8, 9]
    chex.assert_trees_all_equal(result.state, straight[0].state)


def test_which_checkpoints_are_made_and_kept(saved, tmp_path, tiny):
    def steps(name, **changes):
        saved.clear()
        run = dataclasses.replace(make_run(tmp_path / name), **changes)
        fm.fit(run, tiny, progress=fm.Silence())
        return list(saved)

    assert steps("a") == [3, 6, 9]
    assert steps("b", checkpoint_every="2ep") == [6, 9]
    assert steps("c", checkpoint_every="2st", keep_every="1ep") == [2, 3, 4, 6, 8, 9]
    assert Checkpoints(tmp_path / "c" / "checkpoints").steps() == [3, 6, 8, 9]


@pytest.mark.parametrize(
    ("keep", "every", "fits"),
    [("2st", "1ep", True), ("5st", "1ep", False), ("5st", "2st", False), ("4st", "2st", True),
     ("2ep", "3ep", False), ("9st", "5ep", True), ("3ep", "60s", True), ("4ep", "60s", False)],
)  # fmt: skip
def test_what_would_keep_nothing_is_refused(keep, every, fits, tmp_path, tiny):
    run = dataclasses.replace(make_run(tmp_path), keep_every=keep, checkpoint_every=every)
    if fits:
        create_plan(run, tiny)
    else:
        with pytest.raises(fm.ConfigError, match=rf"keep_every is {keep}, .* none falls on"):
            create_plan(run, tiny)


def test_the_score_is_saved_however_late(tmp_path, tiny, monkeypatch):
    save = Checkpoints.save

    def refuse(self, step, *rest):
        if step == 3 and not refused:
            refused.append(step)
            raise fm.CheckpointError("the disk is full")
        save(self, step, *rest)

    refused: list[int] = []
    monkeypatch.setattr(Checkpoints, "save", refuse)
    monkeypatch.setattr(fit_module, "_CALL_SECONDS", 0.0)
    with pytest.warns(fm.CheckpointWarning, match="full"), pytest.raises(fm.Interrupted):
        fm.fit(make_run(tmp_path), tiny, progress=Stop(3))
    checkpoint = fm.load_checkpoint(tmp_path)
    assert checkpoint.step == 3
    assert checkpoint.score == checkpoint.meta["history"][-1]["accuracy"]


@pytest.mark.parametrize("text", ["0ep", "5", "ep", "1.5s", "-1st", "10 st", "1h"])
def test_intervals_that_are_none(text, tmp_path):
    with pytest.raises(fm.ConfigError, match=r"checkpoint_every is .* such as 500st or 1ep or 60s"):
        dataclasses.replace(make_run(tmp_path), checkpoint_every=text)
    with pytest.raises(fm.ConfigError, match=r"keep_every is .* such as 500st or 1ep \("):
        dataclasses.replace(make_run(tmp_path), keep_every=text)


def test_a_damaged_checkpoint_is_passed_over(straight, tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(fit_module, "_CALL_SECONDS", 0.0)
    with pytest.raises(fm.Interrupted):
        fm.fit(make_run(tmp_path), tiny, progress=Stop(8))
    for path in (tmp_path / "checkpoints" / "8").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.warns(fm.CheckpointWarning, match="step 8 is damaged"):
        result = fm.fit(make_run(tmp_path), tiny, progress=fm.Silence())
    expected, _ = straight
    chex.assert_trees_all_equal(result.state, expected.state)
    assert [figures(line) for line in result.history] == [
        figures(line) for line in expected.history
    ]


def test_the_log_is_made_anew_from_the_checkpoint(straight, tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(fit_module, "_CALL_SECONDS", 0.0)
    for step, content in ((4, b'{"step": 3, "epo'), (7, None)):
        with pytest.raises(fm.Interrupted):
            fm.fit(make_run(tmp_path), tiny, progress=Stop(step))
        path = tmp_path / files.METRICS
        path.write_bytes(content) if content else path.unlink()
    result = fm.fit(make_run(tmp_path), tiny, progress=fm.Silence())
    expected = [figures(line) for line in straight[0].history]
    assert [figures(line) for line in result.history] == expected
    assert [figures(line) for line in files.read_lines(path)] == expected


def test_other_conditions_are_said(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(fit_module, "_CALL_SECONDS", 0.0)
    for step in (2, 4):  # the same conditions: a warning would be an error
        with pytest.raises(fm.Interrupted):
            fm.fit(make_run(tmp_path), tiny, progress=Stop(step))
    describe = environment.describe
    monkeypatch.setattr(environment, "describe", lambda: describe() | {"num_cpus": 77})
    monkeypatch.setenv("PJRT_NPROC", "3")
    with pytest.warns(fm.EnvironmentWarning, match="not those of before") as caught:
        fm.fit(make_run(tmp_path), tiny, progress=fm.Silence())
    assert str(caught[0].message).splitlines()[1:] == [
        f"  num_cpus: {describe()['num_cpus']} before, 77 here",
        "  settings.PJRT_NPROC: nothing before, 3 here",
    ]


def test_the_program_is_known_by_its_content(tmp_path, tiny):
    def sha256(**changes):
        return program_sha256(create_plan(make_run(tmp_path, **changes), tiny))

    assert sha256() == sha256(learning_rate=0.5)
    plain = sha256(augmentation="none", augmentation_strength=None)
    assert len({sha256(), sha256(batch_size=8), plain}) == 3


def test_each_plan_starts_with_an_optimizer_state_of_its_own(tmp_path, tiny):
    for rate, epochs in ((0.5, 2), (0.25, 3)):
        plan = create_plan(make_run(tmp_path, learning_rate=rate, epochs=epochs), tiny)
        state = plan.create_state()
        schedule = state.opt_state.schedule
        assert (schedule.learning_rate, schedule.total_steps) == (rate, plan.total_steps)
        eager = fm.create_train_state(plan.streams.init, plan.model, plan.tx)
        chex.assert_trees_all_equal(state, eager)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, plan.abstract_state)


def test_a_damaged_checkpoint_of_a_complete_run(straight, tmp_path, tiny):
    moved = shutil.copytree(straight[1], tmp_path / "run")
    (moved / "checkpoints" / "9" / "manifest.json").write_text("")
    before = {path: path.read_bytes() for path in moved.rglob("*") if path.is_file()}
    with pytest.raises(fm.CheckpointError, match=r"step 9 in .* is damaged"):
        fm.fit(make_run(moved), tiny, progress=fm.Silence())
    assert {path: path.read_bytes() for path in moved.rglob("*") if path.is_file()} == before


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
        "report.json", "checkpoints", ".lock",
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
    assert report["data"]["sha256"] == tiny.sha256
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
    train_examples, _ = fm.stratified_split(fm.create_streams(0).split, tiny.train_labels, 0.2)
    np.testing.assert_array_equal(originals, tiny.train_images[train_examples[:6]])
    found = set()
    for step in range(7, 10):  # the third epoch
        seen = fm.replay(workdir, tiny, step)
        for example, image in zip(seen.examples, seen.images, strict=True):
            for row in np.flatnonzero(train_examples[:6] == example):
                found.add(row)
                np.testing.assert_array_equal(augmented[row, 2], image)
    assert len(found) == 6


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


def test_a_folder_that_cannot_be_written(tmp_path, tiny, monkeypatch):
    def refuse(path):
        raise OSError(30, "Read-only file system", str(path))

    # The user of the tests may be one whom no permission stops.
    monkeypatch.setattr(files, "sync", refuse)
    with pytest.raises(fm.ConfigError, match=r"cannot be used: .*Read-only"):
        fm.fit(make_run(tmp_path), tiny, progress=fm.Silence())
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_folder_in_use(tmp_path, tiny):
    with locked(tmp_path), pytest.raises(fm.ConfigError, match="used by another run"):
        fm.fit(make_run(tmp_path), tiny, progress=fm.Silence())
    with locked(tmp_path):
        pass


def test_a_batch_larger_than_the_data(tmp_path, tiny):
    with pytest.raises(fm.ConfigError, match="batch_size is 49, but there are only 48"):
        fm.fit(make_run(tmp_path, batch_size=49), tiny, progress=fm.Silence())
