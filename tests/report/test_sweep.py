"""sweep.html, without training."""

import contextlib
from typing import Any

import pytest

import fmnist_jax as fm
from fmnist_jax.report import sweep
from fmnist_jax.runs import files
from tests.analysis.test_plots import SPACE, TRIALS
from tests.report.conftest import check_self_contained, read_page

optuna = pytest.importorskip("optuna")

REPORT: dict[str, Any] = {
    "sample": False,
    "arch": "small_dropout",
    "space": SPACE,
    "trials": TRIALS,
    "best": {"number": 5, "params": {"learning_rate": 0.0123456}, "val_accuracy": 0.7},
    "val_accuracy": {"n": 2, "mean": 0.6},
    "test_accuracy": {"n": 2, "mean": 0.51, "low": 0.5, "high": 0.52},
    "optimism": {"mean": 0.1, "low": 0.08, "high": 0.12},
}


@contextlib.contextmanager
def load_study(workdir):
    study = optuna.create_study(direction="maximize")
    distributions = {
        "learning_rate": optuna.distributions.FloatDistribution(0.001, 0.1, log=True),
        "optimizer": optuna.distributions.CategoricalDistribution(["adam", "sgd"]),
    }
    for trial in TRIALS:
        if trial["state"] == "COMPLETE":
            values = {"params": trial["params"], "value": trial["val_accuracy"][-1]}
            study.add_trial(optuna.trial.create_trial(distributions=distributions, **values))
    yield study


def test_numbers_are_those_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "load_study", load_study)
    files.write_json(tmp_path / "sweep.json", REPORT)
    page = read_page(sweep.write_sweep_report(tmp_path))
    check_self_contained(page)
    assert "3 trials completed, 2 pruned." in page.words
    assert "2 fresh seeds" in page.words
    assert list(page.numbers.values()) == ["51.00%", "50.00% to 52.00%", "60.00%", "10.00"]
    assert page.fact("Learning rate") == "0.0123"
    assert page.fact("Validation accuracy of trial 5") == "70.00%"
    assert len(page.pictures) == len(set(page.pictures)) == 3


@pytest.mark.parametrize(
    "changes", [{"space": {"optimizer": SPACE["optimizer"]}}, {"trials": TRIALS[:1]}]
)
def test_importances_need_several_settings_and_accuracies(changes, tmp_path):
    files.write_json(tmp_path / "sweep.json", REPORT | changes)
    page = read_page(sweep.write_sweep_report(tmp_path))
    assert not any("Importance" in heading for heading in page.headings)
    assert len(page.pictures) == 2


def test_missing_value_is_named(tmp_path):
    files.write_json(tmp_path / "sweep.json", {**REPORT, "space": {"dropout": SPACE["optimizer"]}})
    with pytest.raises(fm.errors.DamagedFileError, match="dropout"):
        sweep.write_sweep_report(tmp_path)
