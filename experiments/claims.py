"""Trains each recipe from several seeds and sets what its Keras project claims beside that.

    python experiments/claims.py --seeds 5

A claim is the accuracy of one run, so it is compared with the 95% interval in which one more run of
the recipe would lie. The same command goes on where it stopped; the table is in `claims.md`.
"""

import signal

# Where nothing is left to save, Ctrl-C just ends the process; `fit` saves before it stops.
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cli
import jax
from rich.console import Console
from rich.table import Table

import fmnist_jax as fm
from fmnist_jax.analysis import stats
from fmnist_jax.runs import files
from fmnist_jax.xla.cache import enable_compilation_cache

_HEADINGS = ("network", "claimed", "n", "mean, % (95% interval)", "one run, %", "verdict")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    return cli.run(_claims, _parser().parse_args(argv))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Tests the claims of the Keras projects.")
    parser.add_argument(
        "--arch",
        nargs="+",
        choices=list(fm.RECIPES),
        help="default: all; on a CPU without deep_augmented, which would take days there",
    )
    parser.add_argument("--seed", type=int, default=0, help="the first seed (%(default)s)")
    parser.add_argument("--seeds", type=int, default=5, help="runs of each recipe (%(default)s)")
    parser.add_argument("--train-examples", type=int, help="train on so many examples only")
    parser.add_argument(
        "--classes", default="0,1,2", help="of the three-class deep_augmented (%(default)s)"
    )
    parser.add_argument(
        "--workdir", type=Path, default=Path("runs/claims"), help="for its files (%(default)s)"
    )
    cli.add_data_flags(parser)
    return parser


def _claims(arguments: argparse.Namespace, console: Console) -> int:
    enable_compilation_cache()
    dataset = cli.load_data(arguments)
    archs = arguments.arch or list(fm.RECIPES)
    if arguments.arch is None and jax.default_backend() == "cpu":
        archs.remove("deep_augmented")
    rows = []
    for arch in archs:
        rows.append(_test(arch, arch, dataset, arguments, console))
        if arch == "deep_augmented":
            three = fm.select_classes(dataset, arguments.classes)
            name = f"{arch}, {', '.join(three.class_names)}"
            rows.append(_test(name, arch, three, arguments, console))
        # After each, so that what there is can be read.
        files.write_json(arguments.workdir / "claims.json", rows)
        files.write_bytes(arguments.workdir / "claims.md", _markdown(rows).encode())
    table = Table()
    for heading in _HEADINGS:
        table.add_column(heading, overflow="fold")
    for row in rows:
        table.add_row(*_cells(row))
    console.print(table)
    return 0


def _test(
    name: str, arch: str, dataset: fm.Dataset, arguments: argparse.Namespace, console: Console
) -> dict[str, Any]:
    """Trains one recipe from all seeds; its row of the table."""
    recipe = fm.RECIPES[arch]
    run = fm.Run(
        recipe=recipe,
        seed=arguments.seed,
        train_examples=arguments.train_examples,
        workdir=arguments.workdir / (arch if name == arch else f"{arch}-three"),
    )
    console.print(f"[bold]{name}[/bold]")
    progress = fm.ConsoleProgress(console)
    summary = fm.fit_seeds(run, dataset, arguments.seeds, progress=progress).report
    accuracy = summary["test_accuracy"]
    low, high = stats.prediction_interval(accuracy["values"])
    return {
        "network": name,
        "claim": recipe.claim,
        "test_accuracy": accuracy,
        "one_run_low": low if math.isfinite(low) else None,
        "one_run_high": high if math.isfinite(high) else None,
        "verdict": verdict(recipe, low, high),
        "sample": summary["sample"],
    }


def verdict(recipe: fm.Recipe, low: float, high: float) -> str:
    """What the interval of one more run says about a recipe's claim.

    Example:
      >>> verdict(fm.RECIPES["small_dropout"], 0.915, 0.922)
      'the claim is below'
    """
    claim = recipe.claimed_test_accuracy
    if recipe.not_comparable:
        return f"not comparable: {recipe.not_comparable}"
    if claim is None:
        return "no claim"
    if not math.isfinite(low):
        return "one run has no interval"
    if low <= claim <= high:
        return "the claim is within"
    return "the claim is below" if claim < low else "the claim is above"


def _cells(row: dict[str, Any]) -> list[str]:
    accuracy = row["test_accuracy"]
    mean, single = f"{100 * accuracy['mean']:.2f}", ""
    if accuracy["low"] is not None:
        mean += f" ({100 * accuracy['low']:.2f} to {100 * accuracy['high']:.2f})"
        single = f"{100 * row['one_run_low']:.2f} to {100 * row['one_run_high']:.2f}"
    return [row["network"], row["claim"], str(accuracy["n"]), mean, single, row["verdict"]]


def _markdown(rows: Sequence[dict[str, Any]]) -> str:
    lines = [_HEADINGS, ["---"] * len(_HEADINGS), *map(_cells, rows)]
    text = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    note = "\n\nFrom the embedded sample: no results." if any(r["sample"] for r in rows) else ""
    return f"{text}{note}\n"


if __name__ == "__main__":
    sys.exit(main())
