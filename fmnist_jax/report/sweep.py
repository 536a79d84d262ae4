"""sweep.html from the files of a sweep."""

from pathlib import Path

from fmnist_jax.analysis import plots
from fmnist_jax.report.render import missing_values_as_damage, write_page
from fmnist_jax.runs import files
from fmnist_jax.studies.sweep import SWEEP, load_study


def write_sweep_report(workdir: Path) -> Path:
    """Draws trials and importances of the settings, writes `sweep.html` and returns its path.

    Raises:
      ConfigError: if Optuna is not installed.
      DamagedFileError: if `sweep` has not finished there, or a file cannot be read.
    """
    report = files.read_results(workdir / SWEEP)
    with missing_values_as_damage(workdir):
        trials, space, sample = report["trials"], report["space"], report["sample"]
        figures = {
            "history": plots.trial_history(trials),
            "settings": plots.trial_settings(trials, space),
        }
        values = {trial["val_accuracy"][-1] for trial in trials if trial["state"] == "COMPLETE"}
        # Importances need two settings and some variance.
        if len(values) > 2 and len(space) > 1:
            with load_study(workdir) as study:
                from optuna.importance import FanovaImportanceEvaluator, get_param_importances

                evaluator = FanovaImportanceEvaluator(seed=0)
                importances = get_param_importances(study, evaluator=evaluator)
            figures["importance"] = plots.importances(importances)
        images = {name: plots.encode(figure, sample=sample) for name, figure in figures.items()}
        with files.locked(workdir, on_wait=lambda: None):  # other processes may share the sweep
            page = workdir / "sweep.html"
            return write_page(page, "sweep", sample=sample, report=report, images=images)
