"""The real command, killed at any instant and started again, comes to the same bits."""

import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import resume

import fmnist_jax as fm
from fmnist_jax import files

CHILD = Path(__file__).parent / "crash_child.py"

# Two epochs of four updates, a checkpoint every three, dropout and augmentation on.
FLAGS = [
    "--arch", "small_dropout", "--sample", "--epochs", "2", "--batch-size", "8",
    "--train-examples", "32", "--val-fraction", "0.02", "--augmentation", "geometric",
    "--checkpoint-every", "3st",
]  # fmt: skip


class Harness:
    """Starts runs that share what they compile, and what they must come to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")}
        self.straight = folder / "straight"
        process = self.start(self.straight, "never")
        _, errors = process.communicate()
        assert process.returncode == 0, errors
        self.expected = resume.outcome(self.straight)
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
        """Whether the run was killed, and not through before."""
        if instant.startswith("after:"):
            process = self.start(workdir, "never")
            time.sleep(float(instant.removeprefix("after:")))
            process.send_signal(signal.SIGKILL)
        else:
            process = self.start(workdir, instant)
        _, errors = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), errors
        return process.returncode != 0

    def check(self, workdir: Path) -> None:
        """Goes on to the end and compares."""
        process = self.start(workdir, "never")
        _, errors = process.communicate()
        assert process.returncode == 0, errors
        assert resume.outcome(workdir) == self.expected
        debris = [path for path in workdir.rglob("*") if path.name.startswith((".", "damaged"))]
        assert not debris

    def kill_often(self, count: int, seed: int) -> dict[str, int]:
        """Runs killed at chosen instants and at random ones, until so many were killed."""
        generator = random.Random(seed)
        named = ["after:0.3", "after:0.3", "evaluate:1", "predict:1", "train_steps:3"]
        kills = runs = 0
        while kills < count:
            workdir = self.folder / f"killed-{seed}-{runs}"
            # A few kills to each run, and its end unharmed.
            for _ in range(min(generator.randint(4, 10), count - kills)):
                if named:
                    instant = named.pop(0)
                elif generator.random() < 0.75:
                    instant = f"file:{generator.randint(1, self.num_events)}"
                else:
                    instant = f"after:{generator.uniform(0.0, 8.0):.2f}"
                if not self.kill(workdir, instant):
                    break  # it came to its end
                kills += 1
            self.check(workdir)
            runs += 1
        return {"kills": kills, "runs": runs}


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    return Harness(tmp_path_factory.mktemp("crash"))


def test_twenty_kills(harness):
    print(harness.kill_often(20, seed=0))


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(1, 6))
def test_five_hundred_kills(seed, harness):
    print(harness.kill_often(100, seed=seed), "and not a bit differs")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops(number, harness, tmp_path):
    process = harness.start(tmp_path / "run", "never", "--epochs", "1000")
    checkpoints = tmp_path / "run" / files.CHECKPOINTS
    while not (checkpoints / "9").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    begun = time.monotonic()
    _, errors = process.communicate()
    print(f"stopped {time.monotonic() - begun:.2f} s after the signal")
    assert process.returncode == 128 + number
    step = fm.load_checkpoint(tmp_path / "run").step
    assert f"Stopped after step {step:,} of 4,000, saved" in errors


def test_while_it_compiles_a_signal_stops_it_at_once(harness, tmp_path):
    process = harness.start(tmp_path / "run", "never", "--no-cache")
    assert any(line.startswith("Compiling") for line in iter(process.stdout.readline, ""))
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM
    assert "Stopped at once" in errors
    assert not (tmp_path / "run" / files.CHECKPOINTS).exists()


def test_a_full_disk_stops_no_training_and_loses_nothing(harness, tmp_path):
    workdir = tmp_path / "run"
    harness.kill(workdir, "evaluate:1")
    before = {path: path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    assert fm.load_checkpoint(workdir).step == 3
    process = harness.start(workdir, "never")
    # The arrays of a checkpoint are larger, all else is smaller.
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (400_000, 400_000))
    output, errors = process.communicate()
    assert process.returncode == 2, errors
    assert "epoch   2" in output
    assert errors.count("warning: the checkpoint of step") == 3  # 4, 6 and 8
    assert "error: the last state, of step 8, could not be saved" in errors
    assert "Traceback" not in errors
    for path, content in before.items():
        assert path.name in (files.METRICS, files.ENVIRONMENT) or path.read_bytes() == content
    assert [path.name for path in (workdir / files.CHECKPOINTS).iterdir()] == ["3"]
    harness.check(workdir)


def test_two_runs_in_one_folder(harness, tmp_path):
    first = harness.start(tmp_path / "run", "never", "--epochs", "1000")
    while not (tmp_path / "run" / files.CONFIG).exists():
        assert first.poll() is None
        time.sleep(0.01)
    second = harness.start(tmp_path / "run", "never", "--epochs", "1000")
    _, errors = second.communicate()
    assert second.returncode == 2
    assert "is used by another run that is under way" in errors
    assert "Traceback" not in errors
    first.kill()
    first.communicate()


def test_verify_resume(capsys, run_py):
    assert run_py.main(["--verify-resume", "--arch", "valid_2x2"]) == 0
    output = capsys.readouterr().out
    assert "Equal to the last bit" in output
    assert "state.params" in output
