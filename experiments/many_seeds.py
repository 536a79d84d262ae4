"""`run.py --seeds` and `--vary`: the same recipe from many seeds."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

import fmnist_jax as fm
from fmnist_jax.config import StreamName
from fmnist_jax.runs import files
from fmnist_jax.runs.plan import create_plan
from fmnist_jax.studies.seeds import seed_run, variances

_VARIANCES = "variances.json"


def train(
    run: fm.Run, dataset: fm.Dataset, count: int, vary: Sequence[StreamName], console: Console
) -> None:
    """Trains from `count` seeds, and again with each stream of `vary` varied alone."""
    for name in vary:
        create_plan(seed_run(run, run.seed + 1, name), dataset)  # refuses what cannot vary
    progress = fm.ConsoleProgress(console)
    summary = fm.fit_seeds(run, dataset, count, progress=progress).report
    for name in vary:
        console.print(f"\nOnly the stream {name} follows the seeds:")
        fm.fit_seeds(run, dataset, count, vary=name, progress=progress)
    console.print("Drawing the report ...")
    from fmnist_jax.report.seeds import (
        write_seeds_report,  # here: matplotlib is needed only now
    )

    page = write_seeds_report(run.workdir)
    console.print()
    console.print(_summary_table(summary, str(page)))
    if vary:
        table = variances(run.workdir, count, run.seed, vary)
        files.write_json(run.workdir / _VARIANCES, table)
        console.print(_variance_table(table))
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


def _variance_table(rows: dict[str, Any]) -> Table:
    table = Table(title="Where the variance of the test accuracy comes from")
    for heading in (
        "what varies", "standard deviation, points", "95% interval", "share of the variance",
        "95% interval",
    ):  # fmt: skip
        table.add_column(heading, justify="right" if table.columns else "left")
    for name, row in rows.items():
        std, low, high = (100 * row[key] ** 0.5 for key in ("variance", "low", "high"))
        cells = [name, f"{std:.3f}", f"{low:.3f} to {high:.3f}"]
        if row.get("share") is not None:
            cells += [f"{row['share']:.0%}", f"{row['share_low']:.0%} to {row['share_high']:.0%}"]
        table.add_row(*cells)
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
