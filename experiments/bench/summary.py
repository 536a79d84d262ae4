"""Ratios, tables and curves of the benchmark's results."""

from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np
from competitors import OURS
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from worker import Case

from fmnist_jax.analysis.plots import INK, style

_SECONDS = (10, 20, 50, 100, 200, 500)


def speeds(result: dict[str, Any], name: str) -> list[float]:
    """Returns a competitor's images/s in each round."""
    rounds, batch_size = result["competitors"][name]["rounds"], result["case"]["batch_size"]
    return [r["steps"] * batch_size / r["seconds"] for r in rounds]


def ratios(result: dict[str, Any], name: str) -> list[float]:
    """Returns the speed of fmnist_jax relative to a competitor's, round by round."""
    return [a / b for a, b in zip(speeds(result, OURS), speeds(result, name), strict=True)]


def print_result(result: dict[str, Any], console: Console) -> None:
    """Prints the table of one case."""
    case = Case(**result["case"])
    table = Table(title=str(case))
    for heading in (
        "competitor", "images/s", f"{OURS} over it", "of matrix rate", "peak MiB", "first step, s"
    ):  # fmt: skip
        table.add_column(heading, justify="right" if table.columns else "left", no_wrap=True)
    for name, record in result["competitors"].items():
        images_per_second = speeds(result, name)
        fractions = [
            speed / case.batch_size * result["flops_per_step"] / rate
            for speed, rate in zip(
                images_per_second, result["matrix_flops_per_second"], strict=True
            )
        ]
        table.add_row(
            name,
            spread(images_per_second, ",.0f"),
            "" if name == OURS else spread(ratios(result, name), ".2f"),
            f"{median(fractions):.0%}",
            f"{record['memory']:,.0f}",
            f"{record['first_step_seconds']:.1f}",
            style="bold" if name == OURS else "",
        )
    console.print(table)
    console.print(
        "Largest difference of ten steps from those of a plain network: "
        "{loss:.1e} of the loss, {update:.1e} of the update.".format(**result["difference"])
    )


@style()
def draw_curves(curves: dict[str, list[Any]], targets: Sequence[float]) -> Figure:
    """Draws test accuracy over seconds of training: the mean, and a band from lowest to highest."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, seeds in curves.items():
        points = np.array(seeds)  # [seed, epoch, 2]
        seconds, accuracy = points[..., 0].mean(0), 100 * points[..., 1]
        axes.plot(seconds, accuracy.mean(0), marker="o", markersize=4, markevery=[-1], label=name)
        axes.fill_between(seconds, accuracy.min(0), accuracy.max(0), alpha=0.2, lw=0)
    for target in targets:
        axes.axhline(100 * target, color=INK, linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    axes.set_xticks(_SECONDS, map(str, _SECONDS))
    axes.minorticks_off()
    axes.set_ylim(86, 95)
    axes.set_xlabel("seconds of training")
    axes.set_ylabel("test accuracy, %")
    figure.legend(loc="outside upper center", ncols=2, fontsize=8)
    return figure


def spread(values: Sequence[float], digits: str) -> str:
    """Formats the median with the smallest and the largest."""
    return f"{median(values):{digits}} ({min(values):{digits}} to {max(values):{digits}})"
