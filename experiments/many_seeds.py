"""`run.py --seeds`: the same recipe from many seeds."""

from typing import Any

from rich.console import Console
from rich.table import Table

import fmnist_jax as fm


def train(run: fm.Run, dataset: fm.Dataset, num_seeds: int, console: Console) -> None:
    """Trains from `num_seeds` seeds and prints their summary."""
    summary = fm.fit_seeds(run, dataset, num_seeds, progress=fm.ConsoleProgress(console)).report
    console.print("Drawing the report ...")
    from fmnist_jax.report.seeds import (
        write_seeds_report,  # here: matplotlib is needed only now
    )

    page = write_seeds_report(run.workdir)
    console.print()
    console.print(_summary_table(summary, str(page)))
    if summary["sample"]:
        console.print(
            "These numbers are from the embedded sample and are no results.", style="bold red"
        )


def _summary_table(summary: dict[str, Any], page: str) -> Table:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name in ("test_accuracy", "val_accuracy", "views_accuracy"):
        if summary[name] is not None:
            table.add_row(name.replace("_", " "), interval(summary[name]))
    ensemble = summary["ensemble"]
    table.add_row("ensemble of all", f"{ensemble['accuracy']:.2%}")
    table.add_row(
        "by seed",
        ", ".join(f"{value:.2%}" for value in summary["test_accuracy"]["values"]),
    )
    table.add_row("report", page)
    return table


def interval(figures: dict[str, Any]) -> str:
    """A mean of accuracies with its interval over the seeds, in percent."""
    text = f"[bold]{figures['mean']:.2%}[/bold]"
    if figures["std"] is None:
        return f"{text} (n = 1)"
    return (
        f"{text}, 95% interval {figures['low']:.2%} to {figures['high']:.2%}, standard deviation "
        f"{100 * figures['std']:.2f} points (n = {figures['n']})"
    )
