"""A run: its files, resuming, stopping, and invalid settings."""

import dataclasses
import itertools
import json
import os
import shutil
import signal
import time
import types
from typing import Any

import chex
import jax
import numpy as np
import pytest
from sklearn.utils.class_weight import compute_class_weight

import fmnist_jax as fm
from fmnist_jax.analysis.scores import log_losses
from fmnist_jax.config import to_dict
from fmnist_jax.data.split import stratified_split
from fmnist_jax.errors import (
    CheckpointError,
    CheckpointWarning,
    ConfigError,
    DivergedError,
    EnvironmentWarning,
    Interrupted,
)
from fmnist_jax.runs import environment, files, saver
from fmnist_jax.runs import fit as fit_lib
from fmnist_jax.runs.checkpoint import Checkpoints
from fmnist_jax.runs.plan import create_plan
from fmnist_jax.runs.signals import STOPPING
from fmnist_jax.train.predict import predict_tta
from tests.small import LINEAR, SMALL

RECIPE = dataclasses.replace(
    fm.RECIPES["small_dropout"],
    arch=SMALL,
    epochs=3,
    batch_size=16,
    val_fraction=0.2,
    augmentation="geometric",
    augmentation_strength=0.5,
)


def make_run(workdir, seed=0, train_examples=None, tta=False, **changes):
    recipe = dataclasses.replace(RECIPE, **changes)
    return fm.Run(recipe=recipe, workdir=workdir, seed=seed, train_examples=train_examples, tta=tta)


@pytest.fixture(scope="module")
def straight(tmp_path_factory, tiny):
    """A run from start to end, and its folder."""
    workdir = tmp_path_factory.mktemp("straight")
    return fm.fit(make_run(workdir), tiny, hooks=()), workdir


def figures(line):
    """A line of metrics.jsonl without times."""
    return {
        key: value for key, value in line.items() if key not in ("seconds", "images_per_second")
    }


class Stop(fm.Hook):
    """Sends a signal when a step is reached, and records messages."""

    def __init__(self, step, number=signal.SIGINT):
        self.step, self.number, self.texts = step, number, []

    def message(self, text):
        self.texts.append(text)

    def update(self, *, step, epoch, images_per_second, loss):
        if step == self.step:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("steps", [[1], [4], [3, 4, 8], [5, 6, 7, 9]])
def test_resume_is_bitwise_identical(steps, straight, tmp_path, tiny, monkeypatch):
    # One step per call, so that the signal arrives at this very step.
    monkeypatch.setattr(fit_lib, "_CALL_SECONDS", 0.0)
    for step in steps:
        with pytest.raises(
            Interrupted, match=f"after step {step} of 9; the state is saved"
        ) as caught:
            fm.fit(make_run(tmp_path), tiny, hooks=[Stop(step)])
        assert caught.value.signal_number == signal.SIGINT
    result = fm.fit(make_run(tmp_path), tiny, hooks=())
    expected, _ = straight
    chex.assert_trees_all_equal(result.state, expected.state)
    assert [figures(line) for line in result.history] == [
        figures(line) for line in expected.history
    ]
    assert result.report["params_sha256"] == expected.report["params_sha256"]
    entries = json.loads((tmp_path / files.ENVIRONMENT).read_text())
    assert len(entries) == len(steps) + 1


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU,
        signal.SIGALRM,
    ],
)  # fmt: skip
def test_a_signal_stops_and_the_handlers_are_restored(number, tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(fit_lib, "_CALL_SECONDS", 0.0)
    before = [signal.getsignal(each) for each in sorted(STOPPING)]
    with pytest.raises(Interrupted) as caught:
        fm.fit(make_run(tmp_path), tiny, hooks=[Stop(2, number)])
    assert caught.value.signal_number == number
    assert [signal.getsignal(each) for each in sorted(STOPPING)] == before


@pytest.mark.parametrize("handler", [signal.SIG_IGN, lambda *_: None])
def test_a_signal_that_the_user_handles_does_not_stop(handler, tmp_path, tiny):
    before = signal.signal(signal.SIGUSR1, handler)
    try:
        result = fm.fit(make_run(tmp_path), tiny, hooks=[Stop(2, signal.SIGUSR1)])
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert result.report["steps"] == 9


def test_a_suspension_is_not_training_time(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(fit_lib, "_CALL_SECONDS", 0.0)
    clock = types.SimpleNamespace(now=0.0)

    def tick():
        clock.now += 0.01
        return clock.now

    class Suspend(fm.Hook):
        def update(self, *, step, epoch, images_per_second, loss):
            if step == 5:  # the next call takes 1,000 s
                original = time_of_call[0]
                time_of_call[0] = lambda: original() + 1000

    time_of_call = [tick]
    fake = types.SimpleNamespace(
        perf_counter=lambda: time_of_call[0](), monotonic=time.monotonic, time=time.time
    )
    monkeypatch.setattr(fit_lib, "time", fake)
    result = fm.fit(make_run(tmp_path), tiny, hooks=[Suspend()])
    assert result.report["train_seconds"] < 1


class StopAfterEpoch(fm.Hook):
    """Asks to stop after an epoch, and records the events of the run."""

    def __init__(self, epoch):
        self.last, self.events = epoch, []

    def start(self, *, settings, step, total_steps):
        self.events.append(("start", step, total_steps))

    def epoch(self, log):
        self.events.append(("epoch", log.epoch, log.step))
        return log.epoch == self.last

    def stop(self):
        self.events.append(("stop",))

    def finish(self, *, report):
        self.events.append(("finish", report["steps"]))


def test_a_hook_stops_the_run_and_the_same_call_resumes(straight, tmp_path, tiny):
    hook = StopAfterEpoch(2)
    with pytest.raises(Interrupted, match="after step 6 of 9; the state is saved") as caught:
        fm.fit(make_run(tmp_path), tiny, hooks=[hook])
    assert caught.value.signal_number is None
    assert hook.events == [("start", 0, 9), ("epoch", 1, 3), ("epoch", 2, 6), ("stop",)]
    result = fm.fit(make_run(tmp_path), tiny, hooks=[hook])
    assert hook.events[4:] == [("start", 6, 9), ("epoch", 3, 9), ("stop",), ("finish", 9)]
    chex.assert_trees_all_equal(result.state, straight[0].state)


def test_a_finished_run_returns_its_results(straight, tiny):
    expected, workdir = straight
    before = {path: path.read_bytes() for path in workdir.iterdir() if path.is_file()}
    again = fm.fit(make_run(workdir), tiny, hooks=())
    chex.assert_trees_all_equal(again.state, expected.state)
    assert again.report == expected.report
    assert again.history == expected.history
    assert {path: path.read_bytes() for path in workdir.iterdir() if path.is_file()} == before


@pytest.mark.parametrize(
    ("steps_per_call", "checkpoint_every"),
    [(1, "1st"), (7, "2ep"), (100, "2st"), (100, "1s"), (1, "1ep")],
)
def test_bits_depend_neither_on_calls_nor_on_checkpoints(
    steps_per_call, checkpoint_every, straight, tmp_path, tiny, monkeypatch
):
    fix_pace(monkeypatch, steps_per_call)
    expected, _ = straight
    run = dataclasses.replace(make_run(tmp_path), checkpoint_every=checkpoint_every)
    result = fm.fit(run, tiny, hooks=())
    assert result.report["params_sha256"] == expected.report["params_sha256"]
    chex.assert_trees_all_equal(result.state, expected.state)


def fix_pace(monkeypatch, num_steps):
    """From the second call on, each takes this number of steps."""
    monkeypatch.setattr(fit_lib, "_adapted", lambda *_: num_steps)


class Steps(fm.Hook):
    """Records the steps after which a call returned."""

    def __init__(self):
        self.steps = [0]

    def update(self, *, step, **_):
        self.steps.append(step)


def test_calls_of_many_steps_change_no_bit(tmp_path, sample, monkeypatch):
    hashes = set()
    for num_steps in (1, 7, 100):
        fix_pace(monkeypatch, num_steps)
        run = make_run(tmp_path / str(num_steps), epochs=1, batch_size=2, train_examples=240)
        hook = Steps()
        hashes.add(fm.fit(run, sample, hooks=[hook]).report["params_sha256"])
        assert hook.steps[-1] == 120
        assert max(np.diff(hook.steps)) == num_steps
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


def test_timed_checkpoints_use_a_monotonic_clock(straight, saved, tmp_path, tiny, monkeypatch):
    fix_pace(monkeypatch, 1)
    # It is read at the start, after each step but an epoch's last, and after each save.
    clock = types.SimpleNamespace(monotonic=itertools.count(step=35.0).__next__)
    monkeypatch.setattr(saver, "time", clock)
    run = dataclasses.replace(make_run(tmp_path), checkpoint_every="60s")
    result = fm.fit(run, tiny, hooks=())
    assert saved == [2, 3, 5, 6, 8, 9]
    chex.assert_trees_all_equal(result.state, straight[0].state)


def test_checkpoints_are_saved_and_retained_as_configured(saved, tmp_path, tiny):
    def steps(name, **changes):
        saved.clear()
        run = dataclasses.replace(make_run(tmp_path / name), **changes)
        fm.fit(run, tiny, hooks=())
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
def test_keep_every_that_retains_nothing_is_refused(keep, every, fits, tmp_path, tiny):
    run = dataclasses.replace(make_run(tmp_path), keep_every=keep, checkpoint_every=every)
    if fits:
        create_plan(run, tiny)
    else:
        with pytest.raises(
            ConfigError, match=rf"keep_every is {keep}, .* none of the checkpoints falls on"
        ):
            create_plan(run, tiny)


def test_the_score_is_saved_when_the_first_save_fails(tmp_path, tiny, monkeypatch):
    save = Checkpoints.save

    def refuse(self, step, *rest):
        if step == 3 and not refused:
            refused.append(step)
            raise CheckpointError("the disk is full")
        save(self, step, *rest)

    refused: list[int] = []
    monkeypatch.setattr(Checkpoints, "save", refuse)
    monkeypatch.setattr(fit_lib, "_CALL_SECONDS", 0.0)
    with pytest.warns(CheckpointWarning, match="full"), pytest.raises(Interrupted):
        fm.fit(make_run(tmp_path), tiny, hooks=[Stop(3)])
    checkpoint = fm.load_checkpoint(tmp_path)
    assert checkpoint.step == 3
    assert checkpoint.score == checkpoint.meta["history"][-1]["accuracy"]


@pytest.mark.parametrize("text", ["0ep", "5", "ep", "1.5s", "-1st", "10 st", "1h"])
def test_invalid_intervals_are_refused(text, tmp_path):
    with pytest.raises(ConfigError, match=r"checkpoint_every is .* such as 500st or 1ep or 60s"):
        dataclasses.replace(make_run(tmp_path), checkpoint_every=text)
    with pytest.raises(ConfigError, match=r"keep_every is .* such as 500st or 1ep \("):
        dataclasses.replace(make_run(tmp_path), keep_every=text)


def test_a_damaged_checkpoint_is_skipped(straight, tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(fit_lib, "_CALL_SECONDS", 0.0)
    with pytest.raises(Interrupted):
        fm.fit(make_run(tmp_path), tiny, hooks=[Stop(8)])
    for path in (tmp_path / "checkpoints" / "8").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.warns(CheckpointWarning, match="step 8 is damaged"):
        result = fm.fit(make_run(tmp_path), tiny, hooks=())
    expected, _ = straight
    chex.assert_trees_all_equal(result.state, expected.state)
    assert [figures(line) for line in result.history] == [
        figures(line) for line in expected.history
    ]


def test_the_log_is_restored_from_the_checkpoint(straight, tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(fit_lib, "_CALL_SECONDS", 0.0)
    for step, content in ((4, b'{"step": 3, "epo'), (7, None)):
        with pytest.raises(Interrupted):
            fm.fit(make_run(tmp_path), tiny, hooks=[Stop(step)])
        path = tmp_path / files.METRICS
        path.write_bytes(content) if content else path.unlink()
    result = fm.fit(make_run(tmp_path), tiny, hooks=())
    expected = [figures(line) for line in straight[0].history]
    assert [figures(line) for line in result.history] == expected
    assert [figures(line) for line in files.read_lines(path)] == expected


def test_a_changed_environment_is_reported(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(fit_lib, "_CALL_SECONDS", 0.0)
    for step in (2, 4):  # unchanged: a warning would be an error
        with pytest.raises(Interrupted):
            fm.fit(make_run(tmp_path), tiny, hooks=[Stop(step)])
    describe = environment.describe
    before = describe()["num_threads"]
    monkeypatch.setattr(environment, "describe", lambda: describe() | {"processor": "another"})
    monkeypatch.setenv("NPROC", "77")
    settings = describe()["settings"]
    monkeypatch.setattr(environment, "_jax_settings", lambda: settings | {"jax_enable_x64": True})
    with pytest.warns(EnvironmentWarning, match="the environment has changed") as caught:
        fm.fit(make_run(tmp_path), tiny, hooks=())
    assert str(caught[0].message).splitlines()[1:] == [
        f"  processor: {describe()['processor']} before, another now",
        f"  num_threads: {before} before, 77 now",
        "  settings.jax_enable_x64: absent before, True now",
    ]


def test_settings_of_jax_are_part_of_the_environment():
    assert not set(environment.describe()["settings"]) & set(environment._DEFAULTS)
    with jax.enable_x64(True), jax.default_matmul_precision("bfloat16"):
        settings = environment.describe()["settings"]
    assert settings["jax_enable_x64"] is True
    assert settings["jax_default_matmul_precision"] == "bfloat16"


def test_a_plan_knows_the_shapes_of_its_state(tmp_path, tiny):
    plan = create_plan(make_run(tmp_path, learning_rate=0.5, epochs=2), tiny)
    assert plan.hyperparams.learning_rate == 0.5
    assert plan.hyperparams.total_steps == plan.total_steps == 6
    chex.assert_trees_all_equal_shapes_and_dtypes(plan.create_state(), plan.abstract_state)
    assert plan.num_params == sum(leaf.size for leaf in jax.tree.leaves(plan.create_state().params))


def test_tta_is_evaluated_where_the_recipe_mirrors_or_on_request(straight, tmp_path, tiny):
    _, workdir = straight
    assert create_plan(make_run(tmp_path, tta=None), tiny).tta
    plain = make_run(tmp_path, tta=None, augmentation="none", augmentation_strength=None)
    assert not create_plan(plain, tiny).tta
    before = json.loads((workdir / files.REPORT).read_text())
    assert before["tta_accuracy"] is None
    moved = shutil.copytree(workdir, tmp_path / "run")
    result = fm.fit(make_run(moved, tta=True), tiny, hooks=())
    logits = predict_tta(result.state.variables, tiny.test_images, model=result.model)
    accuracy = np.mean(np.asarray(logits).argmax(axis=1) == tiny.test_labels)
    assert result.report == before | {"tta_accuracy": accuracy}
    # Other settings without effect on the training resume the same run.
    again = dataclasses.replace(make_run(moved), checkpoint_every="2ep")
    assert fm.fit(again, tiny, hooks=()).report == result.report


def test_a_damaged_checkpoint_of_a_finished_run_is_refused(straight, tmp_path, tiny):
    moved = shutil.copytree(straight[1], tmp_path / "run")
    (moved / "checkpoints" / "9" / "manifest.json").write_text("")
    before = {path: path.read_bytes() for path in moved.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError, match=r"step 9 in .* is damaged"):
        fm.fit(make_run(moved), tiny, hooks=())
    assert {path: path.read_bytes() for path in moved.rglob("*") if path.is_file()} == before


def test_a_finished_run_without_checkpoints_keeps_its_results(straight, tmp_path, tiny):
    _, workdir = straight
    moved = shutil.copytree(workdir, tmp_path / "run", ignore=lambda *_: ["checkpoints"])
    before = {path: path.read_bytes() for path in moved.iterdir() if path.is_file()}
    for tta in (False, True):
        with pytest.raises(CheckpointError, match="is finished, but its checkpoints are missing"):
            fm.fit(make_run(moved, tta=tta), tiny, hooks=())
    assert {path: path.read_bytes() for path in moved.iterdir() if path.is_file()} == before


def test_the_files_of_a_run(straight, tiny):
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
        "test_accuracy", "test_loss", "test_balanced_accuracy", "test_macro_f1", "test_auc",
        "test_intervals", "classes", "confusion_matrix", "compile_seconds",
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
    predicted = logits.argmax(axis=1)
    assert report["test_accuracy"] == np.mean(predicted == tiny.test_labels)
    found = np.unique(tiny.test_labels)
    recalls = [np.mean(predicted[tiny.test_labels == label] == label) for label in found]
    assert report["test_balanced_accuracy"] == pytest.approx(np.mean(recalls))
    low, high = report["test_intervals"]["test_balanced_accuracy"]
    assert low < np.mean(recalls) < high
    expected = fm.predict(result.state.variables, tiny.test_images, model=result.model)
    chex.assert_trees_all_equal(logits, np.asarray(expected))


# Compiled as in production: other flags round the two programs differently.
@pytest.mark.slow
def test_augmented_examples_are_those_of_the_training(straight, tiny):
    _, workdir = straight
    with np.load(workdir / files.EXAMPLES) as examples:
        originals, augmented = examples["originals"], examples["augmented"]
    assert augmented.shape == (6, 5, 28, 28)
    train_examples, _ = stratified_split(fm.create_streams(0).split, tiny.train_labels, 0.2)
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
    again = fm.fit(make_run(tmp_path / "a"), tiny, hooks=())
    other = fm.fit(make_run(tmp_path / "b", seed=1), tiny, hooks=())
    assert again.report["params_sha256"] == expected.report["params_sha256"]
    assert other.report["params_sha256"] != expected.report["params_sha256"]


@pytest.fixture(scope="module")
def weighted(tmp_path_factory, tiny):
    """A run of a linear network with class weights, in one step per epoch."""
    recipe = fm.Recipe(
        arch=LINEAR, epochs=3, batch_size=48, val_fraction=0.2, class_weights="balanced"
    )
    run = fm.Run(recipe=recipe, workdir=tmp_path_factory.mktemp("weighted"))
    return run, fm.fit(run, tiny, hooks=())


def test_class_weights_are_those_of_the_split_images(weighted, tiny):
    run, result = weighted
    plan = create_plan(run, tiny)
    labels = tiny.train_labels
    own = dataclasses.replace(tiny, val_examples=np.arange(12))
    weights = compute_class_weight("balanced", classes=np.arange(10), y=labels[12:])
    own_loss: Any = create_plan(run, own).config.loss
    np.testing.assert_allclose(own_loss.weights, weights)
    expected = compute_class_weight("balanced", classes=np.arange(10), y=labels)
    loss: Any = plan.config.loss
    assert len(set(expected)) > 1
    np.testing.assert_allclose(loss.weights, expected)
    assert files.read_json(run.workdir / files.CONFIG)["recipe"]["class_weights"] == "balanced"
    plain = dataclasses.replace(run.recipe, class_weights="none")
    assert "class_weights" not in to_dict(dataclasses.replace(run, recipe=plain))["recipe"]

    # The training loss is weighted, in the log and in a replay.
    first = fm.replay(run.workdir, tiny, 1)
    state = plan.create_state()
    images = tiny.train_images[first.examples]
    logits: Any = fm.predict(state.variables, images, model=plan.model)
    losses = log_losses(logits, first.labels)
    np.testing.assert_allclose(first.losses, expected[first.labels] * losses, rtol=1e-4)
    np.testing.assert_allclose(result.history[0]["loss"], first.losses.mean(), rtol=1e-5)
    # Those of validation and test are not.
    val = result.history[-1]
    images, labels = (array[plan.val_examples] for array in (tiny.train_images, tiny.train_labels))
    logits = fm.predict(result.state.variables, images, model=plan.model)
    np.testing.assert_allclose(val["loss"], log_losses(logits, labels).mean(), rtol=1e-5)
    logits = fm.predict(result.state.variables, tiny.test_images, model=plan.model)
    expected_loss = log_losses(logits, tiny.test_labels).mean()
    np.testing.assert_allclose(result.report["test_loss"], expected_loss, rtol=1e-5)


def test_a_run_with_class_weights_resumes(weighted, tiny, tmp_path):
    class Stopper(fm.Hook):
        def epoch(self, log):
            return log.epoch == 2

    run = dataclasses.replace(weighted[0], workdir=tmp_path)
    with pytest.raises(Interrupted):
        fm.fit(run, tiny, hooks=[Stopper()])
    result = fm.fit(run, tiny, hooks=())
    assert result.report["params_sha256"] == weighted[1].report["params_sha256"]


def test_class_weights_need_images_of_every_class(weighted, tiny):
    missing = np.flatnonzero(np.isin(tiny.train_labels, (2, 9))).tolist()
    run = dataclasses.replace(weighted[0], exclude=missing)
    run = dataclasses.replace(run, recipe=dataclasses.replace(run.recipe, batch_size=8))
    with pytest.raises(ConfigError, match="no training examples of Pullover, Ankle boot; choose"):
        create_plan(run, tiny)


def test_a_run_without_validation(tmp_path, tiny):
    result = fm.fit(make_run(tmp_path, epochs=1, val_fraction=0.0), tiny, hooks=())
    assert result.report["val_accuracy"] is None
    assert [line["split"] for line in result.history] == ["train"]


def test_the_sample_is_marked_in_every_file(tmp_path, sample):
    run = make_run(tmp_path, epochs=1, train_examples=32)
    fm.fit(run, sample, hooks=())
    assert json.loads((tmp_path / files.CONFIG).read_text())["sample"]
    assert json.loads((tmp_path / files.REPORT).read_text())["sample"]
    assert all(entry["sample"] for entry in json.loads((tmp_path / files.ENVIRONMENT).read_text()))
    assert all(line["sample"] for line in files.read_lines(tmp_path / files.METRICS))
    for name in (files.PREDICTIONS, files.EXAMPLES):
        with np.load(tmp_path / name) as arrays:
            assert arrays["sample"]


def test_divergence_names_epoch_and_step(tmp_path, tiny):
    run = make_run(tmp_path, optimizer="sgd", learning_rate=1e30, schedule="constant")
    with pytest.raises(DivergedError, match=r"in epoch 1, step [23];"):
        fm.fit(run, tiny, hooks=())
    assert not (tmp_path / files.REPORT).exists()


def test_divergence_in_the_last_step_is_found_without_validation_images(tmp_path, tiny):
    run = make_run(
        tmp_path, optimizer="sgd", learning_rate=1e30, schedule="constant", epochs=1,
        batch_size=60, val_fraction=0.0,
    )  # fmt: skip
    with pytest.raises(DivergedError, match="logits of the test images are not finite"):
        fm.fit(run, tiny, hooks=())
    assert not (tmp_path / files.REPORT).exists()


def test_more_steps_than_the_counter_holds_are_refused(tmp_path, tiny):
    with pytest.raises(ConfigError, match="epochs is 1,000,000,000, which makes 3,000,000,000"):
        create_plan(make_run(tmp_path, epochs=10**9), tiny)


def test_a_folder_with_another_run_is_refused(straight, tiny):
    _, workdir = straight
    with pytest.raises(ConfigError, match="holds another run") as caught:
        fm.fit(make_run(workdir, seed=7, epochs=5), tiny, hooks=())
    assert "  seed: 0 found, 7 requested" in str(caught.value)
    assert "  recipe.epochs: 3 found, 5 requested" in str(caught.value)
    fewer = dataclasses.replace(tiny, sha256="", test_images=tiny.test_images[::-1])
    with pytest.raises(ConfigError, match="data_sha256"):
        fm.fit(make_run(workdir), fewer, hooks=())


def test_a_file_as_folder_is_refused(tmp_path, tiny):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be used"):
        fm.fit(make_run(tmp_path / "file"), tiny, hooks=())


def test_a_read_only_folder_is_refused(tmp_path, tiny, monkeypatch):
    def refuse(path):
        raise OSError(30, "Read-only file system", str(path))

    # The user of the tests may be one whom no permission stops.
    monkeypatch.setattr(files, "sync", refuse)
    with pytest.raises(ConfigError, match=r"cannot be used: .*Read-only"):
        fm.fit(make_run(tmp_path), tiny, hooks=())
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_a_folder_in_use_is_refused(tmp_path, tiny):
    with files.locked(tmp_path), pytest.raises(ConfigError, match="in use by another process"):
        fm.fit(make_run(tmp_path), tiny, hooks=())
    with files.locked(tmp_path):
        pass


def test_a_batch_size_above_the_number_of_examples_is_refused(tmp_path, tiny):
    with pytest.raises(ConfigError, match="batch_size is 49, but there are only 48"):
        fm.fit(make_run(tmp_path, batch_size=49), tiny, hooks=())
