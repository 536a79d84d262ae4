"""Compares two recipes over the same seeds.

    fmnist-jax compare small_dropout --against small_dropout --dropout 0.3
    fmnist-jax compare small_dropout --epochs 10 --against same_3x3 --seeds 5
    fmnist-jax compare runs/a --against runs/b

Both sides are names of recipes, or folders that `run --seeds` wrote. Training flags before
`--against` apply to both sides, those after it to the second side only. Trained runs are reused by
every comparison with the same `--workdir`; the result is in `comparison.json`.
"""

import argparse
import copy
import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

import fmnist_jax as fm
from fmnist_jax.commands import flags, shell
from fmnist_jax.errors import ConfigError
from fmnist_jax.recipes import find_recipe
from fmnist_jax.runs import files
from fmnist_jax.runs.plan import Plan, create_plan
from fmnist_jax.studies.seeds import MACRO_FIGURES, seed_runs

# With five seeds, the smallest p-value of a sign-flip test is 0.0625.
_NUM_SEEDS = 6

_MACRO_NAMES = dict(zip(MACRO_FIGURES, ("balanced accuracy", "macro F1", "AUC"), strict=True))


def main(argv: Sequence[str]) -> int:
    """Runs the command line and returns the exit status."""
    first, second = parse(argv)
    return shell.run(functools.partial(_run, first), second)


def create_parser() -> argparse.ArgumentParser:
    """Creates the parser of one side's arguments."""
    parser = flags.Parser(
        usage="%(prog)s SIDE [flags] --against SIDE [flags]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("side", metavar="SIDE", help="name of a recipe, or folder of runs")
    parser.add_argument("--seeds", type=int, metavar="N", help=f"runs of each side ({_NUM_SEEDS})")
    flags.add_workdir_flag(
        parser, Path("runs"), "folder of comparison.json and of the runs' folders (%(default)s)"
    )
    flags.add_output_flags(parser)
    flags.add_training_flags(parser)
    flags.add_ray_flags(parser)
    return parser


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, argparse.Namespace]:
    """Parses the arguments of both sides; the second has the flags of the first too."""
    parser = create_parser()
    split = list(argv).index("--against") if "--against" in argv else len(argv)
    first = parser.parse_args(argv[:split])
    if split == len(argv):
        parser.error("--against is missing; it is followed by the second side")
    return first, parser.parse_args(argv[split + 1 :], copy.copy(first))


def _run(first: argparse.Namespace, second: argparse.Namespace, console: Console) -> int:
    sides = [_find_runs(arguments.side) for arguments in (first, second)]
    if all(sides):
        if second.seeds is not None or flags.given_settings(second):
            raise ConfigError("the runs in both folders are finished; flags do not apply to them")
    elif any(sides):
        raise ConfigError(
            "compare two folders or two recipes; runs of a recipe that `run --seeds` trained in "
            "runs/ are found again"
        )
    else:
        # Everything is planned first, so that bad settings are refused before any training.
        plans = _plan_runs(first, second, console)
        executor = flags.create_executor(second)
        runs = [plan.run for side in plans for plan in side]
        executor(runs, plans[0][0].dataset, [fm.ConsoleProgress(console)])
        sides = [[plan.run.workdir for plan in side] for side in plans]
    comparison = fm.compare(*sides)
    files.make_folder(second.workdir)
    path = second.workdir / "comparison.json"
    files.write_json(path, comparison)
    facts = _facts(comparison) | {"file": str(path)}
    shell.print_facts(console, facts, bold="b minus a", sample=comparison["sample"])
    return 0


def _find_runs(side: str) -> list[Path]:
    """Returns the folders of a side's finished runs; none if the side is a recipe."""
    folder = Path(side)
    if folder.is_dir():
        found = sorted(path.parent for path in folder.glob(f"seed-*/{files.REPORT}"))
        if not found and not (folder / files.REPORT).exists():
            raise ConfigError(f"{folder} holds no finished run")
        return found or [folder]
    try:
        find_recipe(side)
    except ConfigError as error:
        raise ConfigError(f"{side!r} is neither a folder nor a recipe: {error}") from error
    return []


def _plan_runs(
    first: argparse.Namespace, second: argparse.Namespace, console: Console
) -> list[list[Plan]]:
    """Plans a run of each side for each seed."""
    dataset = flags.load_data(second, console)
    flags.check_excluded(first, dataset)
    num_seeds = _NUM_SEEDS if second.seeds is None else second.seeds
    sides = []
    for arguments in (first, second):
        run = flags.create_run(arguments, arguments.side, second.workdir)
        run = dataclasses.replace(run, seed=getattr(second, "seed", 0))
        folder = flags.name_workdir(second.workdir, run, dataset, seeds=True)
        runs = seed_runs(dataclasses.replace(run, workdir=folder), num_seeds)
        sides.append([create_plan(one, dataset) for one in runs])
    if sides[0][0].run.workdir == sides[1][0].run.workdir:
        raise ConfigError("both sides have the same settings; give a flag after --against")
    return sides


def _facts(comparison: dict[str, Any]) -> dict[str, str]:
    difference, mcnemar = comparison["difference"], comparison["mcnemar"]
    facts = {
        f"test accuracy of {side}": shell.format_accuracy(comparison[side]["test_accuracy"])
        for side in ("a", "b")
    }
    facts["settings that differ"] = "\n".join(comparison["differs_in"]) or "none"
    facts["b minus a"] = _difference(difference)
    macro = [
        f"{name} {_difference(one)}"
        for key, name in _MACRO_NAMES.items()
        if (one := comparison["macro_differences"][key]) is not None
    ]
    if macro:
        facts["b minus a, means over classes"] = "\n".join(macro)
    if comparison["sign_flip_p"] is not None:
        facts["sign-flip test over seeds"] = (
            f"p = {comparison['sign_flip_p']:.4f}; the smallest possible with this number of seeds "
            f"is {comparison['sign_flip_smallest']:.4f}"
        )
    facts["McNemar's test over images"] = (
        f"p = {mcnemar['p']:.4f}; only a correct: {mcnemar['only_a_right']:,}, only b correct: "
        f"{mcnemar['only_b_right']:,}, over all seeds"
    )
    if comparison["minimum_detectable_effect"] is not None:
        facts["minimum detectable effect"] = (
            f"{100 * comparison['minimum_detectable_effect']:.2f} points (80% power)"
        )
        needed = comparison["seeds_needed"]
        facts["seeds needed for this difference"] = (
            "more than 10,000" if needed is None else f"{needed:,} (80% power)"
        )
    return facts


def _difference(estimate: dict[str, Any]) -> str:
    text = f"{_points(estimate['mean'])} points"
    if estimate["low"] is None:
        return text
    low, high = _points(estimate["low"]), _points(estimate["high"])
    return f"{text}, 95% interval {low} to {high} (n = {estimate['n']})"


def _points(fraction: float) -> str:
    return f"{100 * fraction:+.2f}"
