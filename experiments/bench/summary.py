"""Ratios, tables and charts of the benchmark's results."""

from collections.abc import Sequence
from statistics import median
from typing import Any

import numpy as np
from competitors import OURS
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from worker import Case

from fmnist_jax.analysis.plots import INK, PALE, PRIMARY, style

_SECONDS = (10, 20, 50, 100, 200, 500)


def speeds(result: dict[str, Any], name: str) -> list[float]:
    """Returns a competitor's images/s in each round; [] if it has a problem or is absent."""
    record = result["competitors"].get(name, {"problem": "absent"})
    if record["problem"]:
        return []
    return [r["steps"] * result["case"]["batch_size"] / r["seconds"] for r in record["rounds"]]


def best_peer(result: dict[str, Any]) -> str | None:
    """Returns the competitor with the highest median speed besides fmnist_jax."""
    peers = {name: speeds(result, name) for name in result["competitors"] if name != OURS}
    return max((n for n in peers if peers[n]), key=lambda n: median(peers[n]), default=None)


def ratios(result: dict[str, Any], name: str) -> list[float]:
    """Returns the speed of fmnist_jax relative to a competitor's, round by round."""
    return [a / b for a, b in zip(speeds(result, OURS), speeds(result, name), strict=False)]


def print_result(result: dict[str, Any], console: Console) -> None:
    """Prints the table of one case."""
    case = Case(**result["case"])
    table = Table(title=str(case))
    for heading in (
        "competitor", "images/s", f"{OURS} over it", "steps/s", "of matrix rate", "peak MiB",
        "first step, s",
    ):  # fmt: skip
        table.add_column(heading, justify="right" if table.columns else "left", no_wrap=True)
    problems = {}
    for name, record in result["competitors"].items():
        images_per_second = speeds(result, name)
        if not images_per_second:
            problems[name] = record["problem"]
            continue
        steps_per_second = [speed / case.batch_size for speed in images_per_second]
        fractions = [
            steps * result["flops_per_step"] / rate
            for steps, rate in zip(steps_per_second, result["matrix_flops_per_second"], strict=True)
        ]
        memory = record["memory"]
        table.add_row(
            name,
            _range(images_per_second, ",.0f"),
            "" if name == OURS else _range(ratios(result, name), ".2f"),
            f"{median(steps_per_second):,.2f}",
            f"{median(fractions):.0%}",
            " + ".join(f"{memory[key]:,.0f}" for key in memory if memory[key] is not None),
            ", ".join(f"{seconds:.1f}" for seconds in record["first_step_seconds"]),
            style="bold" if name == OURS else "",
        )
    console.print(table)
    for name, problem in problems.items():
        console.print(f"{name} {problem}", style="red", markup=False)
    difference = result["competitors"].get(OURS, {}).get("difference")
    if difference:
        console.print(
            "Largest difference of ten steps from those of a plain network: "
            f"{difference['loss']:.1e} of the loss, {difference['update']:.1e} of the update."
        )
    peer = best_peer(result)
    if peer and ratios(result, peer):
        console.print(f"{_range(ratios(result, peer), '.2f')} times the best peer, {peer}")


@style()
def draw_results(results: Sequence[dict[str, Any]]) -> Figure:
    """Draws a bar chart per case: images/s relative to the best peer."""
    heights = [1 + 0.3 * len(result["competitors"]) for result in results]
    figure = Figure(figsize=(8, sum(heights)), layout="constrained")
    charts = figure.subplots(len(results), squeeze=False, height_ratios=heights)[:, 0]
    for chart, result in zip(charts, results, strict=True):
        rounds = {name: speeds(result, name) for name in result["competitors"]}
        medians = {name: median(rounds[name]) for name in rounds if rounds[name]}
        names = sorted(medians, key=lambda name: medians[name])
        unit = medians[best_peer(result) or OURS] if medians else 1
        bars = chart.barh(
            names,
            [medians[name] / unit for name in names],
            color=[PRIMARY if name == OURS else PALE for name in names],
            height=0.7,
        )
        chart.bar_label(bars, [f"{medians[name]:,.0f}" for name in names], padding=4)
        chart.set_title(str(Case(**result["case"])), loc="left", fontweight="bold")
        chart.axvline(1, color=INK, linewidth=0.8, linestyle=":")
        chart.margins(x=0.12)
        chart.grid(visible=False, axis="y")
        chart.tick_params(axis="y", length=0)
    charts[-1].set_xlabel("speed relative to the best peer; numbers are images/s")
    return figure


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


@style()
def draw_scaling(curves: dict[str, list[tuple[int, float]]]) -> Figure:
    """Draws the efficiency by number of devices."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, points in curves.items():
        counts, efficiency = zip(*points, strict=True)
        axes.plot(counts, [100 * e for e in efficiency], marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="devices", ylabel="efficiency by the model, %", ylim=(0, 105))
    axes.legend(fontsize=8)
    return figure


@style()
def draw_growth(points: Sequence[dict[str, Any]]) -> Figure:
    """Draws the time per image against each quantity."""
    figure = Figure(figsize=(8, 6), layout="constrained")
    axes = dict.fromkeys(point["axis"] for point in points)
    for chart, axis in zip(figure.subplots(2, 2).flat, axes, strict=True):
        some = [point for point in points if point["axis"] == axis]
        values = [point["value"] for point in some]
        micros = [1e6 * median(point["seconds_per_image"]) for point in some]
        chart.plot(values, micros, marker="o")
        chart.set(xscale="log", xlabel=axis, ylabel="µs per image", ylim=(0, 1.15 * max(micros)))
        chart.set_xticks(values, [f"{value:,}" for value in values], rotation=45)
        chart.minorticks_off()
    return figure


def print_growth(points: Sequence[dict[str, Any]], console: Console) -> None:
    """Prints the time per image for each point."""
    table = Table(title=f"{OURS}: time per image")
    for heading in ("", "value", "µs per image", "images/s"):
        table.add_column(heading, justify="right" if heading else "left")
    for point in points:
        seconds = point["seconds_per_image"]
        table.add_row(
            point["axis"],
            f"{point['value']:,}",
            _range([1e6 * value for value in seconds], ",.1f"),
            f"{1 / median(seconds):,.0f}",
        )
    console.print(table)


def _range(values: Sequence[float], digits: str) -> str:
    if not values:
        return "-"
    if min(values) == max(values):
        return f"{values[0]:{digits}}"
    return f"{median(values):{digits}} ({min(values):{digits}} to {max(values):{digits}})"
