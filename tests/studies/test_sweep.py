"""The search for settings."""

import dataclasses
import os
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import filelock
import numpy as np
import pytest

import fmnist_jax as fm
from fmnist_jax.errors import ConfigError, DamagedFileError, Interrupted
from fmnist_jax.report.sweep import write_sweep_report
from fmnist_jax.runs import files
from fmnist_jax.studies.sweep import Domain, load_study, parse_domain
from fmnist_jax.train.loop import train_steps
from tests.nets import LinenNet
from tests.small import SMALL
from tests.studies.sweep_child import RECIPE, SPACE

CHILD = Path(__file__).parent / "sweep_child.py"


def read_trials(workdir):
    with load_study(workdir) as study:
        return study.trials


@pytest.fixture
def run(tmp_path):
    return fm.Run(recipe=RECIPE, workdir=tmp_path / "sweep", train_examples=200)


def test_a_sweep_compiles_once_and_its_winner_is_trained_from_fresh_seeds(run, sample):
    before = train_steps._outer(is_bfloat16=False)._cache_size()
    report = fm.sweep(run, sample, SPACE, 4, num_seeds=2, hooks=())
    # The trials share a program with the fresh seeds.
    assert train_steps._outer(is_bfloat16=False)._cache_size() == before + 1
    assert len(report["trials"]) == 4
    best = report["best"]
    values = [trial["val_accuracy"][-1] for trial in report["trials"]]
    assert best["val_accuracy"] == max(values)
    assert 1e-4 <= best["params"]["learning_rate"] <= 1e-2
    # The same run by another way.
    recipe = dataclasses.replace(run.recipe, **best["params"])
    again = dataclasses.replace(run, recipe=recipe, workdir=run.workdir / "again")
    result = fm.fit(again, sample, hooks=())
    assert result.report["val_accuracy"] == best["val_accuracy"]

    fresh = [
        files.read_json(run.workdir / report["seeds"] / f"seed-{seed}" / files.REPORT)
        for seed in (1, 2)
    ]
    assert fresh[0]["recipe"] == dataclasses.asdict(recipe)
    mean = np.mean([one["val_accuracy"] for one in fresh])
    assert report["optimism"]["mean"] == pytest.approx(best["val_accuracy"] - mean)
    assert report["test_accuracy"]["values"] == [one["test_accuracy"] for one in fresh]

    page = write_sweep_report(run.workdir).read_text()
    assert page.count("data:image/png") == 3

    # More trials continue the study; other settings are refused.
    report = fm.sweep(run, sample, SPACE, 5, num_seeds=2, hooks=())
    assert len(report["trials"]) == 5
    other = dataclasses.replace(run, seed=1)
    with pytest.raises(ConfigError, match="holds another sweep"):
        fm.sweep(other, sample, SPACE, 5, hooks=())


def test_trials_without_result_are_reported(run, sample):
    # Of the sizes of a batch, only multiples of the microbatch can be trained.
    recipe = dataclasses.replace(run.recipe, microbatch_size=50, batch_size=50)
    # Characters that mean something in a URL.
    run = dataclasses.replace(run, recipe=recipe, workdir=run.workdir / "a?b%41")
    with pytest.raises(ConfigError, match="none of the 1 trials has a result"):
        fm.sweep(run, sample, {"batch_size": Domain(50, 100)}, 1, hooks=())
    assert (run.workdir / "study.db").stat().st_size
    (trial,) = read_trials(run.workdir)
    assert trial.state.name == "PRUNED"


@pytest.mark.slow
def test_options_of_a_part_are_searched(run, sample):
    space = dict(map(parse_domain, ["arch_options.width=2:3", "optimizer=adam,optax:lion"]))
    assert space["arch_options.width"] == Domain(2, 3)
    run = dataclasses.replace(run, recipe=fm.Recipe(arch=SMALL, epochs=1, batch_size=50))
    report = fm.sweep(run, sample, space, 2, num_seeds=2, hooks=(), model=LinenNet)
    assert report["arch"] == "tests.nets:LinenNet"
    widths = {trial["params"]["arch_options.width"] for trial in report["trials"]}
    assert widths <= {2, 3}
    best = report["best"]["params"]
    assert report["recipe"]["arch_options"] == {"width": best["arch_options.width"]}
    with pytest.raises(ConfigError, match="takes no such option: depth"):
        fm.sweep(run, sample, {"arch_options.depth": Domain(1, 2)}, 1, model=LinenNet)


@pytest.mark.slow
def test_trials_end_early_as_runs_do(run, sample):
    recipe = dataclasses.replace(run.recipe, epochs=6, patience=1, learning_rate=1e-9)
    space = {"learning_rate": Domain(choices=(1e-9,))}
    report = fm.sweep(dataclasses.replace(run, recipe=recipe), sample, space, 1, num_seeds=2,
                      hooks=())  # fmt: skip
    assert len(report["trials"][0]["val_accuracy"]) < 6


@pytest.mark.slow
def test_a_killed_sweep_continues(tmp_path):
    def start(num_trials, kill_at):
        command = [sys.executable, str(CHILD), str(tmp_path / "sweep"), str(num_trials), kill_at]
        return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)

    for kill_at in ("2", "4"):
        assert start(6, kill_at).returncode == -signal.SIGKILL
    finished = read_trials(tmp_path / "sweep")
    assert [trial.state.name for trial in finished].count("COMPLETE") == 3
    process = start(6, "0")
    assert process.returncode == 0, process.stderr
    trials = {trial.number: trial for trial in read_trials(tmp_path / "sweep")}
    for trial in finished:
        if trial.state.name == "COMPLETE":
            assert trials[trial.number].value == trial.value
    states = [trial.state.name for trial in trials.values()]
    assert sum(state in ("COMPLETE", "PRUNED") for state in states) == 6


@pytest.mark.slow
def test_processes_share_a_sweep(tmp_path):
    command = [sys.executable, str(CHILD), str(tmp_path / "sweep"), "12", "0"]
    children = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [child.communicate(timeout=300) for child in children]
    assert [child.returncode for child in children] == [0, 0], outputs
    trials = read_trials(tmp_path / "sweep")
    assert 12 <= len(trials) <= 13
    assert len({trial.params["learning_rate"] for trial in trials}) == len(trials)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("dropout=0:0.6", ("dropout", Domain(0.0, 0.6))),
        ("batch_size=log:32:512", ("batch_size", Domain(32, 512, True))),
        (
            "loss=cross_entropy,nets:focal",
            ("loss", Domain(choices=("cross_entropy", "nets:focal"))),
        ),
        ("arch_options.act=relu,gelu", ("arch_options.act", Domain(choices=("relu", "gelu")))),
        ("arch_options.rate=log:0.1:1", ("arch_options.rate", Domain(0.1, 1, log=True))),
        ("patience=2,3", ("patience", Domain(choices=(2, 3)))),
        ("schedule=cosine,linear", ("schedule", Domain(choices=("cosine", "linear")))),
        ("batch_size=64,128", ("batch_size", Domain(choices=(64, 128)))),
    ],
)
def test_domains_are_read(text, expected):
    name, domain = parse_domain(text)
    assert (name, domain) == expected
    assert type(domain.low) is type(expected[1].low)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rate=0:1", "names no setting of a recipe; choose one of augmentation"),
        ("arch=a,b", "names no setting"),
        ("dropout", "has no values; expected dropout=low:high"),
        ("dropout=a:b", "is not of type float"),
        ("dropout=0.5:0.1", "low must be below high"),
        ("learning_rate=log:0:1", "low must be above 0 and below high"),
        ("dropout=0:1:2", "is not a range"),
        ("batch_size=1.5:3", "is not of type int"),
        ("optimizer=log:adam:sgd", "is not a range"),
    ],
)
def test_bad_domains_are_refused(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_domain(text)


def test_bad_input_is_refused(run, sample, monkeypatch):
    with pytest.raises(ConfigError, match="num_trials is 0"):
        fm.sweep(run, sample, SPACE, 0)
    with pytest.raises(ConfigError, match="no setting to search"):
        fm.sweep(run, sample, {}, 1)
    with pytest.raises(ConfigError, match="holds no sweep"):
        read_trials(run.workdir)
    for name, values in {"optimizer": ("adam", "foo"), "dropout": (0.1, 1.5)}.items():
        with pytest.raises(ConfigError, match=f"{name} is {values[1]!r}"):
            fm.sweep(run, sample, {name: Domain(choices=values)}, 1)
    assert not run.workdir.exists()
    with pytest.raises(ConfigError, match="seed is 4294967297"):
        fm.sweep(dataclasses.replace(run, seed=2**32 - 1), sample, SPACE, 1, num_seeds=2)
    with pytest.raises(ConfigError, match="val_fraction is 0"):
        fm.sweep(run, sample, {"val_fraction": Domain(choices=(0.1, 0.0))}, 1)
    recipe = dataclasses.replace(run.recipe, val_fraction=0.0)
    with pytest.raises(ConfigError, match="val_fraction is 0"):
        fm.sweep(dataclasses.replace(run, recipe=recipe), sample, SPACE, 1)
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match="optuna is not installed"):
        fm.sweep(run, sample, SPACE, 1)


class StopAt(fm.Hook):
    """Sends a signal at a step of the second trial, and records what happens."""

    def __init__(self):
        self.texts, self.updates = [], 0

    def message(self, text):
        self.texts.append(text)

    def update(self, *, step, epoch, images_per_second, loss):
        self.updates += 1
        if "trial 1" in self.texts[-1]:
            os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_stops_the_sweep_and_its_trial_is_repeated(run, sample):
    hook = StopAt()
    with pytest.raises(Interrupted, match="finished trials are saved") as caught:
        fm.sweep(run, sample, SPACE, 2, num_seeds=2, hooks=[hook])
    assert caught.value.signal_number == signal.SIGINT
    assert hook.updates > 2  # progress within a trial
    report = fm.sweep(run, sample, SPACE, 2, num_seeds=2, hooks=())
    states = [trial["state"] for trial in report["trials"]]
    assert states == ["COMPLETE", "FAIL", "COMPLETE"]
    assert report["trials"][2]["params"] == report["trials"][1]["params"]


@pytest.mark.parametrize("fault", ["damaged", "locked"])
def test_a_study_that_cannot_be_used_is_named(fault, tmp_path, monkeypatch, request):
    path = tmp_path / "study.db"
    path.write_bytes(b"not a database" * 100)
    if fault == "locked":
        path.unlink()
        path.touch()
        connect = sqlite3.connect
        other = connect(path, isolation_level=None)
        other.execute("BEGIN EXCLUSIVE")
        monkeypatch.setattr(sqlite3, "connect", lambda path, **options: connect(path, timeout=0.1))
        request.addfinalizer(other.close)
    message = {"damaged": "file is not a database", "locked": "database is locked"}[fault]
    with (
        pytest.raises(DamagedFileError, match=rf"study\.db cannot be used: .*{message}"),
        load_study(tmp_path),
    ):
        pass


def test_a_study_that_was_emptied_is_not_begun_again(tmp_path):
    (tmp_path / "study.db").touch()
    (tmp_path / "sweep.json").write_text("{}")
    with pytest.raises(DamagedFileError, match="is missing or empty"), load_study(tmp_path):
        pass


def test_a_process_says_that_it_waits_for_another(run, sample):
    class Release(fm.Hook):
        def message(self, text):
            texts.append(text)
            if text.startswith("Waiting"):
                lock.release()

    texts: list[str] = []
    run.workdir.mkdir(exist_ok=True)
    lock = filelock.FileLock(run.workdir / ".lock")
    lock.acquire()
    space = {"learning_rate": Domain(1e-3, 1e-2)}
    with pytest.raises(ConfigError, match="num_trials"):
        fm.sweep(run, sample, space, 0, hooks=[Release()])
    fm.sweep(run, sample, space, 1, num_seeds=2, hooks=[Release()])
    assert texts[0] == "Waiting for another process that uses the folder ..."
