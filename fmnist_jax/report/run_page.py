"""Plots and report.html, made from the files of a finished run and nothing else."""

import dataclasses
import html
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from scipy.special import softmax

from fmnist_jax.analysis import calibration
from fmnist_jax.config import differences
from fmnist_jax.errors import DamagedFileError
from fmnist_jax.recipes import RECIPES
from fmnist_jax.report import page
from fmnist_jax.runs import files
from fmnist_jax.runs.replay import Replay

# Blue for training, orange for validation, in every plot; told apart by the colour-blind as well.
_TRAIN, _VAL = "#2563eb", "#ea7317"
_PLOTS = "plots"


def write_report(workdir: Path) -> Path:
    """Draws the plots of a finished run into `plots/` and writes `report.html`.

    Args:
      workdir: a folder in which `fit` has finished.

    Returns:
      The path of the page. It needs no other file.

    Raises:
      DamagedFileError: if the run is not finished, or one of its files cannot be read.
    """
    report = files.read_json(workdir / files.REPORT)
    if report is None:
        raise DamagedFileError(f"{workdir / files.REPORT} is not there: no finished run")
    history = files.read_lines(workdir / files.METRICS)
    predictions = files.read_arrays(workdir / files.PREDICTIONS)
    examples = files.read_arrays(workdir / files.EXAMPLES)

    (workdir / _PLOTS).mkdir(exist_ok=True)
    smoothed = ", smoothed labels" if report["recipe"]["label_smoothing"] else ""
    draw: dict[str, Callable[[], Figure]] = {
        "loss": lambda: _curve(history, "loss", "loss in nats", smoothed),
        "accuracy": lambda: _curve(history, "accuracy", "accuracy"),
        "reliability": lambda: _reliability(report, predictions),
        "risk": lambda: _risk(predictions),
        "confusion": lambda: _confusion(report),
        "samples": lambda: _samples(report, examples),
        "augmented": lambda: _augmented(examples),
        "worst": lambda: _worst(report, predictions, examples),
    }
    if "augmented" not in examples:
        del draw["augmented"]
    images = {}
    with mpl.rc_context(page.STYLE):
        for name, make in draw.items():
            path = workdir / _PLOTS / f"{name}.png"
            save_figure(path, make(), sample=report["sample"])
            images[name] = path.read_bytes()

    written = workdir / "report.html"
    files.write_bytes(written, _page(report, history, images).encode())
    return written


def write_replay(
    workdir: Path, shown: Replay, class_names: Sequence[str], *, sample: bool = False
) -> Path:
    """Draws the images that one update saw into `plots/`, with labels and losses.

    Args:
      workdir: the run's folder.
      shown: what `replay` returned.
      class_names: one a class.
      sample: whether the run was on the embedded sample.

    Returns:
      The path of the picture.
    """
    columns = 8
    rows = -(-len(shown.labels) // columns)
    with mpl.rc_context(page.STYLE):
        figure = Figure(figsize=(1.3 * columns, 1.65 * rows), layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False)
        for axes in grid.flat:
            axes.axis("off")
        for axes, image, example, label, loss in zip(
            grid.flat, shown.images, shown.examples, shown.labels, shown.losses, strict=False
        ):
            _show(axes, image, brightest=1)
            axes.set_title(f"{example}\n{class_names[label]}\nloss {loss:.2f}", fontsize=7)
        path = workdir / _PLOTS / f"replay-{shown.step}.png"
        path.parent.mkdir(exist_ok=True)
        save_figure(path, figure, sample=sample)
    return path


def save_figure(path: Path, figure: Figure, *, sample: bool = False) -> None:
    """Writes a picture, with a mark that nobody can miss where it shows the embedded sample."""
    if sample:
        figure.text(
            0.5, 0.5, "EMBEDDED SAMPLE", rotation=25, ha="center", va="center",
            fontsize=34, color="#dc2626", alpha=0.18,
        )  # fmt: skip
    figure.savefig(path, dpi=144)


def most_confused(report: dict[str, Any], count: int = 8) -> list[tuple[str, str, int]]:
    """The pairs of classes that are taken for each other most often, both ways added.

    Example:
      >>> most_confused({"data": {"classes": ["a", "b", "c"]},
      ...                "confusion_matrix": [[9, 2, 0], [1, 8, 1], [0, 0, 10]]}, count=2)
      [('a', 'b', 3), ('b', 'c', 1)]
    """
    names, matrix = report["data"]["classes"], np.array(report["confusion_matrix"])
    mistakes = matrix + matrix.T
    pairs = [
        (names[i], names[j], int(mistakes[i, j]))
        for i in range(len(names))
        for j in range(i + 1, len(names))
        if mistakes[i, j]
    ]
    return sorted(pairs, key=lambda pair: -pair[2])[:count]


def _curve(history: list[dict[str, Any]], metric: str, label: str, smoothed: str = "") -> Figure:
    figure = Figure(figsize=(4.6, 3.4), layout="constrained")
    axes = figure.subplots()
    for split, name, color in (
        ("train", f"training, dropout on{smoothed}", _TRAIN),
        ("val", "validation", _VAL),
    ):
        lines = [line for line in history if line["split"] == split]
        epochs, values = [line["epoch"] for line in lines], [line[metric] for line in lines]
        axes.plot(epochs, values, color=color, marker="o", markersize=3, label=name)
    axes.set_xlabel("epoch")
    axes.set_ylabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if metric == "accuracy":
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.legend(frameon=False)
    return figure


def _reliability(report: dict[str, Any], predictions: dict[str, np.ndarray]) -> Figure:
    """Share of right predictions by confidence, before and after temperature scaling."""
    figure = Figure(figsize=(4.6, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color=page.INK, linewidth=1, linestyle=":")
    temperature = report["calibration"]["temperature"]
    for name, scale, color in (("as it is", 1, _TRAIN), ("scaled", temperature, _VAL)):
        if scale is None:
            continue
        bins = calibration.reliability(predictions["logits"] / scale, predictions["labels"])
        # Of fewer images the share is mostly chance.
        shown = bins.num_examples >= 10
        label = name if scale == 1 else f"{name} by {1 / scale:.2f}"
        axes.plot(
            bins.confidence[shown], bins.accuracy[shown], color=color, marker="o", markersize=4,
            label=label,
        )  # fmt: skip
    axes.set_xlabel("confidence")
    axes.set_ylabel("accuracy")
    axes.legend(frameon=False)
    return figure


def _risk(predictions: dict[str, np.ndarray]) -> Figure:
    """Share of mistakes among the images that the network is surest of."""
    curve = calibration.risk_coverage(predictions["logits"], predictions["labels"])
    figure = Figure(figsize=(4.6, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.plot(curve.coverage, curve.risk, color=_TRAIN)
    axes.set_xlabel("coverage, the surest images first")
    axes.set_ylabel("mistakes among them")
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_ylim(bottom=0)
    return figure


def _confusion(report: dict[str, Any]) -> Figure:
    names, matrix = report["data"]["classes"], np.array(report["confusion_matrix"])
    shares = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    side = 2.2 + 0.48 * len(names)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    axes.grid(visible=False)
    # The square root keeps the few mistakes visible beside the many hits.
    axes.imshow(np.sqrt(shares), cmap="Blues", vmin=0, vmax=1)
    for i, row in enumerate(matrix):
        for j, number in enumerate(row):
            if number:
                color = "white" if np.sqrt(shares[i, j]) > 0.6 else page.INK
                axes.text(j, i, f"{number:,}", ha="center", va="center", fontsize=8, color=color)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("predicted")
    axes.set_ylabel("label")
    axes.tick_params(length=0)
    return figure


def _samples(report: dict[str, Any], examples: dict[str, np.ndarray]) -> Figure:
    names, labels = report["data"]["classes"], examples["sample_labels"]
    rows = [examples["sample_images"][labels == label] for label in range(len(names))]
    columns = max(len(row) for row in rows)
    figure = Figure(figsize=(1.3 + 0.7 * columns, 0.7 * len(names)), layout="constrained")
    grid = figure.subplots(len(names), columns, squeeze=False)
    for axes_row, row, name in zip(grid, rows, names, strict=True):
        for axes in axes_row:
            axes.axis("off")
        for axes, image in zip(axes_row, row, strict=False):
            _show(axes, image)
        axes_row[0].text(-0.15, 0.5, name, transform=axes_row[0].transAxes, ha="right", va="center")
    return figure


def _augmented(examples: dict[str, np.ndarray]) -> Figure:
    originals, versions = examples["originals"], examples["augmented"]
    columns = 1 + versions.shape[1]
    figure = Figure(figsize=(1.3 * columns, 1.3 * len(originals) + 0.3), layout="constrained")
    grid = figure.subplots(len(originals), columns, squeeze=False)
    for axes_row, original, row in zip(grid, originals, versions, strict=True):
        for axes, image in zip(axes_row, [original / 255, *row], strict=True):
            _show(axes, image, brightest=1)
    grid[0, 0].set_title("original", fontsize=10)
    for number, axes in enumerate(grid[0, 1:], start=1):
        axes.set_title(f"epoch {number}", fontsize=10)
    return figure


def _worst(
    report: dict[str, Any], predictions: dict[str, np.ndarray], examples: dict[str, np.ndarray]
) -> Figure:
    names = report["data"]["classes"]
    probabilities = softmax(predictions["logits"].astype(np.float64), axis=1)
    row_of = {int(index): row for row, index in enumerate(predictions["indices"])}
    indices = examples["worst_indices"]
    columns = 5
    figure = Figure(figsize=(9, 2.35 * -(-len(indices) // columns)), layout="constrained")
    grid = figure.subplots(-(-len(indices) // columns), columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes, image, index in zip(grid.flat, examples["worst_images"], indices, strict=False):
        row = row_of[int(index)]
        predicted = probabilities[row].argmax()
        _show(axes, image)
        axes.set_title(
            f"test image {index}\n{names[predictions['labels'][row]]}\n"
            f"taken for {names[predicted]} ({probabilities[row, predicted]:.0%})",
            fontsize=8,
        )
    return figure


def _show(axes: Any, image: np.ndarray, brightest: float = 255) -> None:
    axes.imshow(image, cmap="gray_r", vmin=0, vmax=brightest, interpolation="nearest")
    axes.axis("off")


def _page(report: dict[str, Any], history: list[dict[str, Any]], images: dict[str, bytes]) -> str:
    recipe = report["recipe"]
    figures = [
        ("main", f"{report['test_accuracy']:.2%}", "test accuracy"),
        ("", _percent(report["val_accuracy"]), "validation accuracy"),
        ("", _percent(report["train_accuracy"]), "training accuracy, last epoch"),
        ("", f"{report['test_loss']:.3f}", "test loss in nats"),
        ("", f"{report['params']:,}", "parameters"),
        ("", f"{report['images_per_second']:,.0f}", "training images a second"),
    ]
    titles = {
        "confusion": "Confusion matrix on the test images",
        "samples": "Training images by class",
        "augmented": "Originals and what the first epochs saw of them",
        "worst": "Test images with the highest losses",
    }
    body = [
        '<p class="warning">Trained and tested on the embedded sample of Fashion-MNIST (6,000 and '
        "1,000 images). These accuracies are no results.</p>"
        if report["sample"]
        else "",
        f"<h1>{html.escape(report['arch'])}</h1>",
        f'<p class="soft">{html.escape(_sentence(report))}</p>',
        page.figures(figures),
        page.section(
            "Beside the original",
            page.facts(
                {
                    "Keras project": recipe["source"],
                    "It claims": recipe["claim"],
                    "Here": f"test {report['test_accuracy']:.2%}, "
                    f"validation {_percent(report['val_accuracy'])}, "
                    f"training {_percent(report['train_accuracy'])}; one run, last epoch",
                    "Left open there, decided here": recipe["open_choices"],
                    "Other than in the recipe": "; ".join(_changes(report)) or "nothing",
                }
            ),
        )
        if recipe["source"]
        else "",
        page.section(
            "Loss and accuracy",
            '<div class="pair">'
            + page.image(images["loss"], "Loss of training and validation by epoch")
            + page.image(images["accuracy"], "Accuracy of training and validation by epoch")
            + "</div>",
        ),
        page.section(
            "How far its probabilities can be trusted",
            '<div class="pair">'
            + page.image(images["reliability"], "Accuracy on the test images by confidence")
            + page.image(images["risk"], "Mistakes among the images that it is surest of")
            + "</div>"
            + page.facts(_trust(report)),
        ),
        page.section("By class, on the test images", _class_table(report)),
        _picture("confusion", titles, images),
        page.section("Most confused pairs", _pairs_table(report)),
        *(_picture(name, titles, images) for name in ("worst", "samples", "augmented")),
        page.section("How it was made", page.facts(_settings(report, history))),
    ]
    return page.page(f"{report['arch']}: {report['test_accuracy']:.2%} on Fashion-MNIST", body)


def _sentence(report: dict[str, Any]) -> str:
    data = report["data"]
    return (
        f"{len(data['classes'])} classes of Fashion-MNIST; {report['epochs']} epochs over "
        f"{data['train']:,} images, {data['val']:,} for validation; the {data['test']:,} test "
        f"images were looked at once, at the end. Seed {report['seed']}."
    )


def _changes(report: dict[str, Any]) -> list[str]:
    """What a run has changed in the recipe of its network."""
    own = RECIPES.get(report["arch"])
    if own is None:
        return []
    return differences(dataclasses.asdict(own), report["recipe"], ("in the recipe", "here"))


def _settings(report: dict[str, Any], history: list[dict[str, Any]]) -> dict[str, str]:
    recipe = report["recipe"]
    return {
        "Optimizer": f"{recipe['optimizer']}, learning rate {recipe['learning_rate']:g}, "
        f"{recipe['schedule']} schedule, batches of {recipe['batch_size']}",
        "Augmentation": recipe["augmentation"],
        "Seeds": f"{report['seed']}"
        + "".join(f", {name} {seed}" for name, seed in report["stream_seeds"].items()),
        "Left out of training and validation": f"{report['data']['excluded']:,} images",
        "Updates": f"{report['steps']:,} in {len({line['epoch'] for line in history})} epochs",
        "Time": f"{report['train_seconds']:,.0f} s training, "
        f"{report['compile_seconds']:.1f} s compiling, on {report['device']}",
        "Data": f"{report['data']['source']}, SHA-256 {report['data']['sha256']}",
        "Parameters' SHA-256": report["params_sha256"],
        "Versions": ", ".join(f"{name} {number}" for name, number in report["versions"].items()),
    }


def _trust(report: dict[str, Any]) -> dict[str, str]:
    figures = report["calibration"]
    texts = {
        "Expected calibration error": f"{figures['ece']:.2%}, 95% interval "
        f"{figures['ece_low']:.2%} to {figures['ece_high']:.2%}; 15 bins",
        "Area under risk and coverage": f"{figures['aurc']:.4f}",
        "Mean of six views of each test image": f"test accuracy {report['views_accuracy']:.2%}",
    }
    if figures["temperature"] is not None:
        texts["Logits over the temperature that fits validation best"] = (
            f"temperature {figures['temperature']:.3f}: expected calibration error "
            f"{figures['ece_scaled']:.2%}, test loss {figures['loss_scaled']:.3f} nats"
        )
    return texts


def _picture(name: str, titles: dict[str, str], images: dict[str, bytes]) -> str:
    if name not in images:
        return ""
    return page.section(titles[name], page.image(images[name], titles[name], kind="wide"))


def _class_table(report: dict[str, Any]) -> str:
    return page.table(
        ["class", "precision", "recall", "F1", "images"],
        [
            [
                row["name"],
                *(f"{row[key]:.3f}" for key in ("precision", "recall", "f1")),
                f"{row['support']:,}",
            ]
            for row in report["classes"]
        ],
    )


def _pairs_table(report: dict[str, Any]) -> str:
    return page.table(
        ["pair", "mistakes, both ways"],
        [
            [f"{first} and {second}", f"{number:,}"]
            for first, second, number in most_confused(report)
        ],
    )


def _percent(share: float | None) -> str:
    return "none" if share is None else f"{share:.2%}"
