"""The figures of the pages, drawn by matplotlib."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, PercentFormatter
from scipy.special import softmax

from fmnist_jax.analysis import calibration
from fmnist_jax.runs.replay import Replay
from fmnist_jax.train.rate_finder import RateCurve

_INK, _GRID = "#1f2937", "#e5e7eb"
# Two hues that color-blind readers can tell apart: training and validation, or before and after.
_FIRST, _SECOND = "#2563eb", "#ea7317"
_EACH_SEED = "#93b4f5"

# Decorates whatever draws, saving included: matplotlib creates ticks and grid lines on saving.
_styled = mpl.rc_context(
    {
        "font.size": 10,
        "text.color": _INK,
        "axes.edgecolor": _GRID,
        "axes.labelcolor": _INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": _GRID,
        "axes.axisbelow": True,
        "xtick.color": _INK,
        "ytick.color": _INK,
        "legend.frameon": False,
        "text.parse_math": False,  # a class name may have dollar signs
    }
)


@_styled
def encode(figure: Figure, *, sample: bool) -> bytes:
    """Encodes a figure as PNG.

    Args:
      figure: one of this module's.
      sample: whether to add a watermark that says that it shows the embedded sample.
    """
    if sample:
        figure.text(
            0.5, 0.5, "EMBEDDED SAMPLE", rotation=25, ha="center", va="center",
            fontsize=34, color="#dc2626", alpha=0.18,
        )  # fmt: skip
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=144)
    return buffer.getvalue()


@_styled
def learning_curve(history: Sequence[Mapping[str, Any]], metric: str) -> Figure:
    """Training and validation metric by epoch.

    Args:
      history: the lines of metrics.jsonl.
      metric: "loss" or "accuracy".
    """
    figure, axes = _figure()
    for split, name, color in (("train", "training", _FIRST), ("val", "validation", _SECOND)):
        lines = [line for line in history if line["split"] == split]
        epochs, values = [line["epoch"] for line in lines], [line[metric] for line in lines]
        if lines:
            axes.plot(epochs, values, color=color, marker="o", markersize=3, label=name)
    axes.set_ylabel(_label(metric))
    _format_epochs(axes, metric)
    return figure


@_styled
def reliability_diagram(
    logits: np.ndarray, labels: np.ndarray, temperature: float | None
) -> Figure:
    """Accuracy by confidence, with and without temperature scaling.

    Args:
      logits: float[n, num_classes].
      labels: int[n].
      temperature: divides the logits; None leaves the second curve out.
    """
    figure, axes = _figure()
    axes.plot([0, 1], [0, 1], color=_INK, linewidth=1, linestyle=":")
    curves = [("uncalibrated", 1.0, _FIRST)]
    if temperature is not None:
        curves.append((f"temperature {temperature:.2f}", temperature, _SECOND))
    for name, scale, color in curves:
        bins = calibration.reliability(logits / scale, labels)
        # The accuracy of fewer examples is mostly noise.
        shown = bins.num_examples >= 10
        axes.plot(
            bins.confidence[shown], bins.accuracy[shown], color=color, marker="o", markersize=4,
            label=name,
        )  # fmt: skip
    axes.set_xlabel("confidence")
    axes.set_ylabel("accuracy")
    axes.legend()
    return figure


@_styled
def risk_coverage_curve(logits: np.ndarray, labels: np.ndarray) -> Figure:
    """Error rate among the most confident predictions, by their fraction.

    Args:
      logits: float[n, num_classes].
      labels: int[n].
    """
    curve = calibration.risk_coverage(logits, labels)
    figure, axes = _figure()
    axes.plot(curve.coverage, curve.risk, color=_FIRST)
    axes.set_xlabel("coverage, most confident first")
    axes.set_ylabel("error rate")
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_ylim(bottom=0)
    return figure


@_styled
def confusion_matrix(matrix: Sequence[Sequence[int]], class_names: Sequence[str]) -> Figure:
    """Number of examples by label (rows) and prediction (columns)."""
    counts = np.array(matrix)
    fractions = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = 2.2 + 0.48 * len(class_names)
    figure, axes = _figure(side, side)
    axes.grid(visible=False)
    # The square root keeps the few errors visible beside the many hits.
    axes.imshow(np.sqrt(fractions), cmap="Blues", vmin=0, vmax=1)
    for i, j in np.argwhere(counts):
        color = "white" if np.sqrt(fractions[i, j]) > 0.6 else _INK
        axes.text(j, i, f"{counts[i, j]:,}", ha="center", va="center", fontsize=8, color=color)
    positions = range(len(class_names))
    axes.set_xticks(positions, class_names, rotation=45, ha="right")
    axes.set_yticks(positions, class_names)
    axes.set_xlabel("prediction")
    axes.set_ylabel("label")
    axes.tick_params(length=0)
    return figure


@_styled
def class_samples(images: np.ndarray, labels: np.ndarray, class_names: Sequence[str]) -> Figure:
    """A row of images for each class; images are uint8[n, height, width]."""
    rows = [images[labels == label] for label in range(len(class_names))]
    columns = max(map(len, rows))
    figure, grid = _image_grid(len(rows), columns, (1.3 + 0.7 * columns, 0.7 * len(rows)))
    for axes_row, row, name in zip(grid, rows, class_names, strict=True):
        for axes, image in zip(axes_row, row, strict=False):
            _show(axes, image / 255)
        first = axes_row[0]
        first.text(-0.15, 0.5, name, transform=first.transAxes, ha="right", va="center")
    return figure


@_styled
def augmented_samples(originals: np.ndarray, augmented: np.ndarray) -> Figure:
    """Each original, uint8[n, height, width], before its float[n, epochs, side, side] in [0, 1]."""
    columns = 1 + augmented.shape[1]
    size = 1.3 * columns, 1.3 * len(originals) + 0.3
    figure, grid = _image_grid(len(originals), columns, size)
    for axes_row, original, row in zip(grid, originals, augmented, strict=True):
        for axes, image in zip(axes_row, [original / 255, *row], strict=True):
            _show(axes, image)
    titles = ["original", *(f"epoch {epoch}" for epoch in range(1, columns))]
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=10)
    return figure


@_styled
def worst_predictions(
    predictions: Mapping[str, np.ndarray],
    examples: Mapping[str, np.ndarray],
    class_names: Sequence[str],
) -> Figure:
    """The test images with the highest losses, their labels and predictions.

    Args:
      predictions: the arrays of predictions.npz.
      examples: the arrays of examples.npz.
      class_names: one per class.
    """
    probabilities = softmax(predictions["logits"].astype(np.float64), axis=1)
    row_of = {int(index): row for row, index in enumerate(predictions["indices"])}
    titles = []
    for index in map(int, examples["worst_indices"]):
        row = row_of[index]
        predicted = probabilities[row].argmax()
        titles.append(
            f"test image {index}\n{class_names[predictions['labels'][row]]}\n"
            f"predicted {class_names[predicted]} ({probabilities[row, predicted]:.0%})"
        )
    return _titled_images(examples["worst_images"] / 255, titles, columns=5, side=1.8)


@_styled
def misclassified(
    images: np.ndarray,
    labels: np.ndarray,
    logits: np.ndarray,
    class_names: Sequence[str],
    num_shown: int,
) -> Figure:
    """The misclassified images with the smallest probabilities of their labels.

    Args:
      images: uint8[n, height, width].
      labels: int[n].
      logits: float[n, num_classes].
      class_names: one per class.
      num_shown: how many at most.
    """
    probabilities = softmax(logits.astype(np.float64), axis=1)
    predicted = probabilities.argmax(axis=1)
    order = np.argsort(probabilities[np.arange(len(labels)), labels], kind="stable")
    shown = order[predicted[order] != labels[order]][:num_shown]
    titles = [
        f"{class_names[labels[row]]}\npredicted {class_names[predicted[row]]} "
        f"({probabilities[row, predicted[row]]:.0%})"
        for row in shown
    ]
    return _titled_images(images[shown] / 255, titles, columns=5, side=1.8)


@_styled
def replayed_batch(replay: Replay, class_names: Sequence[str]) -> Figure:
    """The images of a batch as the network saw them, their indices, labels and losses."""
    titles = [
        f"{example}\n{class_names[label]}\nloss {loss:.2f}"
        for example, label, loss in zip(replay.examples, replay.labels, replay.losses, strict=True)
    ]
    return _titled_images(replay.images, titles, columns=8, side=1.3)


@_styled
def seeds_curves(histories: Sequence[Sequence[Mapping[str, Any]]], split: str) -> Figure:
    """Loss and accuracy of each seed by epoch, and their mean.

    Args:
      histories: the lines of each run's metrics.jsonl.
      split: "train" or "val".
    """
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, metric in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        curves = np.array(
            [[line[metric] for line in history if line["split"] == split] for history in histories]
        )
        epochs = range(1, curves.shape[1] + 1)
        for number, curve in enumerate(curves):
            label = "" if number else "each seed"
            axes.plot(epochs, curve, color=_EACH_SEED, linewidth=1, label=label)
        axes.plot(epochs, curves.mean(axis=0), color=_FIRST, linewidth=2, label="mean")
        axes.set_ylabel({"train": "training ", "val": "validation "}[split] + _label(metric))
        _format_epochs(axes, metric)
    return figure


@_styled
def rate_curve(curve: RateCurve) -> Figure:
    """Loss by learning rate, and the suggestion."""
    figure, axes = _figure()
    axes.plot(curve.rates, curve.losses, color=_EACH_SEED, linewidth=0.8, label="each step")
    axes.plot(curve.rates, curve.smoothed, color=_FIRST, label="smoothed")
    label = f"suggestion: {curve.suggestion:.2g}"
    axes.axvline(curve.suggestion, color=_SECOND, linestyle="--", label=label)
    axes.set(xscale="log", xlabel="learning rate", ylabel="training loss (nats)")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_ylim(0, 1.3 * curve.smoothed.max())
    axes.legend()
    return figure


@_styled
def distance_histogram(distances: Mapping[str, np.ndarray], threshold: float) -> Figure:
    """Histogram of relative distances to the nearest training image.

    Args:
      distances: float[n] of the "test" images and of "train" images.
      threshold: below it two images are near-duplicates.
    """
    figure, axes = _figure(5.6, 3.2)
    for split, name, color in (("test", "test", _FIRST), ("train", "training", _SECOND)):
        axes.hist(
            distances[split], bins=np.linspace(0, 1, 51).tolist(), histtype="step", color=color,
            linewidth=1.5, label=f"{name} images",
        )  # fmt: skip
    axes.axvline(threshold, color=_INK, linewidth=1, linestyle="--")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("relative distance to the nearest training image")
    axes.set_ylabel("images")
    axes.legend()
    return figure


def _figure(width: float = 4.6, height: float = 3.4) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _label(metric: str) -> str:
    return {"loss": "loss (nats)", "accuracy": "accuracy"}[metric]


def _format_epochs(axes: Axes, metric: str) -> None:
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if metric == "accuracy":
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.legend()


def _titled_images(
    images: np.ndarray, titles: Sequence[str], *, columns: int, side: float
) -> Figure:
    rows = max(1, -(-len(images) // columns))
    figure, grid = _image_grid(rows, columns, (side * columns, (side + 0.5) * rows))
    for axes, image, title in zip(grid.flat, images, titles, strict=False):
        _show(axes, image)
        axes.set_title(title, fontsize=8)
    return figure


def _image_grid(rows: int, columns: int, figsize: tuple[float, float]) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=figsize, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    return figure, grid


def _show(axes: Axes, image: np.ndarray) -> None:
    axes.imshow(image, cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
