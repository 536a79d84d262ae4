"""`fit_seeds`: the same recipe from many seeds, one run after the other in one compiled program."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fmnist_jax.config import Run
from fmnist_jax.data.sources import Dataset
from fmnist_jax.errors import ConfigError, DamagedFileError
from fmnist_jax.runs import files
from fmnist_jax.runs.fit import Result, fit
from fmnist_jax.runs.writers import ConsoleProgress, NullProgress

# What is averaged over the runs: figures of report.json.
FIGURES = ("test_accuracy", "val_accuracy", "train_accuracy", "tta_accuracy", "test_loss")


class SeedsResult(NamedTuple):
    """What many runs come to.

    Attributes:
      results: of each run, in the order of the seeds.
      report: the content of seeds.json.
    """

    results: list[Result]
    report: dict[str, Any]


def fit_seeds(
    run: Run,
    dataset: Dataset,
    count: int,
    *,
    progress: NullProgress | None = None,
) -> SeedsResult:
    """Trains from the seeds S, S + 1, ..., S + count - 1, where S is the run's, and summarizes.

    Each seed has a run of its own in a folder of its own, `seed-5` and so on in the run's; it is
    the run that `fit` makes of that seed, bit for bit. So it goes on where it was stopped, and more
    seeds can be added later. The runs follow one another and share one compiled program: on two
    CPU cores, with other work beside, four seeds of `small_dropout` under one `vmap` took 1.3 to
    1.6 times as long. Accelerators were not measured.

    Args:
      run: recipe, first seed and folder.
      dataset: the data.
      count: number of seeds, at least 1.
      progress: as for `fit`.

    Returns:
      The results of all runs and their summary, which is in `seeds.json` as well.

    Raises:
      ConfigError: if the count is below 1, or the last seed is above 2**32 - 1.
      Interrupted: as for `fit`, which has all its other errors as well.

    Example:
      >>> import tempfile, fmnist_jax as fm
      >>> recipe = dataclasses.replace(fm.RECIPES["valid_2x2"], epochs=1)
      >>> run = fm.Run(recipe=recipe, workdir=Path(tempfile.mkdtemp()), train_examples=200)
      >>> data = fm.load_fashion_mnist(sample=True)
      >>> result = fit_seeds(run, data, 2, progress=NullProgress())
      >>> result.report["seeds"], len(result.report["test_accuracy"]["values"])
      ([0, 1], 2)
    """
    if isinstance(count, bool) or not (isinstance(count, int) and count >= 1):
        raise ConfigError(f"count is {count!r}; it must be a whole number of at least 1")
    progress = progress or ConsoleProgress()
    runs = [seed_run(run, run.seed + index) for index in range(count)]
    results = []
    for index, one in enumerate(runs):
        progress.say(f"Seed {run.seed + index}, {index + 1} of {count}:")
        results.append(fit(one, dataset, progress=_Part(progress, index, count)))
    report = summarize([one.workdir for one in runs])
    report["seeds"] = [one.seed for one in runs]
    files.write_json(run.workdir / files.SEEDS, report)
    return SeedsResult(results, report)


def seed_run(run: Run, seed: int) -> Run:
    """The run of one seed among many, in a folder of its own.

    Example:
      >>> import fmnist_jax as fm
      >>> run = fm.Run(recipe=fm.RECIPES["same_3x3"], workdir=Path("runs/mine"))
      >>> one = seed_run(run, 7)
      >>> one.seed, one.workdir.name
      (7, 'seed-7')
    """
    return dataclasses.replace(run, seed=seed, workdir=run.workdir / f"seed-{seed}")


def summarize(workdirs: Sequence[Path]) -> dict[str, Any]:
    """Means and intervals over complete runs, and the ensemble of their networks.

    Args:
      workdirs: their folders, at least one.

    Returns:
      For each of `FIGURES` its mean, standard deviation, 95% t and bootstrap intervals and the
      values; the scores of the ensemble, which averages the networks' probabilities; the hash of
      each run's parameters; all ready for JSON.

    Raises:
      DamagedFileError: if a file cannot be read.
    """
    # Imported here, because scikit-learn takes a second.
    from fmnist_jax.analysis import calibration, scores, stats

    reports = [read_report(workdir) for workdir in workdirs]
    summary: dict[str, Any] = {
        "sample": reports[0]["sample"],
        "arch": reports[0]["arch"],
        "recipe": reports[0]["recipe"],
        "data": reports[0]["data"],
    }
    for name in FIGURES:
        values = [report[name] for report in reports]
        summary[name] = None if None in values else stats.describe(values)
    predictions = [files.read_arrays(workdir / files.PREDICTIONS) for workdir in workdirs]
    logits = ensemble_logits([one["logits"] for one in predictions])
    labels = predictions[0]["labels"]
    ensemble = scores.score(logits, labels, summary["data"]["classes"])
    summary["ensemble"] = {
        "accuracy": ensemble.accuracy,
        "loss": ensemble.loss,
        "calibration": calibration.describe({"logits": logits, "labels": labels}),
    }
    summary["runs"] = [str(workdir.name) for workdir in workdirs]
    summary["params_sha256"] = [report["params_sha256"] for report in reports]
    return summary


def ensemble_logits(logits: Sequence[np.ndarray]) -> np.ndarray:
    """Log of the mean probability.

    Args:
      logits: float[n, num_classes] of each network.

    Returns:
      float64[n, num_classes].

    Example:
      >>> certain = np.array([[100.0, 0.0]])
      >>> np.exp(ensemble_logits([certain, -certain])).round(2).tolist()
      [[0.5, 0.5]]
    """
    stacked = np.stack(logits).astype(np.float64)
    log_probabilities = stacked - np.logaddexp.reduce(stacked, axis=2, keepdims=True)
    return np.logaddexp.reduce(log_probabilities, axis=0) - np.log(len(logits))


def read_report(workdir: Path) -> dict[str, Any]:
    """The report of a complete run.

    Raises:
      DamagedFileError: if it is not complete, or cannot be read.
    """
    report = files.read_json(workdir / files.REPORT)
    if report is None:
        raise DamagedFileError(f"{workdir} has no {files.REPORT}; the run is not complete")
    return report


class _Part(NullProgress):
    """Shows one of several runs as a part of them all."""

    def __init__(self, whole: NullProgress, index: int, count: int) -> None:
        self._whole, self._index, self._count = whole, index, count
        self._before = 0

    def say(self, text: str) -> None:
        self._whole.say(text)

    def start(self, *, step: int, total_steps: int) -> None:
        self._before = self._index * total_steps
        self._whole.start(step=self._before + step, total_steps=self._count * total_steps)

    def update(self, *, step: int, epoch: int, images_per_second: float, loss: float) -> None:
        self._whole.update(
            step=self._before + step, epoch=epoch, images_per_second=images_per_second, loss=loss
        )

    def evaluate(self, *, split: str, num_done: int, num_images: int) -> None:
        self._whole.evaluate(split=split, num_done=num_done, num_images=num_images)

    def epoch(self, *, epoch: int, train: dict[str, Any], val: dict[str, Any] | None) -> None:
        self._whole.epoch(epoch=epoch, train=train, val=val)

    def stop(self) -> None:
        self._whole.stop()
