"""run.py --verify-resume."""

import pytest
import resume
from rich.console import Console

import fmnist_jax as fm
from fmnist_jax.recipes import CLAIMS

EXPECTED = {"a: x": "1", "a: y": "2"}


@pytest.mark.parametrize("found", [EXPECTED, {"a: x": "1"}, {"a: x": "1", "a: y": "3"}])
def test_any_difference_is_reported(found, capsys):
    is_equal = resume._print_comparison(EXPECTED, found, Console(), 0.0)
    assert is_equal == (found == EXPECTED)
    assert ("different: a: y" in capsys.readouterr().out) == (not is_equal)


def test_failed_run_raises():
    with pytest.raises(fm.errors.VerificationError, match=r"(?s)status 2 before .*unrecognized"):
        resume.verify("valid_2x2", Console(quiet=True), ["--unknown"])


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
