"""Plots and report.html, made from the files of a finished run and nothing else."""

import base64
import html
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from scipy.special import softmax

from fmnist_jax import files

# Blue for training, orange for validation, in every plot; told apart by the colour-blind as well.
_TRAIN, _VAL, _INK, _GRID = "#2563eb", "#ea7317", "#1f2937", "#e5e7eb"
_STYLE: dict[Any, Any] = {
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
}
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
        raise files.DamagedFileError(f"{workdir / files.REPORT} is not there: no finished run")
    history = files.read_lines(workdir / files.METRICS)
    predictions = files.read_arrays(workdir / files.PREDICTIONS)
    examples = files.read_arrays(workdir / files.EXAMPLES)

    (workdir / _PLOTS).mkdir(exist_ok=True)
    draw: dict[str, Callable[[], Figure]] = {
        "loss": lambda: _curve(history, "loss", "loss in nats"),
        "accuracy": lambda: _curve(history, "accuracy", "accuracy"),
        "confusion": lambda: _confusion(report),
        "samples": lambda: _samples(report, examples),
        "augmented": lambda: _augmented(examples),
        "worst": lambda: _worst(report, predictions, examples),
    }
    if "augmented" not in examples:
        del draw["augmented"]
    images = {}
    with mpl.rc_context(_STYLE):
        for name, make in draw.items():
            figure = make()
            if report["sample"]:
                figure.text(
                    0.5, 0.5, "EMBEDDED SAMPLE", rotation=25, ha="center", va="center",
                    fontsize=34, color="#dc2626", alpha=0.18,
                )  # fmt: skip
            path = workdir / _PLOTS / f"{name}.png"
            figure.savefig(path, dpi=144)
            images[name] = base64.b64encode(path.read_bytes()).decode()

    page = workdir / "report.html"
    files.write_bytes(page, _page(report, history, images).encode())
    return page


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


def _curve(history: list[dict[str, Any]], metric: str, label: str) -> Figure:
    figure = Figure(figsize=(4.6, 3.4), layout="constrained")
    axes = figure.subplots()
    for split, name, color in (
        ("train", "training, dropout on", _TRAIN),
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
                color = "white" if np.sqrt(shares[i, j]) > 0.6 else _INK
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


_CSS = """
:root { --ink: #1f2937; --soft: #5b6472; --line: #e5e7eb; --card: #fff; --page: #f6f7f9;
  --accent: #2563eb; --bad: #b91c1c; --bad-soft: #fee2e2; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2rem 1rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0; letter-spacing: -0.01em; }
h2 { font-size: 1.15rem; margin: 0 0 .9rem; }
p { margin: .3rem 0 0; } .soft { color: var(--soft); }
section { background: var(--card); border: 1px solid var(--line); border-radius: .8rem;
  padding: 1.2rem; margin-top: 1.2rem; overflow-x: auto; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.6rem, 1fr)); gap: .8rem;
  margin-top: 1.4rem; }
.figure { background: var(--card); border: 1px solid var(--line); border-radius: .8rem;
  padding: .8rem 1rem; }
.figure b { display: block; font-size: 1.5rem; font-variant-numeric: tabular-nums;
  letter-spacing: -0.01em; }
.figure span { color: var(--soft); font-size: .85rem; }
.figure.main b { color: var(--accent); }
img { display: block; max-width: 100%; height: auto; margin: 0 auto; }
/* On a phone, pictures with small print scroll sideways rather than shrink. */
img.wide { min-width: 32rem; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); gap: 1rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; }
th { color: var(--soft); font-weight: 600; font-size: .85rem; }
tr:last-child td, tr:last-child th { border-bottom: 0; }
.facts th, .facts td { text-align: left; vertical-align: top; }
.facts td { overflow-wrap: anywhere; }
.warning { background: var(--bad-soft); color: var(--bad); border: 1px solid var(--bad);
  border-radius: .8rem; padding: .8rem 1rem; margin-bottom: 1.4rem; font-weight: 600; }
"""


def _page(report: dict[str, Any], history: list[dict[str, Any]], images: dict[str, str]) -> str:
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
        '<div class="figures">',
        *(
            f'<div class="figure {kind}"><b>{value}</b><span>{name}</span></div>'
            for kind, value, name in figures
        ),
        "</div>",
        _section(
            "Beside the original",
            _facts(
                {
                    "Keras project": recipe["source"],
                    "It claims": recipe["claim"],
                    "Here": f"test {report['test_accuracy']:.2%}, "
                    f"validation {_percent(report['val_accuracy'])}, "
                    f"training {_percent(report['train_accuracy'])}; one run, last epoch",
                    "Left open there, decided here": recipe["open_choices"],
                }
            ),
        )
        if recipe["source"]
        else "",
        _section(
            "Loss and accuracy",
            '<div class="pair">'
            + _image("loss", "Loss of training and validation by epoch", images)
            + _image("accuracy", "Accuracy of training and validation by epoch", images)
            + "</div>",
        ),
        _section("By class, on the test images", _class_table(report)),
        _picture("confusion", titles, images),
        _section("Most confused pairs", _pairs_table(report)),
        *(_picture(name, titles, images) for name in ("worst", "samples", "augmented")),
        _section("How it was made", _facts(_settings(report, history))),
    ]
    title = html.escape(f"{report['arch']}: {report['test_accuracy']:.2%} on Fashion-MNIST")
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_CSS}</style></head><body><main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main></body></html>\n"
    )


def _sentence(report: dict[str, Any]) -> str:
    data = report["data"]
    return (
        f"{len(data['classes'])} classes of Fashion-MNIST; {report['epochs']} epochs over "
        f"{data['train']:,} images, {data['val']:,} for validation; the {data['test']:,} test "
        f"images were looked at once, at the end. Seed {report['seed']}."
    )


def _settings(report: dict[str, Any], history: list[dict[str, Any]]) -> dict[str, str]:
    recipe = report["recipe"]
    return {
        "Optimizer": f"{recipe['optimizer']}, learning rate {recipe['learning_rate']:g}, "
        f"{recipe['schedule']} schedule, batches of {recipe['batch_size']}",
        "Augmentation": recipe["augmentation"],
        "Updates": f"{report['steps']:,} in {len({line['epoch'] for line in history})} epochs",
        "Time": f"{report['train_seconds']:,.0f} s training, "
        f"{report['compile_seconds']:.1f} s compiling, on {report['device']}",
        "Data": f"{report['data']['source']}, SHA-256 {report['data']['sha256']}",
        "Parameters' SHA-256": report["params_sha256"],
        "Versions": ", ".join(f"{name} {number}" for name, number in report["versions"].items()),
    }


def _section(title: str, content: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>{content}</section>"


def _picture(name: str, titles: dict[str, str], images: dict[str, str]) -> str:
    if name not in images:
        return ""
    return _section(titles[name], _image(name, titles[name], images, kind="wide"))


def _image(name: str, alt: str, images: dict[str, str], kind: str = "") -> str:
    return f'<img class="{kind}" alt="{alt}" src="data:image/png;base64,{images[name]}">'


def _facts(facts: dict[str, str]) -> str:
    rows = "".join(
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>"
        for name, value in facts.items()
    )
    return f'<table class="facts">{rows}</table>'


def _class_table(report: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(row['name'])}</td><td>{row['precision']:.3f}</td>"
        f"<td>{row['recall']:.3f}</td><td>{row['f1']:.3f}</td><td>{row['support']:,}</td></tr>"
        for row in report["classes"]
    )
    return (
        "<table><tr><th>class</th><th>precision</th><th>recall</th><th>F1</th><th>images</th></tr>"
        f"{rows}</table>"
    )


def _pairs_table(report: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{html.escape(first)} and {html.escape(second)}</td><td>{number:,}</td></tr>"
        for first, second, number in most_confused(report)
    )
    return f"<table><tr><th>pair</th><th>mistakes, both ways</th></tr>{rows}</table>"


def _percent(share: float | None) -> str:
    return "none" if share is None else f"{share:.2%}"
