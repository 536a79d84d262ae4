"""Measures the seconds of training until an accuracy is reached, beside other frameworks.

    python experiments/bench/time_to_accuracy.py --seeds 3

fmnist_jax trains its own recipes; Keras on TensorFlow the recipe of small_dropout; PyTorch the
network and recipe of sprint_94, written as its users would. Each training has a process of its own,
and no two run at once. Accuracy on the test images is measured after
each epoch and chooses nothing. Compilation and evaluation are not counted.

Exit status: 0 done, 1 a competitor failed, 2 bad usage, 130 or 143 interrupted.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import contextlib
import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from bench import add_place_flags, raise_exit
from competitors import OURS, Child, ChildError
from rich.console import Console
from rich.table import Table
from summary import draw_curves

import fmnist_jax as fm
from fmnist_jax.analysis.plots import encode
from fmnist_jax.data.split import stratified_split
from fmnist_jax.errors import DataError
from fmnist_jax.nn.sprint import whitening_patterns
from fmnist_jax.runs import environment, files

# Competitor, module with its `curve`, and recipe.
CURVES = {
    "fmnist_jax, sprint_91": (OURS, "ours", "sprint_91"),
    "fmnist_jax, sprint_93": (OURS, "ours", "sprint_93"),
    "fmnist_jax, sprint_94": (OURS, "ours", "sprint_94"),
    "Keras on TensorFlow, small_dropout": ("keras_tensorflow", "keras_fit", "small_dropout"),
    "PyTorch, sprint_94": ("torch_channels_last", "torch_sprint", "sprint_94"),
}
TARGETS = (0.9133, 0.93, 0.94)


def first_reached(curves: Sequence[Sequence[tuple[float, float]]], target: float) -> float | None:
    """Returns the mean seconds at the first epoch whose mean accuracy reaches the target.

    Args:
      curves: for each seed (seconds since the start, accuracy) after each epoch.
      target: accuracy, a fraction.

    Returns:
      Seconds; None if no epoch reaches it.

    Example:
      >>> first_reached([[(1.0, 0.5), (2.0, 0.7)], [(1.2, 0.6), (2.4, 0.9)]], 0.75)
      2.2
    """
    seconds, accuracies = np.mean(curves, axis=0).T
    reached = np.flatnonzero(accuracies >= target)
    return float(seconds[reached[0]]) if len(reached) else None


def create_parser() -> argparse.ArgumentParser:
    """Creates the parser of the command line."""
    parser = argparse.ArgumentParser(description="Measures the time to an accuracy.")
    parser.add_argument("--seeds", type=int, metavar="N", default=3, help="trainings (%(default)s)")
    parser.add_argument(
        "--seed", type=int, metavar="S", default=0, help="seed of the first training (%(default)s)"
    )
    parser.add_argument(
        "--curve", nargs="+", metavar="NAME", choices=list(CURVES), default=list(CURVES)
    )
    parser.add_argument(
        "--epochs", type=int, metavar="N", help="default: those of the recipe; for a quick check"
    )
    add_place_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    parser = create_parser()
    arguments = parser.parse_args(argv)
    if arguments.seeds < 1 or (arguments.epochs or 1) < 1:
        parser.error("--seeds and --epochs must be at least 1")
    if arguments.seed < 0:
        parser.error(f"--seed is {arguments.seed}; expected an integer of at least 0")
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 130)
    try:
        _run(arguments, console)
    except ChildError as error:
        console.print(str(error), style="red", markup=False)
        return 1
    except (DataError, OSError) as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 2
    return 0


def _run(arguments: argparse.Namespace, console: Console) -> None:
    arguments.workdir.mkdir(parents=True, exist_ok=True)
    dataset = fm.load_fashion_mnist()
    curves: dict[str, list[Any]] = {name: [] for name in arguments.curve}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(arguments.seed, arguments.seed + arguments.seeds):
            data = Path(folder) / f"seed-{seed}.npz"
            _write(data, dataset, seed)
            for name in curves:
                curve = _train(name, data, seed, arguments, console)
                curves[name].append(curve)
                console.print(
                    f"{name}, seed {seed}: {curve[-1][1]:.2%} after {curve[-1][0]:,.1f} s"
                )
            report = {"machine": environment.describe(), "curves": curves}
            files.write_json(arguments.workdir / "time_to_accuracy.json", report)
            picture = encode(draw_curves(curves, TARGETS))
            files.write_bytes(arguments.workdir / "time_to_accuracy.png", picture)
    console.print(_table(curves))
    console.print(f"The results are in {arguments.workdir}.")


def _write(path: Path, dataset: fm.Dataset, seed: int) -> None:
    """Writes the data, the training split that `run.py` draws, and the patterns that whiten."""
    val_fraction = fm.RECIPES["sprint_94"].val_fraction
    train, _ = stratified_split(fm.create_streams(seed).split, dataset.train_labels, val_fraction)
    np.savez(
        path,
        images=dataset.train_images,
        labels=dataset.train_labels,
        train_examples=train,
        test_images=dataset.test_images,
        test_labels=dataset.test_labels,
        patterns=whitening_patterns(),
    )


def _train(
    name: str, data: Path, seed: int, arguments: argparse.Namespace, console: Console
) -> list[tuple[float, float]]:
    competitor, module, recipe_name = CURVES[name]
    recipe = fm.RECIPES[recipe_name]
    if arguments.epochs is not None:
        recipe = dataclasses.replace(recipe, epochs=arguments.epochs)
    device = arguments.device or jax.default_backend()
    settings = {"recipe": dataclasses.asdict(recipe), "seed": seed}
    with contextlib.closing(Child(competitor, device, data, console.print)) as child:
        return child.ask("curve", module=module, path=str(data), **settings)


def _table(curves: dict[str, list[Any]]) -> Table:
    table = Table(title="Seconds of training to a mean test accuracy")
    for heading in ("", "n", "last epoch, %", *(f"{target:.2%}" for target in TARGETS)):
        table.add_column(heading, justify="right" if table.columns else "left")
    for name, seeds in curves.items():
        seconds, accuracy = np.mean([curve[-1] for curve in seeds], axis=0)
        reached = (first_reached(seeds, target) for target in TARGETS)
        cells = ("" if value is None else f"{value:,.0f}" for value in reached)
        table.add_row(name, str(len(seeds)), f"{accuracy:.2%} after {seconds:,.0f} s", *cells)
    return table


if __name__ == "__main__":
    # An exception, so that the children end with this process.
    signal.signal(signal.SIGTERM, raise_exit)
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, raise_exit)
    sys.exit(main())
