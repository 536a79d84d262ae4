"""`compare`: two recipes over the same seeds."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fmnist_jax import files
from fmnist_jax.config import ConfigError, differences
from fmnist_jax.seeds import describe, read_report


def compare(runs_a: Sequence[Path], runs_b: Sequence[Path]) -> dict[str, Any]:
    """Compares the test accuracies of complete runs, in pairs of the same seed.

    Args:
      runs_a: folders of the runs of the first recipe, each of another seed.
      runs_b: likewise of the second; seeds that only one of them has are left out.

    Returns:
      `difference`, the mean of second minus first with its 95% intervals; `sign_flip_p`, of the
      paired test over seeds; `mcnemar`, over the pooled test predictions; `smallest_difference`
      that so many seeds would have found in four of five experiments, and `seeds_needed` to find
      this one as often, both None where they cannot be known; `a` and `b`, what was compared. Ready
      for JSON.

    Raises:
      ConfigError: if the runs have no seed in common, one of them twice, or other test images.
      DamagedFileError: if a file of a run cannot be read.
    """
    from fmnist_jax import stats  # imported here: scipy.stats takes half a second

    reports_a, reports_b = _by_seed(runs_a), _by_seed(runs_b)
    seeds = sorted(set(reports_a) & set(reports_b))
    if not seeds:
        raise ConfigError(
            f"the first runs have the seeds {sorted(reports_a)}, the second {sorted(reports_b)}; "
            "only runs of the same seed can be compared"
        )
    sides = [_correct([reports[seed][0] for seed in seeds]) for reports in (reports_a, reports_b)]
    (images_a, correct_a), (images_b, correct_b) = sides
    if not np.array_equal(images_a, images_b):
        raise ConfigError(
            "the runs were tested on other images; compare runs of the same data and classes"
        )
    gains = correct_b.mean(axis=1) - correct_a.mean(axis=1)
    spread = float(gains.std(ddof=1)) if len(seeds) > 1 else 0.0
    mean = float(gains.mean())
    mcnemar = stats.mcnemar(correct_a, correct_b)
    known = spread > 0
    return {
        "seeds": seeds,
        "a": _side(reports_a, seeds),
        "b": _side(reports_b, seeds),
        "differs_in": differences(
            reports_a[seeds[0]][1]["recipe"], reports_b[seeds[0]][1]["recipe"]
        ),
        "difference": describe(gains.tolist()),
        "sign_flip_p": stats.sign_flip_test(gains) if len(seeds) > 1 else None,
        "mcnemar": {
            "only_a_right": mcnemar.only_a,
            "only_b_right": mcnemar.only_b,
            "p": mcnemar.p,
        },
        "smallest_difference": stats.smallest_difference(spread, len(seeds)) if known else None,
        "seeds_needed": stats.seeds_needed(spread, mean) if known and mean else None,
    }


def _by_seed(workdirs: Sequence[Path]) -> dict[int, tuple[Path, dict[str, Any]]]:
    found: dict[int, tuple[Path, dict[str, Any]]] = {}
    for workdir in workdirs:
        report = read_report(workdir)
        seed = report["seed"]
        if seed in found:
            raise ConfigError(f"{found[seed][0]} and {workdir} are both of seed {seed}")
        found[seed] = workdir, report
    return found


def _correct(workdirs: Sequence[Path]) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the test images, and for each run which of them it recognized."""
    predictions = [files.read_arrays(workdir / files.PREDICTIONS) for workdir in workdirs]
    return (
        np.array([one["indices"] for one in predictions]),
        np.array([one["logits"].argmax(axis=1) == one["labels"] for one in predictions]),
    )


def _side(reports: dict[int, tuple[Path, dict[str, Any]]], seeds: Sequence[int]) -> dict[str, Any]:
    first = reports[seeds[0]][1]
    return {
        "arch": first["arch"],
        "recipe": first["recipe"],
        "test_accuracy": describe([reports[seed][1]["test_accuracy"] for seed in seeds]),
    }
