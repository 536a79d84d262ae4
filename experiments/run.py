"""Trains one of the networks on Fashion-MNIST and reports.

    python experiments/run.py --arch small_dropout

Everything is written to a folder under `runs/`; the same command goes on where it stopped.
Exit status: 0 done, 1 a verification that failed, 2 bad usage, bad input or a state that could not
be saved, 3 diverged, 130 or 143 interrupted.
"""

import signal

# Until training begins, Ctrl-C just ends the process: raised as an exception in the middle of an
# import or of JAX's start, it would print a traceback or worse. `fit` then saves before it stops.
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import dataclasses
import hashlib
import json
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import resume
from rich.console import Console
from rich.table import Table

import fmnist_jax as fm
from fmnist_jax import config
from fmnist_jax.compile import keep_compiled
from fmnist_jax.plan import Plan, create_plan, measure_cost


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    arguments = _parser().parse_args(argv)
    console, errors = Console(quiet=arguments.quiet), Console(stderr=True)

    def show_warning(message, *_args, **_kwargs) -> None:
        errors.print(f"warning: {message}", style="bold yellow", highlight=False, markup=False)

    with warnings.catch_warnings():
        for category in (fm.DataWarning, fm.CheckpointWarning):
            warnings.simplefilter("always", category)
        warnings.showwarning = show_warning
        try:
            return _run(arguments, console)
        except (fm.ConfigError, fm.DataError, fm.DamagedFileError, OSError) as error:
            message, status = f"error: {error}", 2
        except resume.VerificationError as error:
            message, status = f"not verified: {error}", 1
        except fm.DivergedError as error:
            message, status = f"diverged: {error}", 3
        except fm.Interrupted as stop:
            message, status = str(stop), 128 + stop.signal_number
    errors.print(message, highlight=False, markup=False, soft_wrap=True)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Trains a network on Fashion-MNIST and reports.",
        epilog="The default of every training flag is the recipe's; --list shows the recipes.",
    )
    parser.add_argument("--arch", default="small_dropout", help="network and recipe (%(default)s)")
    parser.add_argument("--epochs", type=int, help="passes over the training images")
    parser.add_argument("--batch-size", type=int, help="images an update")
    parser.add_argument("--learning-rate", type=float, help="peak of the schedule")
    parser.add_argument("--optimizer", help=", ".join(get_args(config.OptimizerName)))
    parser.add_argument("--schedule", help=", ".join(get_args(config.ScheduleName)))
    parser.add_argument("--augmentation", help=", ".join(get_args(config.AugmentationName)))
    parser.add_argument("--dtype", help=", ".join(get_args(config.DtypeName)))
    parser.add_argument("--seed", type=int, default=0, help="root of all randomness (%(default)s)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--data-dir", type=Path, help="folder with the IDX files, or TFDS directory"
    )
    source.add_argument("--sample", action="store_true", help="use the embedded sample of the data")
    parser.add_argument("--classes", help="train on some classes, as in sandal,bag,1")
    parser.add_argument("--train-examples", type=int, help="train on so many examples only")
    parser.add_argument("--val-fraction", type=float, help="share held out for validation, [0, 1)")
    parser.add_argument("--workdir", type=Path, help="folder of the run's files")
    parser.add_argument(
        "--checkpoint-every",
        default="1ep",
        help="updates, epochs or seconds, as in 500st, 1ep, 60s (%(default)s)",
    )
    parser.add_argument("--keep-every", help="keep checkpoints at multiples of it, as in 10ep")
    parser.add_argument(
        "--verify-resume",
        action="store_true",
        help="show on this machine that a run that is killed goes on to the same bits",
    )
    parser.add_argument("--dry-run", action="store_true", help="show what would be trained")
    parser.add_argument("--list", action="store_true", help="show the recipes")
    parser.add_argument(
        "--no-cache", action="store_true", help="compile anew, and keep nothing of it"
    )
    parser.add_argument("--quiet", action="store_true", help="print errors and warnings only")
    return parser


def _run(arguments: argparse.Namespace, console: Console) -> int:
    if arguments.list:
        _print_recipes(console)
        return 0
    run = _create_run(arguments)
    if arguments.verify_resume:
        flags = ["--no-cache"] if arguments.no_cache else []
        return 0 if resume.verify(run.recipe.arch, console, flags) else 1
    if not arguments.no_cache:
        keep_compiled()
    dataset = fm.load_fashion_mnist(arguments.data_dir, sample=arguments.sample)
    if arguments.classes is not None:
        dataset = fm.select_classes(dataset, arguments.classes)
    if arguments.workdir is None:
        run = dataclasses.replace(run, workdir=_default_workdir(run, dataset))

    plan = create_plan(run, dataset)
    _print_plan(plan, console)
    if arguments.dry_run:
        console.print("Compiling the training loop ...")
        cost = measure_cost(plan)
        console.print(
            f"One update takes {cost.flops / 1e9:,.3f} GFLOP; the loop needs "
            f"{cost.bytes / 2**20:,.0f} MiB with the training images. Nothing was trained."
        )
        return 0

    result = fm.fit(run, dataset, progress=fm.ConsoleProgress(console))
    console.print("Drawing the report ...")
    from fmnist_jax.report import write_report  # imported here: matplotlib is needed only now

    page = write_report(run.workdir)
    _print_summary(result, page, console)
    return 0


def _create_run(arguments: argparse.Namespace) -> fm.Run:
    if arguments.arch not in fm.RECIPES:
        raise fm.ConfigError(
            f"unknown architecture {arguments.arch!r}; choose one of {', '.join(fm.RECIPES)}"
        )
    names = (
        "epochs", "batch_size", "learning_rate", "optimizer", "schedule", "augmentation",
        "dtype", "val_fraction",
    )  # fmt: skip
    given = {name: getattr(arguments, name) for name in names}
    recipe = dataclasses.replace(
        fm.RECIPES[arguments.arch],
        **{name: value for name, value in given.items() if value is not None},
    )
    return fm.Run(
        recipe=recipe,
        seed=arguments.seed,
        train_examples=arguments.train_examples,
        checkpoint_every=arguments.checkpoint_every,
        keep_every=arguments.keep_every,
        workdir=arguments.workdir or Path("runs"),
    )


def _default_workdir(run: fm.Run, dataset: fm.Dataset) -> Path:
    """One folder for each set of settings, so that the same command finds its own run again."""
    settings = [config.to_dict(run), dataset.class_names, dataset.sha256]
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    return Path("runs") / f"{run.recipe.arch}-seed{run.seed}-{digest[:8]}"


def _print_recipes(console: Console) -> None:
    table = Table(title="Recipes", show_lines=True)
    for heading in ("--arch", "training", "Keras project", "its claim"):
        table.add_column(heading, overflow="fold")
    for name, recipe in fm.RECIPES.items():
        training = (
            f"{recipe.epochs} epochs of {recipe.batch_size}, {recipe.optimizer} "
            f"{recipe.learning_rate:g} {recipe.schedule}, augmentation {recipe.augmentation}"
        )
        table.add_row(name, training, recipe.source, recipe.claim)
    console.print(table)


def _print_plan(plan: Plan, console: Console) -> None:
    run, recipe, dataset = plan.run, plan.run.recipe, plan.dataset
    console.print(f"[bold]{recipe.arch}[/bold], after the Keras project {recipe.source!r}")
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in (
        (
            "data",
            f"{dataset.source}: {len(plan.train_examples):,} for training, "
            f"{len(plan.val_examples):,} for validation, {len(dataset.test_labels):,} for test; "
            f"{len(dataset.class_names)} classes",
        ),
        (
            "training",
            f"epochs: {recipe.epochs}, updates an epoch: {plan.steps_per_epoch:,}, images an "
            f"update: {recipe.batch_size}, updates in all: {plan.total_steps:,}",
        ),
        (
            "optimizer",
            f"{recipe.optimizer}, learning rate {recipe.learning_rate:g}, {recipe.schedule}",
        ),
        ("augmentation", recipe.augmentation),
        ("seed", str(run.seed)),
        ("files", str(run.workdir)),
    ):
        table.add_row(name, value)
    console.print(table)
    table = Table()
    table.add_column("parameter")
    table.add_column("shape")
    table.add_column("values", justify="right")
    for name, shape, size in plan.parameters:
        table.add_row(name, " x ".join(map(str, shape)), f"{size:,}")
    table.add_section()
    table.add_row("all", "", f"{plan.num_params:,}")
    console.print(table)


def _print_summary(result: fm.Result, page: Path, console: Console) -> None:
    report = result.report
    recipe = report["recipe"]
    val_accuracy = report["val_accuracy"]
    validation = "none" if val_accuracy is None else f"{val_accuracy:.2%}"
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("test accuracy", f"[bold]{report['test_accuracy']:.2%}[/bold]")
    table.add_row("validation, training", f"{validation}, {report['train_accuracy']:.2%}")
    table.add_row("the original's claim", recipe["claim"])
    table.add_row(
        "time",
        f"{report['train_seconds']:,.0f} s training at {report['images_per_second']:,.0f} "
        f"images/s, {report['compile_seconds']:.1f} s compiling",
    )
    table.add_row("report", str(page))
    console.print()
    console.print(table)
    if report["sample"]:
        console.print(
            "These numbers are from the embedded sample and are no results.", style="bold red"
        )


if __name__ == "__main__":
    sys.exit(main())
