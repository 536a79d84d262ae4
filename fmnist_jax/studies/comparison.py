"""`compare`: two recipes over the same seeds."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fmnist_jax.config import ADDED
from fmnist_jax.differences import differences_message, list_differences
from fmnist_jax.errors import ConfigError
from fmnist_jax.runs import files
from fmnist_jax.studies.seeds import MACRO_FIGURES


def compare(runs_a: Sequence[Path | str], runs_b: Sequence[Path | str]) -> dict[str, Any]:
    """Compares the test accuracies of finished runs of two recipes, paired by seed.

    Args:
      runs_a: folders of the runs of the first recipe, one per seed.
      runs_b: folders of the runs of the second. Seeds that only one side has are ignored.

    Returns:
      A dictionary for a JSON file: `seeds`; `a` and `b`, the recipes and their test accuracies;
      `differs_in`, the settings that differ; `difference`, b minus a, with its 95% interval;
      `macro_differences`, the same of balanced accuracy, macro F1 and area under the ROC curve;
      `sign_flip_p`, the p-value of the paired test over seeds, and `sign_flip_smallest`, the
      smallest p-value that so many seeds allow; `mcnemar`, the test over images; and, for a paired
      t test at the 5% level with a power of 80%, `minimum_detectable_effect` with so many seeds,
      and `seeds_needed` to detect the observed difference. The last two are None where they are
      undefined, and so are the tests over seeds for a single seed.

    Raises:
      ConfigError: if the sides have no seed in common, or a side has a seed twice, runs with
        different settings, or runs with different test images.
      DamagedFileError: if a run is not finished, or a file of it cannot be read.
    """
    from fmnist_jax.analysis import stats  # here, because scipy.stats takes half a second

    sides = _by_seed(_paths(runs_a)), _by_seed(_paths(runs_b))
    seeds = sorted(set(sides[0]) & set(sides[1]))
    if not seeds:
        raise ConfigError(
            f"the first runs have the seeds {sorted(sides[0])} and the second {sorted(sides[1])}; "
            "runs are paired by seed; both sides need a common seed"
        )
    a, b = ([side[seed] for seed in seeds] for side in sides)
    for run in (*a, *b):
        if not np.array_equal(run.indices, a[0].indices):
            raise ConfigError(
                f"{run.workdir} was tested on different images than {a[0].workdir}; compare runs "
                "with the same data and classes"
            )
    correct_a, correct_b = (np.array([run.correct for run in side]) for side in (a, b))
    # Differences of counts: those of rounded accuracies would vary where none does.
    gains = (correct_b.sum(axis=1) - correct_a.sum(axis=1)) / correct_a.shape[1]
    difference = stats.summarize(gains.tolist())
    mcnemar = stats.mcnemar(correct_a, correct_b)
    mean, std, several = difference["mean"], difference["std"], len(seeds) > 1
    return {
        "sample": a[0].report["sample"],
        "seeds": seeds,
        **{
            name: {
                "arch": side[0].report["arch"],
                "recipe": side[0].report["recipe"],
                "test_accuracy": stats.summarize([run.report["test_accuracy"] for run in side]),
            }
            for name, side in (("a", a), ("b", b))
        },
        "differs_in": list_differences(_complete(a[0]), _complete(b[0]), ("in a", "in b")),
        "difference": difference,
        "macro_differences": {name: _difference(name, a, b) for name in MACRO_FIGURES},
        "sign_flip_p": stats.sign_flip_test(gains) if several else None,
        "sign_flip_smallest": stats.smallest_sign_flip_p(len(seeds)) if several else None,
        "mcnemar": {"only_a_right": mcnemar.only_a, "only_b_right": mcnemar.only_b, "p": mcnemar.p},
        "minimum_detectable_effect": (
            stats.minimum_detectable_effect(std, len(seeds)) if std else None
        ),
        "seeds_needed": stats.seeds_needed(std, mean) if std and mean else None,
    }


def _difference(name: str, a: Sequence["_Run"], b: Sequence["_Run"]) -> dict[str, Any] | None:
    """Summarizes b minus a of a value of report.json; None if a run does not have it."""
    from fmnist_jax.analysis import stats

    values: list[list[Any]] = [[run.report.get(name) for run in side] for side in (a, b)]
    if None in values[0] + values[1]:
        return None
    return stats.summarize([second - first for first, second in zip(*values, strict=True)])


def _complete(run: "_Run") -> dict[str, Any]:
    """Returns the settings of a run, with the defaults that its config.json leaves out."""
    return files.without_sources(run.settings) | {"recipe": ADDED | run.settings["recipe"]}


def _paths(runs: Sequence[Path | str]) -> list[Path]:
    if isinstance(runs, str | Path):
        raise ConfigError(f"{runs} is one folder; pass a list with the folder of each seed")
    return [Path(run) for run in runs]


class _Run(NamedTuple):
    """A finished run: its settings without the seed, and which test images it got right."""

    workdir: Path
    report: dict[str, Any]
    settings: dict[str, Any]
    indices: np.ndarray
    correct: np.ndarray


def _by_seed(workdirs: Sequence[Path]) -> dict[int, _Run]:
    found: dict[int, _Run] = {}
    for workdir in workdirs:
        run = _read(workdir)
        seed = run.report["seed"]
        if seed in found:
            raise ConfigError(
                f"{found[seed].workdir} and {workdir} both have seed {seed}; pass one run per seed"
            )
        for first in found.values():
            message = differences_message(
                f"{first.workdir} and {workdir} have different settings; the runs of a side must "
                "differ in their seed only:",
                first.settings,
                run.settings,
                ("in the first", "in the second"),
            )
            if message is not None:
                raise ConfigError(message)
        found[seed] = run
    return found


def _read(workdir: Path) -> _Run:
    report = files.read_results(workdir / files.REPORT)
    settings = dict(files.read_json(workdir / files.CONFIG) or {})
    settings.pop("seed", None)
    predictions = files.read_arrays(workdir / files.PREDICTIONS)
    correct = predictions["logits"].argmax(axis=1) == predictions["labels"]
    return _Run(workdir, report, settings, predictions["indices"], correct)
