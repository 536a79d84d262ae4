"""A run that is killed at any instant and resumed ends bitwise identical."""

import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import fmnist_jax as fm
from fmnist_jax.runs import files, verify

CHILD = Path(__file__).parent / "crash_child.py"

# Two epochs of four steps, a checkpoint every three, dropout and augmentation on.
FLAGS = [
    "--arch", "small_dropout", "--sample", "--epochs", "2", "--batch-size", "8",
    "--train-examples", "32", "--val-fraction", "0.02", "--augmentation", "geometric",
    "--checkpoint-every", "3st",
]  # fmt: skip


# Seconds after which a command counts as hanging.
TIMEOUT = 300


class Harness:
    """Starts runs that share compiled programs, and knows their expected results."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
        self.straight = folder / "straight"
        process = self.start(self.straight, "never")
        _, errors = process.communicate(timeout=TIMEOUT)
        assert process.returncode == 0, errors
        self.expected = verify.outcome(self.straight)
        match = re.search(r"events: (\d+)", errors)
        assert match is not None
        self.num_events = int(match[1])

    def start(self, workdir: Path, instant: str, *flags: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, str(CHILD), instant, *FLAGS, *flags, "--workdir", str(workdir)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.environment,
        )

    def kill(self, workdir: Path, instant: str) -> bool:
        """Starts a run; returns whether it was killed before it finished."""
        if instant.startswith("after:"):
            process = self.start(workdir, "never")
            time.sleep(float(instant.removeprefix("after:")))
            process.send_signal(signal.SIGKILL)
        else:
            process = self.start(workdir, instant)
        _, errors = process.communicate(timeout=TIMEOUT)
        assert process.returncode in (0, -signal.SIGKILL), errors
        return process.returncode != 0

    def check(self, workdir: Path) -> None:
        """Resumes a run to its end and compares."""
        process = self.start(workdir, "never")
        _, errors = process.communicate(timeout=TIMEOUT)
        assert process.returncode == 0, errors
        assert verify.outcome(workdir) == self.expected
        debris = [
            name for name in names(workdir) if re.search(r"\.saving|\.removing|\.new|damaged", name)
        ]
        assert not debris

    def kill_often(self, count: int, seed: int) -> dict[str, int]:
        """Kills runs at chosen and at random instants; returns the numbers of kills and runs."""
        generator = random.Random(seed)
        named = [
            "after:0.3", "file:1", "file:1", "rename:1", "evaluate:1", "removal:1", "removal:3",
            "predict:1", "after:0.3", "train_steps:3",
        ]  # fmt: skip
        kills = runs = 0
        while kills < count:
            workdir = self.folder / f"killed-{seed}-{runs}"
            # Several kills per run, then an undisturbed end.
            for _ in range(min(generator.randint(4, 10), count - kills)):
                if named:
                    instant = named.pop(0)
                elif generator.random() < 0.75:
                    instant = f"file:{generator.randint(1, self.num_events)}"
                else:
                    instant = f"after:{generator.uniform(0.0, 8.0):.2f}"
                if not self.kill(workdir, instant):
                    break  # it has finished
                kills += 1
            self.check(workdir)
            assert names(workdir) == names(self.straight)
            runs += 1
        return {"kills": kills, "runs": runs}


def names(folder: Path) -> set[str]:
    """Names of all files, without those that Orbax draws at random."""
    paths = (path.relative_to(folder).as_posix() for path in folder.rglob("*"))
    return {re.sub("/d/.*", "/d/", path) for path in paths}


@pytest.fixture(scope="module")
def harness(tmp_path_factory, cache_home):
    return Harness(tmp_path_factory.mktemp("crash"), cache_home)


@pytest.mark.parametrize(
    "instant", ["rename:2", pytest.param("train_steps:4", marks=pytest.mark.slow)]
)
def test_a_killed_run_resumes_bitwise_identically(instant, harness, tmp_path):
    assert harness.kill(tmp_path / "run", instant)
    harness.check(tmp_path / "run")


@pytest.mark.slow
def test_ten_kills(harness):
    print(harness.kill_often(10, seed=0))


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(1, 6))
def test_five_hundred_kills(seed, harness):
    print(harness.kill_often(100, seed=seed), "and not a bit differs")


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGTERM,
        *(pytest.param(n, marks=pytest.mark.slow) for n in (signal.SIGINT, signal.SIGHUP)),
    ],
)
def test_a_signal_saves_and_stops(number, harness, tmp_path):
    process = harness.start(tmp_path / "run", "never", "--epochs", "1000")
    checkpoints = tmp_path / "run" / files.CHECKPOINTS
    while not (checkpoints / "9").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    begun = time.monotonic()
    _, errors = process.communicate(timeout=TIMEOUT)
    print(f"stopped {time.monotonic() - begun:.2f} s after the signal")
    assert process.returncode == 128 + number
    step = fm.load_checkpoint(tmp_path / "run").step
    assert f"Stopped after step {step:,} of 4,000; the state is saved" in errors


@pytest.mark.slow
def test_a_signal_during_an_evaluation_stops_after_it(harness, tmp_path):
    process = harness.start(tmp_path / "run", "hang-evaluate:1")
    assert any(line == "hanging\n" for line in process.stdout)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 128 + signal.SIGTERM
    assert "Stopped after step 4 of 8; the state is saved" in errors
    harness.check(tmp_path / "run")


@pytest.mark.slow
def test_a_second_signal_stops_at_once(harness, tmp_path):
    process = harness.start(tmp_path / "run", "hang-train_steps:3")
    assert any(line == "hanging\n" for line in process.stdout)
    process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=TIMEOUT)
    assert process.returncode == -signal.SIGTERM
    harness.check(tmp_path / "run")


@pytest.mark.slow
def test_a_signal_that_is_ignored_stays_ignored(harness, tmp_path):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    process = harness.start(tmp_path / "run", "never")  # as a job in the background
    signal.signal(signal.SIGINT, before)
    while not (tmp_path / "run" / files.CHECKPOINTS / "3").exists():
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        time.sleep(0.01)
    _, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, errors
    harness.check(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("gone", [False, True])
def test_a_run_without_undamaged_checkpoint_does_not_start_over(gone, harness, tmp_path):
    workdir = tmp_path / "run"
    assert harness.kill(workdir, "evaluate:2")
    for checkpoint in (workdir / files.CHECKPOINTS).glob("[0-9]*"):
        (checkpoint / "manifest.json").unlink()
        if gone:
            shutil.rmtree(checkpoint)
    before = names(workdir / files.CHECKPOINTS)
    for _ in range(2):
        process = harness.start(workdir, "never")
        _, errors = process.communicate(timeout=TIMEOUT)
        assert process.returncode == 2
        assert "error: every checkpoint in" in errors
        after = names(workdir / files.CHECKPOINTS)
    assert {name.replace("damaged-", "") for name in after} == before


@pytest.mark.slow
def test_the_comparison_detects_another_run(harness, tmp_path):
    process = harness.start(tmp_path / "run", "never", "--seed", "1")
    process.communicate(timeout=TIMEOUT)
    other, same = verify.outcome(tmp_path / "run"), verify.outcome(harness.straight)
    different = {name for name, sha256 in harness.expected.items() if other.get(name) != sha256}
    assert different >= {files.CONFIG, files.METRICS, files.REPORT}
    assert any(name.startswith("latest checkpoint, step 8: state.params") for name in different)
    assert same == harness.expected


def test_a_signal_during_compilation_stops_at_once(harness, tmp_path):
    process = harness.start(tmp_path / "run", "never", "--no-cache")
    assert any(line.startswith("Compiling") for line in iter(process.stdout.readline, ""))
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == -signal.SIGTERM, errors
    assert not (tmp_path / "run" / files.CHECKPOINTS).exists()


@pytest.mark.slow
def test_training_continues_on_a_full_disk(harness, tmp_path):
    workdir = tmp_path / "run"
    harness.kill(workdir, "evaluate:1")
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    assert fm.load_checkpoint(workdir).step == 3
    process = harness.start(workdir, "never")
    # One array of a checkpoint may be a file of 25 kB, and all other files are under 5 kB.
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (16_000, 16_000))
    output, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 2, errors
    assert "epoch   2" in output
    assert errors.count("warning: the checkpoint of step") == 3  # 4, 6 and 8
    assert "error: the last state, of step 8, could not be saved" in errors
    for path, content in before.items():
        assert path.name in (files.METRICS, files.ENVIRONMENT) or path.read_bytes() == content
    assert {path.name for path in (workdir / files.CHECKPOINTS).iterdir()} == {"3", ".saved"}
    harness.check(workdir)


def test_a_second_process_in_a_folder_is_refused(harness, tmp_path):
    first = harness.start(tmp_path / "run", "never", "--epochs", "1000")
    while not (tmp_path / "run" / files.CONFIG).exists():
        assert first.poll() is None
        time.sleep(0.01)
    second = harness.start(tmp_path / "run", "never", "--epochs", "1000")
    _, errors = second.communicate(timeout=TIMEOUT)
    assert second.returncode == 2
    assert "is in use by another process" in errors
    first.kill()
    first.communicate()
