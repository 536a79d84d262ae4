"""Trains one of the networks on Fashion-MNIST and reports.

    python experiments/run.py --arch small_dropout

Everything is written to a folder under `runs/`; the same command goes on where it stopped.
Exit status: 0 done, 1 a verification that failed, 2 bad usage, bad input or a state that could not
be saved, 3 diverged, 130 or 143 interrupted.
"""

import signal

# Until training begins, Ctrl-C just ends the process: raised as an exception in the middle of an
# import or of JAX's start, it would print a traceback or worse. `fit` then saves before it stops.
# What the shell has this process ignore, as a job in the background, stays ignored.
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import dataclasses
import hashlib
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import cli
import many_seeds
import resume
from fmnist_jax.runs.program import measure_cost
from rich.console import Console
from rich.table import Table

import fmnist_jax as fm
from fmnist_jax import config
from fmnist_jax.runs import files
from fmnist_jax.runs.fit import fit_plan
from fmnist_jax.runs.plan import Plan, create_plan
from fmnist_jax.xla.cache import enable_compilation_cache


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    arguments = _parser().parse_args(argv)
    return cli.run(_run, arguments, quiet=arguments.quiet)


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
    parser.add_argument("--image-size", type=int, help="side that images are resized to, in pixels")
    parser.add_argument("--dtype", help=", ".join(get_args(config.DtypeName)))
    parser.add_argument("--augmentation-strength", type=float, help="share of its ranges; 1 is all")
    parser.add_argument("--dropout", type=float, help="one rate for every dropout, [0, 1)")
    parser.add_argument("--label-smoothing", type=float, help="share of the target, [0, 1)")
    parser.add_argument("--weight-decay", type=float, help="decoupled, of the kernels")
    parser.add_argument("--seed", type=int, default=0, help="root of all randomness (%(default)s)")
    parser.add_argument("--seeds", type=int, help="train so many times: seed S, S + 1, and so on")
    cli.add_data_flags(parser)
    parser.add_argument("--classes", help="train on some classes, as in sandal,bag,1")
    parser.add_argument("--train-examples", type=int, help="train on so many examples only")
    parser.add_argument("--exclude", type=Path, help="file of training images to leave out")
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
    parser.add_argument(
        "--replay", type=int, metavar="STEP", help="show what an update of the run in --workdir saw"
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
    if arguments.exclude is not None and arguments.classes is not None:
        raise fm.ConfigError(
            "--exclude counts all training images, so it does not go with --classes"
        )
    run = _create_run(arguments)
    if arguments.verify_resume:
        flags = ["--no-cache"] if arguments.no_cache else []
        return 0 if resume.verify(run.recipe, console, flags) else 1
    if not arguments.no_cache:
        enable_compilation_cache()
    dataset = cli.load_data(arguments)
    if arguments.exclude is not None:
        _check_origin(arguments.exclude, dataset)
    if arguments.replay is not None:
        return _replay(arguments, dataset, console)
    if arguments.classes is not None:
        dataset = fm.select_classes(dataset, arguments.classes)
    if arguments.workdir is None:
        run = dataclasses.replace(run, workdir=_default_workdir(run, dataset, arguments.seeds))

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

    if arguments.seeds is not None:
        many_seeds.train(run, dataset, arguments.seeds, console)
        return 0
    result = fit_plan(plan, progress=fm.ConsoleProgress(console))
    console.print("Drawing the report ...")
    from fmnist_jax.report.run import (
        write_report,  # imported here: matplotlib is needed only now
    )

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
        "augmentation_strength", "image_size", "dropout", "label_smoothing", "weight_decay",
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
        exclude=[] if arguments.exclude is None else _read_positions(arguments.exclude),
        checkpoint_every=arguments.checkpoint_every,
        keep_every=arguments.keep_every,
        workdir=arguments.workdir or Path("runs"),
    )


def _read_positions(path: Path) -> list[int]:
    """One whole number a line; what follows a # is a comment."""
    text = path.read_text(errors="replace")
    lines = [line.partition("#")[0].strip() for line in text.splitlines()]
    wrong = next((line for line in lines if line and not line.isdecimal()), None)
    if wrong is not None:
        raise fm.ConfigError(f"{path} has the line {wrong!r}; each is the number of an image")
    return [int(line) for line in lines if line]


def _check_origin(path: Path, dataset: fm.Dataset) -> None:
    """Refuses a list whose comments name the SHA-256 of other data."""
    named = re.search(r"#.*SHA-256 ([0-9a-f]{64})", path.read_text(errors="replace"))
    if named is not None and named[1] != dataset.sha256:
        raise fm.ConfigError(
            f"{path} lists images of other data, with SHA-256 {named[1][:12]}...; this is "
            f"{dataset.source}, {dataset.sha256[:12]}..."
        )


def _replay(arguments: argparse.Namespace, dataset: fm.Dataset, console: Console) -> int:
    if arguments.workdir is None:
        raise fm.ConfigError("--replay needs --workdir, the folder of the run")
    if arguments.classes is None:
        classes = (files.read_json(arguments.workdir / files.CONFIG) or {}).get("classes")
    else:
        classes = arguments.classes
    if classes is not None:
        dataset = fm.select_classes(dataset, classes)
    console.print("Going to that update ...")
    shown = fm.replay(arguments.workdir, dataset, arguments.replay)
    from fmnist_jax.report.run import (
        write_replay,  # imported here: matplotlib is needed only now
    )

    picture = write_replay(arguments.workdir, shown, dataset.class_names, sample=dataset.sample)
    console.print(
        f"Update {shown.step:,}: mean loss {shown.losses.mean():.4f}, gradient norm "
        f"{shown.gradient_norm:.4f}",
        soft_wrap=True,
    )
    table = Table()
    for heading in ("training image", "label", "loss"):
        table.add_column(heading, justify="right")
    for example, label, loss in zip(shown.examples, shown.labels, shown.losses, strict=True):
        table.add_row(f"{example:,}", dataset.class_names[label], f"{loss:.4f}")
    console.print(table)
    console.print(f"The images as the network saw them: {picture}", soft_wrap=True)
    return 0


def _default_workdir(run: fm.Run, dataset: fm.Dataset, seeds: int | None) -> Path:
    """One folder for each set of settings, so that the same command finds its own run again."""
    settings = [config.to_dict(run), dataset.class_names, dataset.sha256]
    digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    # Without their number, so that more seeds can be added.
    name = f"seed{run.seed}" if seeds is None else f"seeds-from-{run.seed}"
    return Path("runs") / f"{run.recipe.arch}-{name}-{digest[:8]}"


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
    names = ("augmentation_strength", "dropout", "label_smoothing", "weight_decay")
    given = {name.replace("_", " "): getattr(recipe, name) for name in names}
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
        *((name, f"{value:g}") for name, value in given.items() if value is not None),
        ("precision", recipe.dtype),
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
