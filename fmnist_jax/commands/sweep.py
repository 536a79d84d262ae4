r"""Searches for better settings, and checks the best on fresh seeds and the test images.

    fmnist-jax sweep --arch same_3x3 --trials 40 \
        --over learning_rate=log:1e-4:1e-1 dropout=0:0.6 label_smoothing=0:0.2

The study is in `study.db` in the folder of the sweep: the same command continues it, further
processes share it, and Optuna's dashboard opens it. Trials are evaluated on the validation images
only. `--find-learning-rate` draws the loss by learning rate instead.

Exit status: 0 done, 2 bad usage or bad input, 3 the best setting diverged from another seed, 130 or
143 interrupted.
"""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from rich.console import Console

import fmnist_jax as fm
from fmnist_jax.commands import flags, shell
from fmnist_jax.config import short_name
from fmnist_jax.digest import sha256_json
from fmnist_jax.errors import ConfigError
from fmnist_jax.runs import files
from fmnist_jax.runs.plan import Plan, create_plan
from fmnist_jax.studies.sweep import format_params, parse_domain, sweep


def create_parser() -> argparse.ArgumentParser:
    """Creates the parser of the command line."""
    parser = flags.Parser(description="Searches for better settings.")
    flags.add_recipe_flag(parser, required=True)
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
        "--seeds", type=int, metavar="N", default=5, help="seeds of the best setting (%(default)s)"
    )
    flags.add_workdir_flag(
        parser, None, "folder of the sweep; default: a folder in runs/ named by the settings"
    )
    flags.add_output_flags(parser)
    flags.add_training_flags(parser)
    return parser


def _run(arguments: argparse.Namespace, console: Console) -> int:
    dataset = flags.load_data(arguments, console)
    run = flags.create_run(arguments, arguments.arch, Path())
    plan = create_plan(run, dataset)
    settings = plan.settings
    if arguments.find_learning_rate:
        workdir = arguments.workdir or _name_workdir(run, "learning-rate", settings)
        _find(plan, workdir, console)
        return 0
    space = dict(parse_domain(text) for text in arguments.over)
    if len(space) < len(arguments.over):
        raise ConfigError("--over names a setting twice")
    if fixed := [name for name in space if _is_given(name, flags.given_settings(arguments))]:
        raise ConfigError(f"{fixed[0]} is searched and has a flag of its own; give one of the two")
    settings["space"] = sorted(arguments.over)
    workdir = arguments.workdir or _name_workdir(run, "sweep", settings)
    console.print(f"The sweep is in {workdir}. The same command resumes it.", highlight=False)
    report = sweep(
        dataclasses.replace(run, workdir=workdir),
        dataset,
        space,
        arguments.trials,
        num_seeds=arguments.seeds,
        hooks=[fm.ConsoleProgress(console)],
    )
    from fmnist_jax.report.sweep import write_sweep_report

    page = write_sweep_report(workdir)
    best, optimism = report["best"], report["optimism"]
    facts = {
        "best setting": f"{format_params(best['params'])} (trial {best['number']})",
        "validation accuracy of the trial": f"{best['val_accuracy']:.2%}",
        "fresh seeds, validation": shell.format_accuracy(report["val_accuracy"]),
        "optimism of the search": f"{100 * optimism['mean']:.2f} points "
        f"({100 * optimism['low']:.2f} to {100 * optimism['high']:.2f})",
        "fresh seeds, test": shell.format_accuracy(report["test_accuracy"]),
        "report": str(page),
    }
    shell.print_facts(console, facts, sample=report["sample"])
    return 0


def _is_given(name: str, given: dict[str, Any]) -> bool:
    field, _, option = name.partition(".")
    return field in given and (not option or option in given[field])


def _name_workdir(run: fm.Run, task: str, settings: dict[str, Any]) -> Path:
    return Path("runs") / f"{short_name(run.recipe.arch)}-{task}-{sha256_json(settings)[:8]}"


def _find(plan: Plan, workdir: Path, console: Console) -> None:
    from fmnist_jax.analysis.plots import encode, rate_curve

    dataset = plan.dataset
    console.print(f"Compiling the training loop of {short_name(plan.run.recipe.arch)} ...")
    curve = fm.find_learning_rate(plan.create_state(), plan.inputs, config=plan.config)
    files.make_folder(workdir)
    path = workdir / "learning_rate.png"
    files.write_bytes(path, encode(rate_curve(curve), sample=dataset.sample))
    facts = {"suggested learning rate": f"{curve.suggestion:.2g}", "curve": str(path)}
    shell.print_facts(console, facts, sample=dataset.sample)


main = shell.main_of(_run, create_parser)
