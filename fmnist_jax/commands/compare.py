"""Compares two recipes over the same seeds.

    fmnist-jax compare small_dropout --against small_dropout --dropout 0.3
    fmnist-jax compare small_dropout --epochs 10 --against same_3x3 --seeds 5
    fmnist-jax compare runs/a --against runs/b

A side is the name of a recipe, or a folder that `run.py --seeds` wrote. Training flags before
`--against` apply to both sides, those after it to the second side only. A network beside a folder
is trained on the seeds, the splits and the data of the folder's runs. Trained runs are reused by
every comparison with the same `--workdir`; the result is in `comparison.json`.
"""

import argparse
import copy
import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

import fmnist_jax as fm
from fmnist_jax.commands import flags, shell
from fmnist_jax.config import from_dict
from fmnist_jax.errors import ConfigError
from fmnist_jax.recipes import find_recipe
from fmnist_jax.runs import files
from fmnist_jax.runs.plan import Plan, create_plan

# With five seeds, the smallest p-value of a sign-flip test is 0.0625.
_NUM_SEEDS = 6


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
    parser.add_argument(
        "--seeds",
        type=int,
        metavar="N",
        help=f"runs of each side ({_NUM_SEEDS}); not with a folder",
    )
    parser.add_argument(
        "--workdir",
        type=Path,
        metavar="DIR",
        default=Path("runs"),
        help="folder of comparison.json and of the runs' folders (%(default)s)",
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


class _Side(NamedTuple):
    """Folders of finished runs, or those of the runs to train, with their plans."""

    workdirs: list[Path]
    plans: list[Plan]


def _run(first: argparse.Namespace, second: argparse.Namespace, console: Console) -> int:
    # Everything is planned first, so that bad settings are refused before any training.
    finished = [_find_runs(arguments.side) for arguments in (first, second)]
    _check_flags(first, second, finished)
    sides = [_Side(workdirs, []) for workdirs in finished]
    if not all(finished):
        sides = _plan_runs(first, second, finished)
    plans = [plan for side in sides for plan in side.plans]
    if plans:
        executor = flags.create_executor(second)
        runs = [plan.run for plan in plans]
        executor(runs, plans[0].dataset, [fm.ConsoleProgress(console)])
    comparison = fm.compare(sides[0].workdirs, sides[1].workdirs)
    files.make_folder(second.workdir)
    files.write_json(second.workdir / "comparison.json", comparison)
    console.print()
    shell.print_facts(console, _facts(comparison), bold="b minus a", sample=comparison["sample"])
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


def _check_flags(
    first: argparse.Namespace, second: argparse.Namespace, finished: Sequence[Sequence[Path]]
) -> None:
    """Refuses flags that would have no effect."""
    if not any(finished):
        return
    if second.seeds is not None or "seed" in second:
        raise ConfigError("the seeds are those of the folder's runs; leave out --seeds and --seed")
    given = [flags.given_settings(arguments) for arguments in (first, second)]
    # Flags of the first side apply to a recipe on either side.
    if finished[1] and ((finished[0] and given[1]) or given[0] != given[1]):
        raise ConfigError(
            f"the runs in {second.side} are finished; training flags do not apply to them"
        )


def _plan_runs(
    first: argparse.Namespace, second: argparse.Namespace, finished: Sequence[list[Path]]
) -> list[_Side]:
    """Plans the runs of the sides that are recipes."""
    workdirs = finished[0] or finished[1]
    settings = [files.read_json(workdir / files.CONFIG) for workdir in workdirs]
    dataset = flags.load_data(second)
    flags.check_excluded(first, dataset)
    if settings:
        if dataset.sha256 != settings[0]["data_sha256"]:
            raise ConfigError(
                f"{workdirs[0]} was trained on other data than {dataset.source}; name its data by "
                "--sample or --data-dir"
            )
        dataset = fm.select_classes(dataset, settings[0]["classes"])
    bases = [from_dict(one, workdir) for one, workdir in zip(settings, workdirs, strict=True)]
    sides = []
    for arguments, workdirs in zip((first, second), finished, strict=True):
        plans = []
        if not workdirs:
            runs = _create_runs(arguments, second, bases)
            folder = flags.name_workdir(second.workdir, runs[0], dataset, seeds=True)
            workdirs = [folder / f"seed-{run.seed}" for run in runs]
            plans = [
                create_plan(dataclasses.replace(run, workdir=workdir), dataset)
                for run, workdir in zip(runs, workdirs, strict=True)
            ]
        sides.append(_Side(workdirs, plans))
    if sides[0].workdirs == sides[1].workdirs:
        raise ConfigError("both sides have the same settings; give a flag after --against")
    return sides


def _create_runs(
    arguments: argparse.Namespace, shared: argparse.Namespace, bases: Sequence[fm.Run]
) -> list[fm.Run]:
    """Returns a run for each seed: those of finished runs, or else those of the flags."""
    create = functools.partial(flags.create_run, arguments, arguments.side, shared.workdir)
    if bases:
        return [create(base=base) for base in bases]
    num_seeds = _NUM_SEEDS if shared.seeds is None else shared.seeds
    if num_seeds < 1:
        raise ConfigError(f"seeds is {num_seeds}; expected an integer of at least 1")
    first_seed = getattr(shared, "seed", 0)
    seeds = range(first_seed, first_seed + num_seeds)
    return [dataclasses.replace(create(), seed=seed) for seed in seeds]


def _facts(comparison: dict[str, Any]) -> dict[str, str]:
    difference, mcnemar = comparison["difference"], comparison["mcnemar"]
    facts = {
        f"test accuracy of {side}": shell.format_accuracy(comparison[side]["test_accuracy"])
        for side in ("a", "b")
    }
    facts["settings that differ"] = "\n".join(comparison["differs_in"]) or "none"
    facts["b minus a"] = f"{_points(difference['mean'])} points"
    if difference["low"] is not None:
        facts["b minus a"] += (
            f", 95% interval {_points(difference['low'])} to {_points(difference['high'])} "
            f"(n = {difference['n']})"
        )
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


def _points(fraction: float) -> str:
    return f"{100 * fraction:+.2f}"
