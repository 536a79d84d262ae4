"""Compares two recipes over the same seeds.

    python experiments/compare.py runs/a runs/b
    python experiments/compare.py small_dropout small_dropout,dropout=0.3,epochs=20 --seeds 5

Each side is a folder that `run.py --seeds` wrote, or a recipe: the name of a network, and settings
of its recipe that are others. A recipe beside a folder is trained on the seeds, splits and data of
that folder's runs.
"""

import signal

# Where nothing is left to save, Ctrl-C just ends the process; `fit` saves before it stops.
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cli
from many_seeds import interval
from rich.console import Console
from rich.table import Table

import fmnist_jax as fm
from fmnist_jax import config
from fmnist_jax.runs import files
from fmnist_jax.runs.plan import Plan, create_plan
from fmnist_jax.xla.cache import enable_compilation_cache

_COMPARISON = "comparison.json"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    return cli.run(_compare, _parser().parse_args(argv))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Compares two recipes over the same seeds.")
    parser.add_argument("a", help="a folder of run.py --seeds, or a recipe as NAME,SETTING=VALUE")
    parser.add_argument("b", help="likewise")
    parser.add_argument("--seed", type=int, default=0, help="the first seed (%(default)s)")
    # Of five seeds, a sign-flip test cannot come below 0.0625.
    parser.add_argument("--seeds", type=int, default=6, help="runs of each recipe (%(default)s)")
    parser.add_argument("--train-examples", type=int, help="train on so many examples only")
    parser.add_argument(
        "--workdir", type=Path, default=Path("runs/compare"), help="for its files (%(default)s)"
    )
    cli.add_data_flags(parser)
    return parser


def _compare(arguments: argparse.Namespace, console: Console) -> int:
    enable_compilation_cache()
    # Everything is looked at before anything is trained.
    folders = {side: _find_runs(side) for side in (arguments.a, arguments.b)}
    recipes = {side: parse_recipe(side) for side, found in folders.items() if not found}
    if recipes:
        there = [workdir for found in folders.values() for workdir in found]
        planned = _plan_runs(recipes, there, arguments)
        for side, plans in planned.items():
            for plan in plans:
                console.print(f"{side}, seed {plan.run.seed}:", highlight=False)
                fm.fit(plan.run, plan.dataset, progress=fm.ConsoleProgress(console))
            folders[side] = [plan.run.workdir for plan in plans]
    comparison = fm.compare(folders[arguments.a], folders[arguments.b])
    files.make_folder(arguments.workdir)
    files.write_json(arguments.workdir / _COMPARISON, comparison)
    console.print()
    console.print(_table(comparison))
    if comparison["sample"]:
        console.print(
            "These numbers are from the embedded sample and are no results.", style="bold red"
        )
    return 0


def _find_runs(side: str) -> list[Path]:
    """The folders of a side's runs; none if it is no folder."""
    folder = Path(side)
    if not folder.is_dir():
        return []
    seeds = sorted(path.parent for path in folder.glob(f"seed-*/{files.REPORT}"))
    return seeds or [folder]


def _plan_runs(
    recipes: dict[str, fm.Recipe], there: Sequence[Path], arguments: argparse.Namespace
) -> dict[str, list[Plan]]:
    """The runs of each recipe: as those that are there, or else as the flags say."""
    dataset = cli.load_data(arguments)
    settings = [files.read_json(workdir / files.CONFIG) for workdir in there]
    if settings:
        dataset = fm.select_classes(dataset, settings[0]["classes"])
        if dataset.sha256 != settings[0]["data_sha256"]:
            raise fm.ConfigError(f"{there[0]} was trained on other data than {dataset.source}")
        runs = [config.from_dict(one, place) for one, place in zip(settings, there, strict=True)]
    else:
        runs = [
            fm.Run(
                recipe=next(iter(recipes.values())),
                seed=arguments.seed + index,
                train_examples=arguments.train_examples,
                workdir=arguments.workdir,
            )
            for index in range(arguments.seeds)
        ]
    return {
        side: [
            create_plan(
                dataclasses.replace(
                    run, recipe=recipe, workdir=arguments.workdir / side / f"seed-{run.seed}"
                ),
                dataset,
            )
            for run in runs
        ]
        for side, recipe in recipes.items()
    }


def parse_recipe(text: str) -> fm.Recipe:
    """A recipe from its name and what is other in it.

    Example:
      >>> parse_recipe("small_dropout,dropout=0.3,epochs=2").dropout
      0.3
    """
    name, *settings = text.split(",")
    if name not in fm.RECIPES:
        raise fm.ConfigError(
            f"{name!r} is neither a folder nor a recipe; the recipes are {', '.join(fm.RECIPES)}"
        )
    fields = {field.name: field for field in dataclasses.fields(fm.Recipe)}
    changes: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or key not in fields:
            raise fm.ConfigError(
                f"{setting!r} is no setting of a recipe; write NAME=VALUE with one of "
                f"{', '.join(fields)}"
            )
        absent = value == "none" and fields[key].default is None
        changes[key] = None if absent else _value(value)
    return dataclasses.replace(fm.RECIPES[name], **changes)


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _table(comparison: dict[str, Any]) -> Table:
    difference, mcnemar = comparison["difference"], comparison["mcnemar"]
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for side in ("a", "b"):
        accuracy = interval(comparison[side]["test_accuracy"])
        table.add_row(f"test accuracy of {side}", accuracy)
    table.add_row("they differ in", "\n".join(comparison["differs_in"]) or "nothing")
    points = {name: _points(difference[name]) for name in ("mean", "low", "high")}
    text = f"[bold]{points['mean']}[/bold] points"
    if difference["low"] is not None:
        text += f", 95% interval {points['low']} to {points['high']} (n = {difference['n']})"
    table.add_row("b over a", text)
    if comparison["sign_flip_p"] is not None:
        table.add_row(
            "sign-flip test over seeds",
            f"p = {comparison['sign_flip_p']:.4f}; of so many seeds it is at least "
            f"{comparison['sign_flip_smallest']:.4f}",
        )
    table.add_row(
        "McNemar's test over images",
        f"p = {mcnemar['p']:.4f}; {mcnemar['only_a_right']:,} right for a alone, "
        f"{mcnemar['only_b_right']:,} for b alone, over all seeds",
    )
    effect = comparison["minimum_detectable_effect"]
    if effect is not None:
        table.add_row(
            "minimum detectable difference",
            f"{100 * effect:.2f} points, for a t test at 5% with a power of 80%",
        )
        needed = comparison["seeds_needed"]
        table.add_row(
            "to detect the observed difference",
            "more than 10,000 seeds" if needed is None else f"{needed:,} seeds",
        )
    return table


def _points(share: float | None) -> str:
    return "" if share is None else f"{100 * share:+.2f}"


if __name__ == "__main__":
    sys.exit(main())
