"""Trains each recipe from several seeds and compares the results with its Keras project's claim.

    fmnist-jax claims --seeds 5

A claim is the accuracy of one run, so it is compared with the 95% prediction interval of one more
run of the recipe. The same command resumes; runs of the same settings in `--workdir` are reused.
The table is in `claims.md` and `claims.json`.
"""

import argparse
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

import fmnist_jax as fm
from fmnist_jax.analysis import stats
from fmnist_jax.commands import flags, shell
from fmnist_jax.data.sources import is_fashion_mnist
from fmnist_jax.errors import ConfigError
from fmnist_jax.recipes import CLAIMS, Claim
from fmnist_jax.runs import files
from fmnist_jax.runs.plan import create_plan

_HEADINGS = ("network", "claim", "n", "mean (95% interval)", "one more run", "verdict")


def create_parser() -> argparse.ArgumentParser:
    """Creates the parser of the command line."""
    parser = flags.Parser(description="Tests the claims of the Keras projects.")
    parser.add_argument(
        "--arch",
        nargs="+",
        metavar="NAME",
        help="default: those of the projects; on a CPU without deep_augmented (five hours a run)",
    )
    parser.add_argument(
        "--seeds", type=int, metavar="N", default=5, help="runs of each recipe (%(default)s)"
    )
    flags.add_workdir_flag(
        parser, Path("runs"), "folder of the table and of the runs' folders (%(default)s)"
    )
    flags.add_output_flags(parser)
    flags.add_training_flags(parser)
    return parser


def _run(arguments: argparse.Namespace, console: Console) -> int:
    archs = arguments.arch or list(CLAIMS)
    if arguments.arch is None and jax.default_backend() == "cpu":
        archs.remove("deep_augmented")
    runs = [flags.create_run(arguments, arch, arguments.workdir) for arch in archs]
    dataset = flags.load_data(arguments, console)
    if not is_fashion_mnist(dataset.sha256):
        raise ConfigError(f"the claims are about Fashion-MNIST, but this is {dataset.source}")
    for run in runs:
        create_plan(run, dataset)  # refuses settings that do not fit before any training
    rows = []
    for name, run in zip(archs, runs, strict=True):
        console.print(name, style="bold")
        workdir = flags.name_workdir(arguments.workdir, run, dataset, seeds=True)
        summary = fm.fit_seeds(
            dataclasses.replace(run, workdir=workdir),
            dataset,
            arguments.seeds,
            hooks=[fm.ConsoleProgress(console)],
        ).report
        rows.append(_row(name, summary))
        # After each recipe, so that an interrupted command leaves a table.
        files.write_json(arguments.workdir / "claims.json", rows)
        files.write_bytes(arguments.workdir / "claims.md", _markdown(rows).encode())
    table = Table()
    for heading in _HEADINGS:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*_cells(row))
    console.print(table)
    if dataset.sample:
        console.print(shell.SAMPLE_NOTE, style="bold red")
    return 0


def verdict(claim: Claim, low: float, high: float) -> str:
    """Compares a claim with the prediction interval of one more run.

    Example:
      >>> verdict(CLAIMS["small_dropout"], 0.915, 0.922)
      'claim below'
    """
    accuracy = claim.test_accuracy
    if claim.not_comparable:
        return f"not comparable: {claim.not_comparable}"
    if accuracy is None:
        return "no claim"
    if not math.isfinite(low):
        return "one run has no interval"
    if low <= accuracy <= high:
        return "claim within"
    return "claim below" if accuracy < low else "claim above"


def _row(name: str, summary: dict[str, Any]) -> dict[str, Any]:
    accuracy, claim = summary["test_accuracy"], CLAIMS.get(name, Claim(source=""))
    low, high = stats.prediction_interval(accuracy["values"])
    return {
        "network": name,
        "recipe": summary["recipe"],
        "classes": summary["data"]["classes"],
        "claim": claim.text,
        "test_accuracy": accuracy,
        "one_run_low": low if math.isfinite(low) else None,
        "one_run_high": high if math.isfinite(high) else None,
        "verdict": verdict(claim, low, high),
        "sample": summary["sample"],
    }


def _cells(row: dict[str, Any]) -> list[str]:
    accuracy = row["test_accuracy"]
    mean, one_run = f"{accuracy['mean']:.2%}", ""
    if row["one_run_low"] is not None:
        mean += f" ({accuracy['low']:.2%} to {accuracy['high']:.2%})"
        one_run = f"{row['one_run_low']:.2%} to {row['one_run_high']:.2%}"
    return [row["network"], row["claim"], str(accuracy["n"]), mean, one_run, row["verdict"]]


def _markdown(rows: Sequence[dict[str, Any]]) -> str:
    lines = [_HEADINGS, ["---"] * len(_HEADINGS), *map(_cells, rows)]
    table = "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    return f"{table}\n{shell.SAMPLE_NOTE}\n" if rows[0]["sample"] else table


main = shell.main_of(_run, create_parser)
