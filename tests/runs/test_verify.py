"""`run --verify-resume`."""

import os
import signal
import subprocess
import sys
import time

import pytest

import fmnist_jax as fm
from fmnist_jax.commands import run as run_command
from fmnist_jax.recipes import CLAIMS
from fmnist_jax.runs.verify import verify_resume
from tests.conftest import ROOT
from tests.nets import NETS

EXPECTED = {"a: x": "1", "a: y": "2"}


@pytest.mark.parametrize("found", [EXPECTED, {"a: x": "1"}, {"a: x": "1", "a: y": "3"}])
def test_any_difference_is_reported(found, monkeypatch, capsys):
    monkeypatch.setattr(run_command, "verify_resume", lambda *_: (EXPECTED, found))
    status = run_command.main(["--verify-resume", "--arch", "valid_2x2"])
    assert status == (0 if found == EXPECTED else 1)
    assert ("different: a: y" in capsys.readouterr().out) == (found != EXPECTED)


def test_failed_run_raises():
    with pytest.raises(fm.errors.VerificationError, match=r"(?s)status 2 before .*unrecognized"):
        verify_resume("valid_2x2", ["--unknown"])


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


SLOW = ("small_dropout", "sprint_91")


@pytest.mark.parametrize(
    "arch",
    [
        pytest.param(arch, marks=pytest.mark.slow if arch in SLOW else pytest.mark.soak)
        for arch in (*CLAIMS, "sprint_91", "sprint_93")
    ],
)
def test_killed_runs_resume_to_identical_bits(arch, capsys):
    assert run_command.main(["--verify-resume", "--arch", arch]) == 0
    output = capsys.readouterr().out
    assert "Bitwise identical" in output
    assert "step 12" in " ".join(output.split())


@pytest.mark.soak
@pytest.mark.parametrize("network", NETS)
def test_killed_runs_of_own_networks_resume_to_identical_bits(network):
    file = ROOT / "tests" / "nets.py"
    own = ["--arch", f"{file}:{network.__name__}", "--arch-options", "width=3"]
    parts = ["--optimizer", f"{file}:clipped_adamw", "--augmentation", f"{file}:Brighten"]
    assert run_command.main(["--verify-resume", *own, *parts]) == 0
