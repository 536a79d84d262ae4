"""report.html and plots/ from the files of a finished run."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fmnist_jax.analysis import plots
from fmnist_jax.data.sources import is_fashion_mnist
from fmnist_jax.errors import DamagedFileError
from fmnist_jax.nn.summary import format_rows
from fmnist_jax.recipes import CLAIMS, RECIPES
from fmnist_jax.report.render import missing_values_as_damage, write_page
from fmnist_jax.runs import files
from fmnist_jax.runs.replay import Replay

_PLOTS = "plots"


def write_report(workdir: Path) -> Path:
    """Draws the plots of a finished run into `plots/`, writes `report.html` and returns its path.

    Raises:
      DamagedFileError: if the run is not finished, or one of its files cannot be read.
    """
    report = files.read_results(workdir / files.REPORT)
    history = read_history(workdir)
    predictions = files.read_arrays(workdir / files.PREDICTIONS)
    examples = files.read_arrays(workdir / files.EXAMPLES)
    with missing_values_as_damage(workdir):
        names, temperature = report["data"]["classes"], report["calibration"]["temperature"]
        logits, labels = predictions["logits"], predictions["labels"]
        samples = examples["sample_images"], examples["sample_labels"]
        figures = {
            "loss": plots.learning_curve(history, "loss"),
            "accuracy": plots.learning_curve(history, "accuracy"),
            "reliability": plots.reliability_diagram(logits, labels, temperature),
            "risk": plots.risk_coverage_curve(logits, labels),
            "confusion": plots.confusion_matrix(report["confusion_matrix"], names),
            "samples": plots.class_samples(*samples, names),
            "worst": plots.worst_predictions(predictions, examples, names),
        }
        if "augmented" in examples:
            pictures = examples["originals"], examples["augmented"]
            figures["augmented"] = plots.augmented_samples(*pictures)
        network = report.get("network")  # earlier versions did not record it
        if network:
            figures["network"] = plots.network(network)
        is_published = is_fashion_mnist(report["data"]["sha256"])
        sample = report["sample"]
        images = {name: plots.encode(figure, sample=sample) for name, figure in figures.items()}
        page = write_page(
            workdir / "report.html", "run", sample=sample, report=report, images=images,
            claim=CLAIMS.get(report["arch"]) if is_published else None,
            data_name="Fashion-MNIST" if is_published else report["data"]["source"],
            in_color=examples["sample_images"].ndim == 4,
            layers=format_rows(network or []),
            changes=changed_settings(report), pairs=most_confused(report),
        )  # fmt: skip
    (workdir / _PLOTS).mkdir(exist_ok=True)
    for name, image in images.items():
        (workdir / _PLOTS / f"{name}.png").write_bytes(image)
    return page


def write_replay(
    workdir: Path, replay: Replay, class_names: Sequence[str], *, sample: bool = False
) -> Path:
    """Draws a replayed batch into `plots/` and returns the path of the picture.

    Args:
      workdir: the run's folder.
      replay: the result of `fmnist_jax.replay`.
      class_names: one per class.
      sample: whether the run was on the embedded sample.
    """
    path = workdir / _PLOTS / f"replay-{replay.step}.png"
    path.parent.mkdir(exist_ok=True)
    figure = plots.replayed_batch(
        replay.images, replay.examples, replay.labels, replay.losses, class_names
    )
    path.write_bytes(plots.encode(figure, sample=sample))
    return path


def read_history(workdir: Path) -> list[dict[str, Any]]:
    """Reads a run's metrics.jsonl.

    Raises:
      DamagedFileError: if it is missing, empty or damaged.
    """
    history = files.read_lines(workdir / files.METRICS)
    if not history:
        raise DamagedFileError(f"{workdir / files.METRICS} is missing or empty")
    return history


def changed_settings(report: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """Lists (name, value of the recipe, value of the run) of settings that differ.

    Of several recipes of the network, the one with the fewest differences counts.

    Example:
      >>> recipe = dataclasses.asdict(RECIPES["same_3x3"]) | {"epochs": 3}
      >>> changed_settings({"arch": "same_3x3", "recipe": recipe})
      [('epochs', 10, 3)]
    """
    recipes = [dataclasses.asdict(r) for r in RECIPES.values() if r.arch == report["arch"]]
    settings = report["recipe"].items()
    changes = [[(n, r.get(n), v) for n, v in settings if r.get(n) != v] for r in recipes]
    return min(changes, key=len, default=[])


def most_confused(report: dict[str, Any], num_pairs: int = 8) -> list[tuple[str, str, int]]:
    """Lists the pairs of classes that are confused most often, both directions added.

    Example:
      >>> most_confused({"data": {"classes": ["a", "b", "c"]},
      ...                "confusion_matrix": [[9, 2, 0], [1, 8, 1], [0, 0, 10]]}, num_pairs=2)
      [('a', 'b', 3), ('b', 'c', 1)]
    """
    names, matrix = report["data"]["classes"], np.array(report["confusion_matrix"])
    errors = matrix + matrix.T
    pairs = [(names[i], names[j], int(errors[i, j])) for i, j in np.argwhere(np.triu(errors, k=1))]
    return sorted(pairs, key=lambda pair: -pair[2])[:num_pairs]
