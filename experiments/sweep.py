r"""Searches for better settings, and checks the best on fresh seeds and the test images.

    python experiments/sweep.py --arch same_3x3 --trials 40 \
        --over learning_rate=log:1e-4:1e-1 dropout=0:0.6 label_smoothing=0:0.2

The study is in `study.db` in the folder of the sweep: the same command continues it, further
processes share it, and Optuna's dashboard opens it. Trials see the validation images alone.
`--find-learning-rate` draws the loss by learning rate instead.

Exit status: 0 done, 2 bad usage or bad input, 3 the best setting diverged from another seed, 130 or
143 interrupted.
"""

import signal

# Finished trials are saved, so Ctrl-C ends the process.
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cli
import jax.numpy as jnp
from rich.console import Console

import fmnist_jax as fm
from fmnist_jax.digest import sha256_json
from fmnist_jax.errors import ConfigError
from fmnist_jax.runs import files
from fmnist_jax.runs.plan import Plan, create_plan
from fmnist_jax.studies.sweep import format_params, parse_domain, sweep


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    return cli.run(_run, create_parser().parse_args(argv))


def create_parser() -> argparse.ArgumentParser:
    """Creates the parser of the command line."""
    parser = cli.Parser(description="Searches for better settings.")
    parser.add_argument("--arch", choices=list(fm.RECIPES), required=True, help="recipe")
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument(
        "--over",
        nargs="+",
        metavar="NAME=LOW:HIGH",
        help="settings to search: name=low:high, name=log:low:high or name=choice,choice",
    )
    task.add_argument(
        "--find-learning-rate", action="store_true", help="draw the loss by learning rate"
    )
    parser.add_argument(
        "--trials", type=int, metavar="N", default=40, help="finished trials (%(default)s)"
    )
    parser.add_argument(
        "--seeds",
        type=int,
        metavar="N",
        default=5,
        help="fresh seeds of the best setting (%(default)s)",
    )
    parser.add_argument(
        "--workdir",
        type=Path,
        metavar="DIR",
        help="folder of the sweep; default: a folder in runs/ named by the settings",
    )
    cli.add_output_flags(parser)
    cli.add_training_flags(parser)
    return parser


def _run(arguments: argparse.Namespace, console: Console) -> int:
    dataset = cli.load_data(arguments)
    run = cli.create_run(arguments, arguments.arch, Path())
    plan = create_plan(run, dataset)
    settings = plan.settings
    if arguments.find_learning_rate:
        workdir = arguments.workdir or _name_workdir(arguments.arch, "learning-rate", settings)
        _find(plan, workdir, console)
        return 0
    space = dict(parse_domain(text) for text in arguments.over)
    if len(space) < len(arguments.over):
        raise ConfigError("--over names a setting twice")
    if fixed := [name for name in space if name in cli.training_settings(arguments)]:
        raise ConfigError(f"{fixed[0]} is searched and has a flag of its own; give one of the two")
    settings["space"] = sorted(arguments.over)
    workdir = arguments.workdir or _name_workdir(arguments.arch, "sweep", settings)
    console.print(
        f"The sweep is in {workdir}. The same command continues it after Ctrl-C.",
        highlight=False,
    )
    report = sweep(
        dataclasses.replace(run, workdir=workdir),
        dataset,
        space,
        arguments.trials,
        num_seeds=arguments.seeds,
        progress=fm.ConsoleProgress(console),
    )
    from fmnist_jax.report.sweep import write_sweep_report

    page = write_sweep_report(workdir)
    best, optimism = report["best"], report["optimism"]
    facts = {
        "best setting": f"{format_params(best['params'])} (trial {best['number']})",
        "validation accuracy of the trial": f"{best['val_accuracy']:.2%}",
        "fresh seeds, validation": cli.format_accuracy(report["val_accuracy"]),
        "optimism of the search": f"{100 * optimism['mean']:.2f} points "
        f"({100 * optimism['low']:.2f} to {100 * optimism['high']:.2f})",
        "fresh seeds, test": cli.format_accuracy(report["test_accuracy"]),
        "report": str(page),
    }
    cli.print_facts(console, facts, sample=report["sample"])
    return 0


def _name_workdir(arch: str, task: str, settings: dict[str, Any]) -> Path:
    return Path("runs") / f"{arch}-{task}-{sha256_json(settings)[:8]}"


def _find(plan: Plan, workdir: Path, console: Console) -> None:
    from fmnist_jax.report.plots import encode, rate_curve

    dataset = plan.dataset
    console.print(f"Compiling the training loop of {plan.run.recipe.arch} ...")
    curve = fm.find_learning_rate(
        plan.create_state(),
        jnp.asarray(dataset.train_images),
        jnp.asarray(dataset.train_labels),
        jnp.asarray(plan.train_examples),
        plan.streams,
        plan.hyperparams,
        config=plan.config,
    )
    files.make_folder(workdir)
    path = workdir / "learning_rate.png"
    files.write_bytes(path, encode(rate_curve(curve), sample=dataset.sample))
    facts = {"suggested learning rate": f"{curve.suggestion:.2g}", "curve": str(path)}
    cli.print_facts(console, facts, sample=dataset.sample)


if __name__ == "__main__":
    sys.exit(main())
