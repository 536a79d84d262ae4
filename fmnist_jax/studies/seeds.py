"""`fit_seeds`: one recipe from several seeds, one run after the other in one compiled program."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import numpy as np

from fmnist_jax.config import Run
from fmnist_jax.data.dataset import Dataset
from fmnist_jax.distributed import processes
from fmnist_jax.errors import ConfigError
from fmnist_jax.parts.objects import Parts, with_objects
from fmnist_jax.runs import files
from fmnist_jax.runs.console import ConsoleProgress
from fmnist_jax.runs.fit import Result, fit
from fmnist_jax.studies.executors import Executor, fit_in_turn
from fmnist_jax.train.hooks import Hook

# Values of report.json in which every class counts the same; earlier versions did not have them.
MACRO_FIGURES = ("test_balanced_accuracy", "test_macro_f1", "test_auc")

# Values of report.json that are averaged over the runs.
FIGURES = (
    "test_accuracy",
    "val_accuracy",
    "train_accuracy",
    "tta_accuracy",
    "test_loss",
    *MACRO_FIGURES,
)


class SeedsResult(NamedTuple):
    """Finished runs of several seeds.

    Attributes:
      results: one per seed, in their order.
      report: the content of seeds.json.
    """

    results: list[Result]
    report: dict[str, Any]


def fit_seeds(
    run: Run,
    dataset: Dataset,
    num_seeds: int,
    *,
    hooks: Sequence[Hook] | None = None,
    executor: Executor = fit_in_turn,
    **parts: Unpack[Parts],
) -> SeedsResult:
    """Trains from the seeds S, S + 1, ..., S + num_seeds - 1, where S is the run's seed.

    Each seed is a run of its own, in the subfolder `seed-5` for seed 5, with the same bits as
    `fit` gives for that seed. Interrupted seeds resume, and seeds can be added later. By default
    they are sequential and share one compiled program: on two CPU cores under other load, four
    seeds of `small_dropout` in one `vmap` took 1.3 to 1.6 times as long.

    Args:
      run: recipe, first seed and folder.
      dataset: the data.
      num_seeds: at least 1.
      hooks: as for `fit`.
      executor: trains the runs; see `fmnist_jax.studies.executors`.
      **parts: as for `fit`.

    Returns:
      The results of all runs, and their summary, which is also written to `seeds.json`.

    Raises:
      ConfigError: if num_seeds is below 1, or the last seed is above 2**32 - 1.
      Interrupted: if a signal stopped a run. All other errors of `fit` are raised too.

    Example:
      >>> import tempfile, fmnist_jax as fm
      >>> recipe = dataclasses.replace(fm.RECIPES["valid_2x2"], epochs=1)
      >>> run = fm.Run(recipe=recipe, workdir=Path(tempfile.mkdtemp()), train_examples=200)
      >>> data = fm.load_fashion_mnist(sample=True)
      >>> result = fit_seeds(run, data, 2, hooks=())
      >>> result.report["seeds"], len(result.report["test_accuracy"]["values"])
      ([0, 1], 2)
    """
    run = with_objects(run, len(dataset.class_names), **parts)
    runs = seed_runs(run, num_seeds)
    hooks = [ConsoleProgress()] if hooks is None else hooks
    executor(runs, dataset, hooks)
    results = [fit(one, dataset, hooks=()) for one in runs]  # they are finished

    def write() -> dict[str, Any]:
        report = summarize([one.workdir for one in runs])
        report["seeds"] = [one.seed for one in runs]
        files.write_json(run.workdir / files.SEEDS, report)
        return report

    return SeedsResult(results, processes.on_first(write))


def seed_runs(run: Run, num_seeds: int) -> list[Run]:
    """Returns the runs that `fit_seeds` trains; raises its `ConfigError`."""
    if isinstance(num_seeds, bool) or not (isinstance(num_seeds, int) and num_seeds >= 1):
        raise ConfigError(f"num_seeds is {num_seeds!r}; it must be an integer of at least 1")
    return [
        dataclasses.replace(run, seed=seed, workdir=run.workdir / f"seed-{seed}")
        for seed in range(run.seed, run.seed + num_seeds)
    ]


def summarize(workdirs: Sequence[Path]) -> dict[str, Any]:
    """Summarizes finished runs and the ensemble of their networks.

    Args:
      workdirs: folders of the runs, at least one.

    Returns:
      A dictionary for a JSON file: for each of `FIGURES` its mean, standard deviation, 95%
      interval and values (`stats.summarize`), or None where a run has none; `ensemble`, the scores
      of the mean probabilities; `runs`, the names of the folders; and `params_sha256` of each run.

    Raises:
      DamagedFileError: if a run is not finished, or a file cannot be read.
    """
    # Imported here, because scikit-learn takes a second.
    from fmnist_jax.analysis import calibration, scores, stats

    reports: list[dict[str, Any]] = [
        dict.fromkeys(MACRO_FIGURES) | files.read_results(workdir / files.REPORT)
        for workdir in workdirs
    ]
    summary = {name: reports[0][name] for name in ("sample", "arch", "recipe", "data")}
    for name in FIGURES:
        values = [report[name] for report in reports]
        summary[name] = None if None in values else stats.summarize(values)
    predictions = [files.read_arrays(workdir / files.PREDICTIONS) for workdir in workdirs]
    logits = ensemble_logits([one["logits"] for one in predictions])
    labels = predictions[0]["labels"]
    ensemble = scores.score(logits, labels, summary["data"]["classes"])
    summary["ensemble"] = {
        "accuracy": ensemble.accuracy,
        "loss": ensemble.loss,
        "calibration": calibration.summarize({"logits": logits, "labels": labels}),
    }
    summary["runs"] = [workdir.name for workdir in workdirs]
    summary["params_sha256"] = [report["params_sha256"] for report in reports]
    return summary


def ensemble_logits(logits: Sequence[np.ndarray]) -> np.ndarray:
    """Averages the probabilities of several networks.

    Args:
      logits: float[n, num_classes] of each network.

    Returns:
      float64[n, num_classes], the logarithm of the mean probability.

    Example:
      >>> certain = np.array([[100.0, 0.0]])
      >>> np.exp(ensemble_logits([certain, -certain])).round(2).tolist()
      [[0.5, 0.5]]
    """
    stacked = np.stack(logits).astype(np.float64)
    log_probabilities = stacked - np.logaddexp.reduce(stacked, axis=2, keepdims=True)
    return np.logaddexp.reduce(log_probabilities, axis=0) - np.log(len(logits))
