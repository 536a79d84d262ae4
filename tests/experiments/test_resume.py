"""run.py --verify-resume."""

import os
import signal
import subprocess
import sys
import time

import pytest
import resume
from rich.console import Console

import fmnist_jax as fm
from fmnist_jax.recipes import CLAIMS
from tests.conftest import ROOT

EXPECTED = {"a: x": "1", "a: y": "2"}


@pytest.mark.parametrize("found", [EXPECTED, {"a: x": "1"}, {"a: x": "1", "a: y": "3"}])
def test_any_difference_is_reported(found, capsys):
    is_equal = resume._print_comparison(EXPECTED, found, Console(), 0.0)
    assert is_equal == (found == EXPECTED)
    assert ("different: a: y" in capsys.readouterr().out) == (not is_equal)


def test_failed_run_raises():
    with pytest.raises(fm.errors.VerificationError, match=r"(?s)status 2 before .*unrecognized"):
        resume.verify("valid_2x2", Console(quiet=True), ["--unknown"])


@pytest.mark.slow
def test_a_signal_ends_the_trainings_too(tmp_path):
    command = [sys.executable, str(ROOT / "experiments" / "run.py"), "--verify-resume"]
    process = subprocess.Popen(
        [*command, "--arch", "valid_2x2"], stdout=subprocess.DEVNULL,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )  # fmt: skip
    while not list(tmp_path.glob("*/killed/config.json")):
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert not list(tmp_path.iterdir())
    assert subprocess.run(["pgrep", "-f", str(tmp_path)], check=False).returncode == 1


SLOW = ("small_dropout", "he_stack", "sprint_93")


@pytest.mark.parametrize(
    "arch",
    [
        pytest.param(arch, marks=pytest.mark.slow if arch in SLOW else pytest.mark.soak)
        for arch in (*CLAIMS, "sprint_93")
    ],
)
def test_killed_runs_resume_to_identical_bits(arch, run_py, capsys):
    assert run_py.main(["--verify-resume", "--arch", arch]) == 0
    output = capsys.readouterr().out
    assert "Bitwise identical" in output
    assert "step 12" in " ".join(output.split())
