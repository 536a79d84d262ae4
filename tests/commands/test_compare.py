"""compare.py: which runs it trains, and what it prints."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from fmnist_jax.commands import compare as compare_command
from fmnist_jax.commands import flags, shell
from fmnist_jax.studies.seeds import MACRO_FIGURES
from tests.commands.conftest import SMALL


def test_flags_before_against_apply_to_both_sides():
    first, second = compare_command.parse(
        ["same_3x3", "--epochs", "3", "--seeds", "2", "--against", "he_stack", "--batch-size", "8"]
    )
    a, b = (
        flags.create_run(arguments, arguments.side, Path("w")).recipe
        for arguments in (first, second)
    )
    assert (a.arch, a.epochs, a.batch_size) == ("same_3x3", 3, 32)
    assert (b.arch, b.epochs, b.batch_size) == ("he_stack", 3, 8)
    assert second.seeds == 2


def test_recipes_and_folders_are_compared(tmp_path, capsys):
    sides = ["valid_2x2", *SMALL, "--against", "valid_2x2", "--learning-rate", "0.01"]
    assert compare_command.main([*sides, "--seeds", "2", "--workdir", str(tmp_path / "one")]) == 0
    output = " ".join(capsys.readouterr().out.split())
    for expected in (
        "valid_2x2, seed 1, 4 of 4", "recipe.learning_rate: 0.001 in a, 0.01 in b",
        "b minus a", "sign-flip", "McNemar", shell.SAMPLE_NOTE,
    ):  # fmt: skip
        assert expected in output
    comparison = json.loads((tmp_path / "one" / "comparison.json").read_text())
    assert comparison["seeds"] == [0, 1]
    assert f"{100 * comparison['difference']['mean']:+.2f} points" in output
    for name, text in (("test_balanced_accuracy", "balanced accuracy"), ("test_auc", "AUC")):
        one = comparison["macro_differences"][name]
        assert f"{text} {100 * one['mean']:+.2f} points, 95% interval" in output

    # Trained runs are reused.
    assert compare_command.main([*sides, "--seeds", "2", "--workdir", str(tmp_path / "one")]) == 0
    assert capsys.readouterr().out.count("This run is finished") == 4

    folders = {
        json.loads(path.read_text())["recipe"]["learning_rate"]: path.parents[1]
        for path in (tmp_path / "one").glob("*/seed-0/config.json")
    }
    a, b = folders[0.001], folders[0.01]
    command = [str(a), "--against", str(b), "--workdir", str(tmp_path / "two")]
    assert compare_command.main(command) == 0
    assert json.loads((tmp_path / "two" / "comparison.json").read_text()) == comparison


def test_comparisons_of_earlier_runs_have_no_scores_over_classes():
    estimate = {"mean": 0.01, "std": None, "low": None, "high": None, "n": 1}
    comparison: dict[str, Any] = {
        "a": {"test_accuracy": estimate}, "b": {"test_accuracy": estimate}, "differs_in": [],
        "difference": estimate, "sign_flip_p": None, "minimum_detectable_effect": None,
        "mcnemar": {"p": 1.0, "only_a_right": 0, "only_b_right": 0},
        "macro_differences": dict.fromkeys(MACRO_FIGURES),
    }  # fmt: skip
    assert not any("classes" in name for name in compare_command._facts(comparison))
    comparison["macro_differences"] |= {"test_auc": estimate, "test_macro_f1": estimate}
    facts = compare_command._facts(comparison)
    assert facts["b minus a"] == "+1.00 points"
    text = "macro F1 +1.00 points\nAUC +1.00 points"
    assert facts["b minus a, means over classes"] == text


@pytest.mark.parametrize(
    ("sides", "message"),
    [
        (["resnet", "--against", "same_3x3"], "'resnet' is neither a folder nor a recipe"),
        (["same_3x3", "--against", "resnet"], "'resnet' is neither a folder nor a recipe"),
        (["same_3x3", "--against", "same_3x3"], "both sides have the same settings"),
        (["same_3x3", "--against", "he_stack", "--epochs", "0"], "epochs is 0"),
        (["same_3x3", "--against", "he_stack", "--dropout", "0.5"], "he_stack has no dropout"),
        (["same_3x3", "--seeds", "0", "--against", "he_stack"], "seeds is 0"),
        (["empty", "--against", "same_3x3"], "empty holds no finished run"),
        (["run", "--against", "run", "--seeds", "2"], "flags do not apply to them"),
        (["run", "--against", "run", "--seed", "2"], "flags do not apply to them"),
        (["run", "--epochs", "2", "--against", "run"], "flags do not apply to them"),
        (["run", "--against", "same_3x3"], "compare two folders or two recipes"),
        (["same_3x3", "--against", "run"], "compare two folders or two recipes"),
    ],
)
def test_bad_input_is_refused_before_training(sides, message, tmp_path, monkeypatch, error_line):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(flags, "create_executor", None)
    (tmp_path / "empty").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "report.json").write_text("{}")
    assert compare_command.main([*sides, "--sample"]) == 2
    assert message in error_line()


@pytest.mark.parametrize(
    "arguments",
    [
        ["same_3x3"], ["same_3x3", "--against"], ["same_3x3", "--against=he_stack"],
        ["--against", "he_stack"],
    ],
)  # fmt: skip
def test_bad_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        compare_command.main(arguments)
    assert caught.value.code == 2
    assert re.fullmatch("error: .*; --help shows all flags\n", capsys.readouterr().err)
