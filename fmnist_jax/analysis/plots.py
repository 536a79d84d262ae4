"""Figures, drawn by matplotlib from arrays and mappings alone.

Unless stated otherwise, `images` are uint8[n, height, width], or [n, height, width, 3] in colour,
shown as they are; grey images are shown dark on white. `labels` are int[n] with values in
[0, num_classes), `logits` float[n, num_classes], and `class_names` has one name per class. A
`history` has the lines of metrics.jsonl; `trials` and `space` are those of sweep.json.
"""

import base64
import contextlib
import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import FancyBboxPatch
from matplotlib.rcsetup import cycler
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, PercentFormatter
from scipy.special import softmax

from fmnist_jax.analysis import calibration
from fmnist_jax.errors import ConfigError

INK, GRID = "#1f2937", "#e5e7eb"
# Two hues that color-blind readers can tell apart: training and validation, or before and after.
PRIMARY, SECONDARY = "#2563eb", "#ea7317"
PALE, FILL = "#93b4f5", "#eff4fe"

# Characters that fit over an image of a contact sheet, and of the name of a class elsewhere.
_MAX_LINE, _MAX_NAME = 18, 14

# A confusion matrix of more classes has no numbers. It has at most this many names, and cells, a
# side.
_MAX_CLASSES, _MAX_CELLS = 20, 200

# Sides of images whose pixels are shown as squares; larger ones are reduced with antialiasing.
_MAX_SHARP = 64

_STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": GRID,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.prop_cycle": cycler(color=[PRIMARY, SECONDARY, "#0d9488", "#a21caf", "#6b7280"]),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "grid.color": GRID,
    "legend.frameon": False,
    "text.color": INK,
    "text.parse_math": False,  # names may have dollar signs
    "xtick.color": INK,
    "ytick.color": INK,
}


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Replaces the user's matplotlib settings, for a `with` statement or as a decorator.

    Saving belongs inside, because matplotlib creates ticks and grid lines on saving.

    Raises:
      ConfigError: in place of an error of matplotlib, such as of a font.
    """
    try:
        with mpl.style.context(_STYLE, after_reset=True):
            yield
    except LookupError:  # the data miss a value
        raise
    except Exception as error:
        raise ConfigError(
            f"a figure cannot be drawn; the results are kept ({type(error).__name__}: {error})"
        ) from error


@style()
def encode(figure: Figure, *, sample: bool = False) -> bytes:
    """Encodes a figure as PNG, with a watermark if the data are the embedded sample."""
    if sample:
        figure.text(
            0.5, 0.5, "EMBEDDED SAMPLE", rotation=25, ha="center", va="center",
            fontsize=34, color="#dc2626", alpha=0.18,
        )  # fmt: skip
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+")  # missing from the font, drawn as a box
        figure.savefig(buffer, format="png", dpi=144)
    return buffer.getvalue()


def data_url(png: bytes) -> str:
    """Encodes a PNG for the `src` of an image.

    Example:
      >>> data_url(b"png")
      'data:image/png;base64,cG5n'
    """
    return "data:image/png;base64," + base64.b64encode(png).decode()


@style()
def learning_curve(history: Sequence[Mapping[str, Any]], metric: str) -> Figure:
    """Training and validation metric, "loss" or "accuracy", by epoch."""
    figure, axes = _figure()
    for split, name in (("train", "training"), ("val", "validation")):
        points = [(line["epoch"], line[metric]) for line in history if line["split"] == split]
        if points:
            axes.plot(*zip(*points, strict=True), label=name)
    _format_epochs(axes, metric)
    return figure


@style()
def reliability_diagram(
    logits: np.ndarray, labels: np.ndarray, temperature: float | None
) -> Figure:
    """Accuracy by confidence, and after division of the logits by the temperature, if any."""
    figure, axes = _figure()
    axes.plot([0, 1], [0, 1], color=INK, linewidth=1, linestyle=":")
    curves = {"uncalibrated": 1.0}
    if temperature is not None:
        curves[f"temperature {temperature:.2f}"] = temperature
    for name, scale in curves.items():
        bins = calibration.reliability(logits / scale, labels)
        shown = bins.num_examples >= 10  # the accuracy of fewer examples is mostly noise
        points = bins.confidence[shown], bins.accuracy[shown]
        axes.plot(*points, marker="o", markersize=4, label=name)
    axes.set(xlabel="confidence", ylabel="accuracy")
    axes.legend()
    return figure


@style()
def risk_coverage_curve(logits: np.ndarray, labels: np.ndarray) -> Figure:
    """Error rate among the most confident predictions, by their fraction."""
    curve = calibration.risk_coverage(logits, labels)
    figure, axes = _figure()
    axes.plot(curve.coverage, curve.risk)
    axes.set(xlabel="coverage, most confident first", ylabel="error rate")
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.set_ylim(bottom=0)
    return figure


@style()
def confusion_matrix(matrix: Sequence[Sequence[int]], class_names: Sequence[str]) -> Figure:
    """Number of examples by label (rows) and prediction (columns); of many classes, as colours."""
    counts = np.array(matrix)
    fractions = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    num_classes = len(class_names)
    side = 2.2 + 0.48 * min(num_classes, _MAX_CLASSES)
    figure, axes = _figure(side, side)
    axes.grid(visible=False)
    # A cell of less than a few pixels cannot be seen, so that very many classes share cells.
    block = -(-num_classes // _MAX_CELLS)
    padding = -num_classes % block
    size = num_classes + padding
    cells = np.pad(fractions, (0, padding)).reshape(size // block, block, -1, block).max((1, 3))
    extent = (-0.5, size - 0.5, size - 0.5, -0.5)
    # The square root keeps the few errors visible.
    axes.imshow(np.sqrt(cells), cmap="Blues", vmin=0, vmax=1, extent=extent)
    for i, j in np.argwhere(counts if num_classes <= _MAX_CLASSES else ()):
        color = "white" if np.sqrt(fractions[i, j]) > 0.6 else INK
        axes.text(j, i, f"{counts[i, j]:,}", ha="center", va="center", fontsize=8, color=color)
    positions = range(0, num_classes, -(-num_classes // _MAX_CLASSES))
    names = [_short_name(class_names[position]) for position in positions]
    axes.set_xticks(positions, names, rotation=45, ha="right")
    axes.set_yticks(positions, names)
    shared = f", largest of {block} x {block} classes" if block > 1 else ""
    axes.set(xlabel=f"prediction{shared}", ylabel="label")
    axes.tick_params(length=0)
    return figure


@style()
def class_samples(images: np.ndarray, labels: np.ndarray, class_names: Sequence[str]) -> Figure:
    """A row of images for each class; of many classes, for those that have images."""
    is_few = len(class_names) <= _MAX_CLASSES
    classes = range(len(class_names)) if is_few else np.unique(labels)[:_MAX_CLASSES]
    rows = [_pixels(images[labels == label]) for label in classes]
    height = 0.7 * _ratio(images)
    figure, grid = _image_rows(rows, (1.3 + 0.7 * max(map(len, rows)), height * len(rows)))
    for axes, label in zip(grid[:, 0], classes, strict=True):
        name = _short_name(class_names[label])
        axes.text(-0.15, 0.5, name, transform=axes.transAxes, ha="right", va="center")
    return figure


@style()
def augmented_samples(originals: np.ndarray, augmented: np.ndarray) -> Figure:
    """Each original, and its augmented images, float[n, epochs, side, side, ...] in [0, 1]."""
    columns = 1 + augmented.shape[1]
    pairs = zip(_pixels(originals), augmented, strict=True)
    rows = [[original, *row] for original, row in pairs]
    height = 1.3 * _ratio(originals)
    figure, grid = _image_rows(rows, (1.3 * columns, height * len(rows) + 0.3))
    for epoch, axes in enumerate(grid[0]):
        axes.set_title(f"epoch {epoch}" if epoch else "original", fontsize=10)
    return figure


@style()
def worst_predictions(
    predictions: Mapping[str, np.ndarray],
    examples: Mapping[str, np.ndarray],
    class_names: Sequence[str],
) -> Figure:
    """The test images with the highest losses, from predictions.npz and examples.npz."""
    row_of = {int(index): row for row, index in enumerate(predictions["indices"])}
    indices = [int(index) for index in examples["worst_indices"]]
    rows = [row_of[index] for index in indices]
    logits, labels = predictions["logits"][rows], predictions["labels"][rows]
    prefixes = [f"test image {index}\n" for index in indices]
    return _predictions(examples["worst_images"], labels, logits, class_names, prefixes)


@style()
def misclassified(
    images: np.ndarray,
    labels: np.ndarray,
    logits: np.ndarray,
    class_names: Sequence[str],
    num_shown: int,
) -> Figure:
    """At most `num_shown` misclassified images, those with the least probable labels first."""
    probabilities = softmax(logits.astype(np.float64), axis=1)
    order = np.argsort(probabilities[np.arange(len(labels)), labels], kind="stable")
    shown = order[probabilities.argmax(axis=1)[order] != labels[order]][:num_shown]
    prefixes = [""] * len(shown)
    return _predictions(images[shown], labels[shown], logits[shown], class_names, prefixes)


@style()
def replayed_batch(
    images: np.ndarray,
    examples: np.ndarray,
    labels: np.ndarray,
    losses: np.ndarray,
    class_names: Sequence[str],
) -> Figure:
    """Images of a training batch, float[batch, height, width, ...] in [0, 1], and losses in nats.

    `examples` are int[batch], the positions among the training images.
    """
    titles = [
        f"{example}\n{_short_name(class_names[label])}\nloss {loss:.2f}"
        for example, label, loss in zip(examples, labels, losses, strict=True)
    ]
    return _titled_images(images, titles, columns=8, side=1.3)


@style()
def contact_sheet(images: np.ndarray, titles: Sequence[str]) -> Figure:
    """Images and their titles, whose long lines are shortened at the beginning."""
    shortened = ["\n".join(map(_shorten, title.split("\n"))) for title in titles]
    columns = min(max(len(images), 1), 10)
    return _titled_images(
        _pixels(images), shortened, columns=columns, side=1.3, cmap="gray", fontsize=7
    )


@style()
def seeds_curves(histories: Sequence[Sequence[Mapping[str, Any]]], split: str) -> Figure:
    """Loss and accuracy of each seed by epoch, and their mean; split is "train" or "val"."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    runs = [[line for line in history if line["split"] == split] for history in histories]
    for axes, metric in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        curves = np.array([[line[metric] for line in lines] for lines in runs])
        epochs = range(1, curves.shape[1] + 1)
        labels = ["each seed"] + [""] * (len(curves) - 1)
        axes.plot(epochs, curves.T, color=PALE, linewidth=1, label=labels)
        axes.plot(epochs, curves.mean(axis=0), color=PRIMARY, linewidth=2, label="mean")
        _format_epochs(axes, metric, {"train": "training ", "val": "validation "}[split])
    return figure


@style()
def rate_curve(curve: Any) -> Figure:
    """Loss by learning rate, and the suggestion; curve is that of `find_learning_rate`."""
    figure, axes = _figure()
    axes.plot(curve.rates, curve.losses, color=PALE, linewidth=0.8, label="each step")
    axes.plot(curve.rates, curve.smoothed, color=PRIMARY, label="smoothed")
    label = f"suggestion: {curve.suggestion:.2g}"
    axes.axvline(curve.suggestion, color=SECONDARY, linestyle="--", label=label)
    axes.set(xscale="log", xlabel="learning rate", ylabel="training loss (nats)")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_ylim(0, 1.3 * curve.smoothed.max())
    figure.legend(loc="outside upper center", ncols=3)
    return figure


@style()
def trial_history(trials: Sequence[Mapping[str, Any]]) -> Figure:
    """Validation accuracy by trial, and the best so far."""
    figure, axes = _figure(9, 3.6)
    _plot_trials(axes, trials)
    completed = [trial for trial in trials if trial["state"] == "COMPLETE"]
    best = np.maximum.accumulate([trial["val_accuracy"][-1] for trial in completed])
    numbers = [trial["number"] for trial in completed]
    axes.step(numbers, best, where="post", color=SECONDARY, label="best so far", zorder=1)
    axes.set(xlabel="trial", ylabel="validation accuracy")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    figure.legend(loc="outside upper center", ncols=3)
    return figure


@style()
def trial_settings(
    trials: Sequence[Mapping[str, Any]], space: Mapping[str, Mapping[str, Any]]
) -> Figure:
    """Validation accuracy of each trial against each searched setting."""
    columns = min(len(space), 3)
    rows = -(-len(space) // columns)
    layout = ConstrainedLayoutEngine(wspace=0.06)  # room for the outer tick labels
    figure = Figure(figsize=(max(3 * columns, 4.6), 3 * rows + 0.3), layout=layout)
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axes, (name, domain) in zip(grid.flat, space.items(), strict=False):
        choices = domain["choices"]
        _plot_trials(axes, trials, name, choices)
        if choices:
            is_wide = sum(len(str(choice)) + 2 for choice in choices) > 28
            rotated = {"rotation": 30, "ha": "right"} if is_wide else {}
            axes.set_xticks(range(len(choices)), map(str, choices), **rotated)
            axes.set_xlim(-0.5, len(choices) - 0.5)
        else:
            low, high = domain["low"], domain["high"]
            axes.set(xscale="log" if domain["log"] else "linear", xlim=(low, high))
            if domain["log"]:
                subs = (1, 2, 5) if high < 50 * low else (1,)
                axes.xaxis.set_major_locator(LogLocator(subs=subs))
                axes.xaxis.set_minor_formatter(NullFormatter())
            else:
                axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
            axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel(name.replace("_", " "))
    for axes in grid.flat[len(space) :]:
        axes.axis("off")
    for axes in grid[:, 0]:
        axes.set_ylabel("validation accuracy")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2)
    return figure


@style()
def importances(values: Mapping[str, float]) -> Figure:
    """Importance of each setting, a fraction of the variance of the validation accuracy."""
    figure, axes = _figure(9, 1 + 0.35 * len(values))
    items = sorted(values.items(), key=lambda item: item[1])
    bars = axes.barh([name.replace("_", " ") for name, _ in items], [v for _, v in items], 0.7)
    axes.bar_label(bars, fmt="{:.0%}", padding=4)
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.1)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    axes.set_xlabel("fraction of the variance of the validation accuracy")
    return figure


@style()
def network(layers: Sequence[Mapping[str, Any]]) -> Figure:
    """The layers of `nn.summary.summarize` from the images down to the logits, and their sizes."""
    layers = [layer for layer in layers if layer["layer"] != "unused"]
    figure = Figure(figsize=(9, 0.5 + 0.4 * len(layers)), layout="constrained")
    boxes, *charts = figure.subplots(1, 3, sharey=True, width_ratios=(2, 1, 1))
    boxes.set(xlim=(-0.1, 1.01), ylim=(len(layers) - 0.6, -0.4))
    boxes.set_title("layer", loc="left", x=0.12, fontsize=10)
    boxes.set_title("output shape", loc="right", x=0.96, fontsize=10)
    for row, layer in enumerate(layers):
        corners = "round,pad=0,rounding_size=0.02"
        box = FancyBboxPatch((0, row - 0.3), 1, 0.6, corners, mutation_aspect=8, fc=FILL, ec=PALE)
        boxes.add_patch(box)
        boxes.text(0.03, row, _shorten(layer["layer"], 34), va="center", fontsize=9)
        shape = " x ".join(map(str, layer["shape"]))
        boxes.text(0.97, row, shape, va="center", ha="right", fontsize=9)
        for source in layer["inputs"]:
            ends = ((0.5, row - 0.3), (0.5, source + 0.3))
            arrow = {"arrowstyle": "-|>", "color": INK, "lw": 0.8, "shrinkA": 0, "shrinkB": 0}
            if source != row - 1:  # past other layers
                ends = ((0, row - 0.15), (0, source + 0.15))
                arrow["connectionstyle"] = f"arc3,rad={0.6 * abs(row - source) ** -0.5}"
            boxes.annotate("", *ends, arrowprops=arrow)
    titles = {"params": ("parameters", PRIMARY), "flops": ("FLOP per image", SECONDARY)}
    for axes, (key, (title, color)) in zip(charts, titles.items(), strict=True):
        values = [layer[key] for layer in layers]
        bars = axes.barh(range(len(layers)), values, 0.5, color=color)
        axes.bar_label(bars, [f"{v:,}" if v else "" for v in values], padding=3, fontsize=8)
        axes.set_title(title, loc="left", fontsize=10)
        axes.margins(x=0.45)
    for axes in (boxes, *charts):
        axes.axis("off")
    return figure


@style()
def distance_histogram(distances: Mapping[str, np.ndarray], threshold: float) -> Figure:
    """Histogram of the relative distances of the "test" and "train" images, and the threshold."""
    figure, axes = _figure(5.6, 3.2)
    bins = np.linspace(0, 1, 51).tolist()
    for split, label in (("test", "test images"), ("train", "training images")):
        axes.hist(distances[split], bins, histtype="step", linewidth=1.5, label=label)
    axes.axvline(threshold, color=INK, linewidth=1, linestyle="--")
    axes.set(xlabel="relative distance to the nearest training image", ylabel="images")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.legend()
    return figure


def _figure(width: float = 4.6, height: float = 3.4) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _plot_trials(
    axes: Axes,
    trials: Sequence[Mapping[str, Any]],
    setting: str | None = None,
    choices: Sequence[Any] = (),
) -> None:
    """Draws the last validation accuracy of each trial by a setting, or by number."""
    styles = ("COMPLETE", "completed", "o", PRIMARY), ("PRUNED", "pruned", "x", INK)
    for state, name, marker, color in styles:
        shown = [trial for trial in trials if trial["state"] == state and trial["val_accuracy"]]
        values = [trial["params"][setting] if setting else trial["number"] for trial in shown]
        positions = [choices.index(value) for value in values] if choices else values
        accuracies = [trial["val_accuracy"][-1] for trial in shown]
        if shown:
            (line,) = axes.plot(positions, accuracies, marker, color=color, label=name)
            line.set(markersize=5, clip_on=False)  # whole markers at the ends of a domain
    axes.yaxis.set_major_formatter(PercentFormatter(1))


def _format_epochs(axes: Axes, metric: str, prefix: str = "") -> None:
    axes.set(xlabel="epoch", ylabel=prefix + {"loss": "loss (nats)"}.get(metric, metric))
    num_epochs = axes.dataLim.x1
    axes.set_xlim(0.5, num_epochs + 0.5)  # no tick before the first or after the last epoch
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if num_epochs <= 50:  # more markers hide the curve
        for line in axes.lines:
            line.set(marker="o", markersize=3)
    if metric == "accuracy":
        axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.legend()


def _titled_images(
    images: np.ndarray,
    titles: Sequence[str],
    *,
    columns: int,
    side: float,
    cmap: str = "gray_r",
    fontsize: float = 8,
) -> Figure:
    starts = range(0, max(len(images), 1), columns)
    rows = [images[start : start + columns] for start in starts]
    size = side * columns, (side * _ratio(images) + 0.5) * len(rows)
    figure, grid = _image_rows(rows, size, columns, cmap)
    for axes, title in zip(grid.flat, titles, strict=False):
        axes.set_title(title, fontsize=fontsize)
    return figure


def _predictions(
    images: np.ndarray,
    labels: np.ndarray,
    logits: np.ndarray,
    class_names: Sequence[str],
    prefixes: Sequence[str],
) -> Figure:
    probabilities = softmax(logits.astype(np.float64), axis=1)
    names = [_short_name(name) for name in class_names]
    titles = [
        f"{prefix}{names[label]}\npredicted {names[row.argmax()]} ({row.max():.0%})"
        for prefix, label, row in zip(prefixes, labels, probabilities, strict=True)
    ]
    return _titled_images(_pixels(images), titles, columns=5, side=1.8)


def _shorten(line: str, length: int = _MAX_LINE) -> str:
    line = line.encode(errors="replace").decode()  # not all bytes of a file name are text
    return line if len(line) <= length else f"…{line[1 - length :]}"


def _short_name(name: str) -> str:
    name = _shorten(name, len(name))  # a folder may be the name of a class
    return name if len(name) <= _MAX_NAME else f"{name[: _MAX_NAME - 1]}…"


def _pixels(images: np.ndarray) -> np.ndarray:
    """Maps grey images to [0, 1]; colour images stay uint8, in an eighth of the memory."""
    return images if images.ndim == 4 else images / 255


def _ratio(images: np.ndarray) -> float:
    """Height of images by width, for the rows of a figure."""
    return float(np.clip(images.shape[1] / images.shape[2], 0.25, 4))


def _image_rows(
    rows: Sequence[Sequence[np.ndarray] | np.ndarray],
    figsize: tuple[float, float],
    columns: int | None = None,
    cmap: str = "gray_r",
) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=figsize, layout="constrained")
    grid = figure.subplots(len(rows), columns or max(map(len, rows)), squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for axes_row, row in zip(grid, rows, strict=True):
        for axes, image in zip(axes_row, row, strict=False):
            is_small = max(image.shape[:2]) <= _MAX_SHARP
            interpolation = "nearest" if is_small else "antialiased"
            axes.imshow(image, cmap=cmap, vmin=0, vmax=1, interpolation=interpolation)
    return figure, grid
