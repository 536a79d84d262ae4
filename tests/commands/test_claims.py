"""claims.py: verdicts and the table."""

import json

import pytest

import fmnist_jax as fm
from fmnist_jax.commands import claims as claims_command
from fmnist_jax.commands import shell
from fmnist_jax.recipes import CLAIMS
from tests.commands.conftest import SMALL


@pytest.mark.parametrize(
    ("claim", "low", "high", "expected"),
    [
        (0.9, 0.8, 0.95, "claim within"),
        (0.9, 0.91, 0.95, "claim below"),
        (0.9, 0.8, 0.89, "claim above"),
        (None, 0.8, 0.89, "no claim"),
        (0.9, float("nan"), float("nan"), "one run has no interval"),
    ],
)
def test_verdicts(claim, low, high, expected):
    claim = CLAIMS["same_3x3"]._replace(test_accuracy=claim)
    assert claims_command.verdict(claim, low, high) == expected
    other = claim._replace(not_comparable="other classes")
    assert claims_command.verdict(other, low, high) == "not comparable: other classes"


def test_claimed_accuracies_are_those_of_the_texts():
    assert set(CLAIMS) <= set(fm.RECIPES)
    for claim in CLAIMS.values():
        assert (claim.test_accuracy is None) == ("test" not in claim.text)
        if claim.test_accuracy is not None:
            assert f"{100 * claim.test_accuracy:g}%" in claim.text


def test_table_has_means_and_intervals(tmp_path, capsys):
    command = [*SMALL, "--arch", "valid_2x2", "--seeds", "2", "--workdir", str(tmp_path)]
    assert claims_command.main(command) == 0
    assert "verdict" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "claims.json").read_text())
    assert row["verdict"] == "no claim"
    assert row["classes"] == ["Bag", "Trouser"]
    assert (row["recipe"]["epochs"], row["test_accuracy"]["n"]) == (1, 2)
    lines = (tmp_path / "claims.md").read_text().splitlines()
    assert lines[0].startswith("| network | claim |")
    mean, low, high = (row["test_accuracy"][name] for name in ("mean", "low", "high"))
    assert f"| 2 | {mean:.2%} ({low:.2%} to {high:.2%}) |" in lines[2]
    assert lines[-1] == shell.SAMPLE_NOTE


def test_bad_settings_are_refused_before_training(error_line, monkeypatch):
    monkeypatch.setattr(fm, "fit_seeds", None)
    arguments = ["--sample", "--arch", "small_dropout", "he_stack", "--dropout", "0.1"]
    assert claims_command.main(arguments) == 2
    assert "he_stack has no dropout" in error_line()
    assert claims_command.main(["--sample", "--arch", "resnet"]) == 2
    assert "unknown recipe 'resnet'" in error_line()
