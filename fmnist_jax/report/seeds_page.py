"""The page about many seeds, made from their files."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from fmnist_jax.errors import DamagedFileError
from fmnist_jax.report import page
from fmnist_jax.report.run_page import save_figure
from fmnist_jax.runs import files

_EACH, _MEAN = "#93b4f5", "#2563eb"


def write_seeds_report(workdir: Path) -> Path:
    """Draws each seed's curve and writes `seeds.html`.

    Args:
      workdir: a folder in which `fit_seeds` has finished.

    Returns:
      The path of the page. It needs no other file.

    Raises:
      DamagedFileError: if `fit_seeds` has not finished there, or a file cannot be read.
    """
    summary = files.read_json(workdir / files.SEEDS)
    if summary is None:
        raise DamagedFileError(f"{workdir / files.SEEDS} is not there: no finished seeds")
    histories = [files.read_lines(workdir / run / files.METRICS) for run in summary["runs"]]
    split = "train" if summary["val_accuracy"] is None else "val"
    with mpl.rc_context(page.STYLE):
        figure = _curves(histories, split)
        picture = workdir / "seeds.png"
        save_figure(picture, figure, sample=summary["sample"])
    written = workdir / "seeds.html"
    files.write_bytes(written, _page(summary, picture.read_bytes()).encode())
    return written


def _curves(histories: list[list[dict[str, Any]]], split: str) -> Figure:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, metric in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        curves = [
            [line[metric] for line in history if line["split"] == split] for history in histories
        ]
        epochs = range(1, len(curves[0]) + 1)
        for number, curve in enumerate(curves):
            axes.plot(epochs, curve, color=_EACH, linewidth=1, label="" if number else "each seed")
        mean = [sum(values) / len(values) for values in zip(*curves, strict=True)]
        axes.plot(epochs, mean, color=_MEAN, linewidth=2, label="mean")
        axes.set_xlabel("epoch")
        name = "validation" if split == "val" else "training"
        axes.set_ylabel(f"{name} {metric}" + (" in nats" if metric == "loss" else ""))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if metric == "accuracy":
            axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.legend(frameon=False)
    return figure


def _page(summary: dict[str, Any], picture: bytes) -> str:
    test, ensemble = summary["test_accuracy"], summary["ensemble"]
    many = test["n"] > 1
    cards = [("main", f"{test['mean']:.2%}", f"mean test accuracy of {test['n']} seeds")]
    if many:
        cards += [
            ("", f"{test['low']:.2%} to {test['high']:.2%}", "95% interval of the mean"),
            ("", f"{100 * test['std']:.2f}", "standard deviation in points"),
            ("", f"{ensemble['accuracy']:.2%}", "test accuracy of their ensemble"),
        ]
    names = {
        "test_accuracy": "test accuracy",
        "val_accuracy": "validation accuracy",
        "train_accuracy": "training accuracy, last epoch",
        "views_accuracy": "test accuracy, mean of six views",
        "test_loss": "test loss in nats",
    }
    rows = [
        [
            name,
            _number(key, summary[key]["mean"]),
            _range(key, summary[key]["low"], summary[key]["high"]),
            _range(key, summary[key]["bootstrap_low"], summary[key]["bootstrap_high"]),
            _number(key, summary[key]["std"]),
        ]
        for key, name in names.items()
        if summary[key] is not None
    ]
    recipe, calibration = summary["recipe"], ensemble["calibration"]
    title = f"{summary['arch']} from {test['n']} seeds"
    body = [
        '<p class="warning">Trained and tested on the embedded sample of Fashion-MNIST. These '
        "accuracies are no results.</p>"
        if summary["sample"]
        else "",
        f"<h1>{title}</h1>",
        f'<p class="soft">{recipe["epochs"]} epochs, batches of {recipe["batch_size"]}, '
        f"{recipe['optimizer']}. Each run looked at the test images once, at its "
        "end.</p>",
        page.figures(cards),
        page.section(
            "Curves",
            page.image(picture, "Loss and accuracy of each seed by epoch, and their mean", "wide"),
        ),
        page.section(
            "Over the seeds",
            page.table(
                ["", "mean", "95% interval, t", "95% interval, bootstrap", "standard deviation"],
                rows,
            )
            + '<p class="soft">Over seeds, for these test images: other images would give other '
            "numbers, by a standard error of 0.2 to 0.3 points for 10,000. The bootstrap's "
            "interval is too narrow for few seeds: of five, 84% hold the mean.</p>",
        ),
        page.section(
            "Each seed",
            page.table(
                ["run", "test accuracy", "parameters' SHA-256"],
                [
                    [run, f"{accuracy:.2%}", sha256[:16]]
                    for run, accuracy, sha256 in zip(
                        summary["runs"], test["values"], summary["params_sha256"], strict=True
                    )
                ],
            ),
        ),
        page.section(
            "The ensemble of all, their mean probability",
            page.facts(
                {
                    "Test accuracy": f"{ensemble['accuracy']:.2%}",
                    "Test loss": f"{ensemble['loss']:.3f} nats",
                    "Expected calibration error": f"{calibration['ece']:.2%}, 95% interval "
                    f"{calibration['ece_low']:.2%} to {calibration['ece_high']:.2%}",
                }
            ),
        ),
    ]
    return page.page(title, body)


def _number(key: str, value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2%}" if key.endswith("accuracy") else f"{value:.4f}"


def _range(key: str, low: float | None, high: float | None) -> str:
    return "" if low is None else f"{_number(key, low)} to {_number(key, high)}"
