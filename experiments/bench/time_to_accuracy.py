"""Measures the seconds of training until an accuracy is reached, beside other frameworks.

    python experiments/bench/time_to_accuracy.py --seeds 3

fmnist_jax trains its own recipes; Keras on TensorFlow the recipe of small_dropout; PyTorch the
network and recipe of sprint_94, written as its users would. Each training has a process of its own,
and no two run at once. Accuracy on the test images is measured after each epoch and chooses
nothing. Compilation and evaluation are not counted.

Exit status: 0 done, 1 a competitor failed, 2 bad usage, 130 or 143 interrupted.
"""

import argparse
import contextlib
import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import competitors
import numpy as np
from competitors import OURS, Child
from rich.console import Console
from summary import draw_curves

import fmnist_jax as fm
from fmnist_jax.analysis.plots import encode
from fmnist_jax.data.split import stratified_split
from fmnist_jax.nn.sprint import whitening_patterns
from fmnist_jax.runs import environment, files

# Competitor, module with its `curve`, and recipe.
CURVES = {
    "fmnist_jax, sprint_91": (OURS, "ours", "sprint_91"),
    "fmnist_jax, sprint_93": (OURS, "ours", "sprint_93"),
    "fmnist_jax, sprint_94": (OURS, "ours", "sprint_94"),
    "Keras on TensorFlow, small_dropout": ("keras_tensorflow", "keras_fit", "small_dropout"),
    "PyTorch, sprint_94": ("torch", "torch_sprint", "sprint_94"),
}
TARGETS = (0.9133, 0.93, 0.94)


def first_reached(curves: Sequence[Sequence[tuple[float, float]]], target: float) -> float | None:
    """Returns the mean seconds at the first epoch whose mean accuracy reaches the target.

    `curves` has the seconds and the accuracy after each epoch of each seed.
    """
    seconds, accuracies = np.mean(curves, axis=0).T
    reached = np.flatnonzero(accuracies >= target)
    return float(seconds[reached[0]]) if len(reached) else None


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    parser = competitors.create_parser(
        "Measures the time to an accuracy.", "runs/bench",
        seeds=(3, "trainings"), seed=(0, "seed of the first training"),
    )  # fmt: skip
    parser.add_argument(
        "--curve", nargs="+", metavar="NAME", choices=list(CURVES), default=list(CURVES)
    )
    parser.add_argument("--epochs", type=int, metavar="int", help="for a quick check")
    arguments = competitors.parse(parser, argv, "seeds")
    if arguments.seed < 0 or (arguments.epochs or 1) < 1:
        parser.error("--seed must be at least 0 and --epochs at least 1")
    return competitors.run(_run, arguments)


def _run(arguments: argparse.Namespace, console: Console) -> int:
    dataset = fm.load_fashion_mnist()
    curves: dict[str, list[Any]] = {name: [] for name in arguments.curve}
    for seed in range(arguments.seed, arguments.seed + arguments.seeds):
        with tempfile.TemporaryDirectory() as folder:
            data = Path(folder) / "data.npz"
            _write(data, dataset, seed)
            for name, seeds in curves.items():
                seeds.append(_train(name, data, seed, arguments))
                seconds, accuracy = seeds[-1][-1]
                console.print(f"{name}, seed {seed}: {accuracy:.2%} after {seconds:,.1f} s")
        report = {"machine": environment.describe(), "curves": curves}
        files.write_json(arguments.workdir / "time_to_accuracy.json", report)
        picture = encode(draw_curves(curves, TARGETS))
        files.write_bytes(arguments.workdir / "time_to_accuracy.png", picture)
    for name, seeds in curves.items():
        reached = {target: first_reached(seeds, target) for target in TARGETS}
        times = [f"{target:.2%} after {s:,.0f} s" for target, s in reached.items() if s is not None]
        console.print(f"{name}, mean of {len(seeds)} seeds: {', '.join(times) or 'no target'}")
    console.print(f"The results are in {arguments.workdir}.")
    return 0


def _write(path: Path, dataset: fm.Dataset, seed: int) -> None:
    """Writes the data, the training split that `run.py` draws, and the patterns that whiten."""
    val_fraction = fm.RECIPES["sprint_94"].val_fraction
    train, _ = stratified_split(fm.create_streams(seed).split, dataset.train_labels, val_fraction)
    np.savez(
        path, images=dataset.train_images, labels=dataset.train_labels, train_examples=train,
        test_images=dataset.test_images, test_labels=dataset.test_labels,
        patterns=whitening_patterns(),
    )  # fmt: skip


def _train(name: str, data: Path, seed: int, arguments: argparse.Namespace) -> Any:
    competitor, module, recipe_name = CURVES[name]
    recipe = fm.RECIPES[recipe_name]
    recipe = dataclasses.replace(recipe, epochs=arguments.epochs or recipe.epochs)
    with contextlib.closing(Child(competitor, arguments.device, data)) as child:
        return child.call(f"{module}.curve", recipe=dataclasses.asdict(recipe), seed=seed)


if __name__ == "__main__":
    competitors.exit_on_signals()
    sys.exit(main())
