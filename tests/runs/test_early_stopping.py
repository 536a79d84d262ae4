"""Runs that hooks finish before their last epoch."""

import chex
import pytest

import fmnist_jax as fm
from fmnist_jax.errors import ConfigError
from fmnist_jax.runs import fit as fit_lib
from tests.runs.test_fit import make_run


class Accuracies(fm.Hook):
    """Replaces the validation accuracies, and crashes at an epoch."""

    def __init__(self, values, crash_at=None):
        self.values, self.crash_at, self.last = values, crash_at, 0

    def epoch(self, log):
        log.history[-1]["accuracy"] = self.values[log.epoch - 1]
        self.last = log.epoch
        if log.epoch == self.crash_at:
            raise RuntimeError("crash")


# The first best epoch is the second; ties do not count.
VALUES = [0.1, 0.5, 0.4, 0.5, 0.3, 0.9, 0.9]


@pytest.mark.parametrize(("patience", "epochs"), [(1, 3), (3, 5), (9, 7)])
def test_early_stopping_ends_at_the_same_epoch_after_a_crash(patience, epochs, tmp_path, tiny):
    def fit(workdir, crash_at=None):
        hook = Accuracies(VALUES, crash_at)
        run = make_run(workdir, epochs=7, patience=patience)
        return fm.fit(run, tiny, hooks=[hook]), hook

    result, hook = fit(tmp_path / "straight")
    assert hook.last == epochs
    assert (result.report["epochs"], result.report["steps"]) == (epochs, 3 * epochs)
    for epoch in (2, epochs):
        with pytest.raises(RuntimeError, match="crash"):
            fit(tmp_path / "crashed", epoch)
    resumed, hook = fit(tmp_path / "crashed")
    assert hook.last == epochs
    chex.assert_trees_all_equal(resumed.state, result.state)
    # A finished run returns its results, and trains no further.
    again, hook = fit(tmp_path / "crashed")
    assert hook.last == 0
    chex.assert_trees_all_equal(again.state, result.state)


def test_a_run_that_hooks_finished_is_not_trained_further(tmp_path, tiny, monkeypatch):
    """The process ends between the last checkpoint and the report."""

    class Finish(fm.Hook):
        def epoch(self, log):
            return "finish" if log.epoch == 2 else None

    write_results = fit_lib.write_results
    monkeypatch.setattr(fit_lib, "write_results", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        fm.fit(make_run(tmp_path), tiny, hooks=[Finish()])
    monkeypatch.setattr(fit_lib, "write_results", write_results)
    result = fm.fit(make_run(tmp_path), tiny, hooks=())
    assert (result.report["steps"], len(result.history)) == (6, 4)


def test_patience_needs_validation_images(tmp_path):
    with pytest.raises(ConfigError, match="patience is 3, but val_fraction is 0"):
        make_run(tmp_path, patience=3, val_fraction=0.0)
