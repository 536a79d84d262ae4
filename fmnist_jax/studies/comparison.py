"""`compare`: two recipes over the same seeds."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fmnist_jax.config import differences
from fmnist_jax.errors import ConfigError
from fmnist_jax.runs import files
from fmnist_jax.studies.seeds import describe, read_report


def compare(runs_a: Sequence[Path], runs_b: Sequence[Path]) -> dict[str, Any]:
    """Compares the test accuracies of complete runs, in pairs of the same seed.

    Args:
      runs_a: folders of the runs of the first recipe, each of another seed.
      runs_b: likewise of the second; seeds that only one of them has are left out.

    Returns:
      `difference`, the mean of second minus first with its 95% intervals over the seeds;
      `sign_flip_p`, of the paired test over seeds, and `sign_flip_smallest`, below which so few
      seeds cannot bring it; `mcnemar`, over the pooled test predictions; `smallest_difference` that
      a paired t test of so many seeds would have found in four of five experiments, and
      `seeds_needed` to find as often a difference as large as this one, if its size and spread are
      the true ones, both None where they cannot be known; `a` and `b`, what was compared, and
      `differs_in`, in which settings. Ready for JSON.

    Raises:
      ConfigError: if the runs have no seed in common, one of them twice, other test images, or
        other settings within a side.
      DamagedFileError: if a file of a run cannot be read.
    """
    from fmnist_jax.analysis import stats  # imported here: scipy.stats takes half a second

    sides = _by_seed(runs_a), _by_seed(runs_b)
    seeds = sorted(set(sides[0]) & set(sides[1]))
    if not seeds:
        raise ConfigError(
            f"the first runs have the seeds {sorted(sides[0])}, the second {sorted(sides[1])}; "
            "only runs of the same seed can be compared"
        )
    a, b = ([side[seed] for seed in seeds] for side in sides)
    for run in (*a, *b):
        if not np.array_equal(run.indices, a[0].indices):
            raise ConfigError(
                f"{run.workdir} was tested on other images than {a[0].workdir}; compare runs of "
                "the same data and classes"
            )
    correct_a, correct_b = (np.array([run.correct for run in side]) for side in (a, b))
    # Counts first: differences of rounded means would vary where nothing does.
    gains = (correct_b.sum(axis=1) - correct_a.sum(axis=1)) / correct_a.shape[1]
    spread = float(gains.std(ddof=1)) if len(seeds) > 1 and len(set(gains)) > 1 else 0.0
    mean = float(gains.mean())
    mcnemar = stats.mcnemar(correct_a, correct_b)
    return {
        "sample": a[0].report["sample"],
        "seeds": seeds,
        "a": _side(a),
        "b": _side(b),
        "differs_in": differences(a[0].settings, b[0].settings, ("in a", "in b")),
        "difference": describe(gains.tolist()),
        "sign_flip_p": stats.sign_flip_test(gains) if len(seeds) > 1 else None,
        "sign_flip_smallest": 2.0 ** (1 - len(seeds)) if len(seeds) > 1 else None,
        "mcnemar": {
            "only_a_right": mcnemar.only_a,
            "only_b_right": mcnemar.only_b,
            "p": mcnemar.p,
        },
        "smallest_difference": stats.smallest_difference(spread, len(seeds)) if spread else None,
        "seeds_needed": stats.seeds_needed(spread, mean) if spread and mean else None,
    }


class _Run(NamedTuple):
    """A complete run: its settings but for the seed, and which test images it recognized."""

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
            raise ConfigError(f"{found[seed].workdir} and {workdir} are both of seed {seed}")
        for first in found.values():
            changed = differences(first.settings, run.settings, ("in the first", "in the second"))
            if changed:
                raise ConfigError(
                    f"{first.workdir} and {workdir} are not of one recipe. They differ in\n"
                    + "\n".join(f"  {line}" for line in changed)
                )
        found[seed] = run
    return found


def _read(workdir: Path) -> _Run:
    report = read_report(workdir)
    settings = dict(files.read_json(workdir / files.CONFIG) or {})
    settings.pop("seed", None)
    predictions = files.read_arrays(workdir / files.PREDICTIONS)
    correct = predictions["logits"].argmax(axis=1) == predictions["labels"]
    return _Run(workdir, report, settings, predictions["indices"], correct)


def _side(runs: Sequence[_Run]) -> dict[str, Any]:
    return {
        "arch": runs[0].report["arch"],
        "recipe": runs[0].report["recipe"],
        "test_accuracy": describe([run.report["test_accuracy"] for run in runs]),
    }
