"""`fmnist-jax run`: trains a recipe on Fashion-MNIST and writes a report.

    fmnist-jax run --arch small_dropout

All files of a run are in one folder under `runs/`. The same command resumes an interrupted run.
Exit status: 0 done, 1 a verification failed, 2 bad usage, bad input or a state that could not be
saved, 3 diverged, 75 another process was lost, 130 or 143 interrupted.
"""

import argparse
import dataclasses
import functools
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

import fmnist_jax as fm
from fmnist_jax.commands import flags, shell
from fmnist_jax.data.dataset import describe
from fmnist_jax.data.sources import is_fashion_mnist
from fmnist_jax.distributed import processes
from fmnist_jax.distributed.watchdog import Watchdog
from fmnist_jax.errors import ConfigError
from fmnist_jax.fast.rewrite import explain_for_cpu
from fmnist_jax.nn.summary import format_rows
from fmnist_jax.recipes import CLAIMS
from fmnist_jax.runs import files
from fmnist_jax.runs.fit import fit_plan
from fmnist_jax.runs.plan import Plan, create_plan, loop_cost
from fmnist_jax.runs.verify import verify_resume
from fmnist_jax.studies.executors import Executor
from fmnist_jax.studies.sweep import format_params
from fmnist_jax.train.loop import seen_image_shape
from fmnist_jax.train.step import apply_in_training
from fmnist_jax.xla.jit import has_bfloat16_instructions


def create_parser() -> argparse.ArgumentParser:
    """Creates the parser of the command line."""
    parser = flags.Parser(
        description="Trains a recipe on Fashion-MNIST, or other images, and writes a report.",
        epilog="The same command resumes an interrupted run.",
    )
    flags.add_recipe_flag(parser, default="small_dropout")
    parser.add_argument("--seeds", type=int, metavar="N", help="train N runs: seeds S to S + N - 1")
    flags.add_workdir_flag(
        parser, None, "folder of the run; default: a folder in runs/ named by the settings"
    )
    parser.add_argument(
        "--distributed",
        action="store_true",
        help="train with all processes that mpirun, srun or Kubernetes has started",
    )
    parser.add_argument(
        "--log", nargs="+", choices=["tensorboard"], default=[], help="write event files as well"
    )
    task = parser.add_mutually_exclusive_group()
    task.add_argument("--list", action="store_true", help="show the recipes and their claims")
    task.add_argument("--dry-run", action="store_true", help="show the plan without training")
    task.add_argument(
        "--verify-resume",
        action="store_true",
        help="verify on this machine that killed runs resume to identical bits",
    )
    task.add_argument(
        "--replay", type=int, metavar="STEP", help="recompute a step of the run in --workdir"
    )
    flags.add_output_flags(parser)
    flags.add_training_flags(parser)
    flags.add_ray_flags(parser)
    return parser


def _run(arguments: argparse.Namespace, console: Console) -> int:
    if arguments.ray is not None and (arguments.seeds is None or arguments.distributed):
        raise ConfigError("--ray trains many runs at once; combine it with --seeds alone")
    if arguments.log and arguments.seeds is not None:
        raise ConfigError("--log tensorboard logs one run; leave --seeds out")
    if arguments.list:
        _print_recipes(console)
        return 0
    run = flags.create_run(arguments, arguments.arch, arguments.workdir or Path("runs"))
    if arguments.verify_resume:
        return _verify_resume(run.recipe, arguments, console)
    dataset = flags.load_data(arguments, console)
    if arguments.replay is not None:
        return _replay(arguments, dataset, console)
    if arguments.workdir is None:
        workdir = flags.name_workdir(Path("runs"), run, dataset, seeds=arguments.seeds is not None)
        run = dataclasses.replace(run, workdir=workdir)
    plan = create_plan(run, dataset)
    _print_plan(plan, console)
    if arguments.dry_run:
        _print_operations(plan, console)
        console.print("Compiling the training loop ...")
        flops, num_bytes = loop_cost(plan)
        console.print(
            f"A step takes {flops / 1e9:,.3f} GFLOP. The training loop needs "
            f"{num_bytes / 2**20:,.0f} MiB, training images included. Nothing was trained."
        )
    elif arguments.seeds is not None:
        _train_seeds(run, dataset, arguments.seeds, flags.create_executor(arguments), console)
    else:
        _train(plan, arguments.log, console)
    return 0


def _print_operations(plan: Plan, console: Console) -> None:
    """Prints which operations of the network in training have faster forms on this device."""
    state, shape = plan.abstract_state, seen_image_shape(plan.inputs, plan.config)
    images = jax.ShapeDtypeStruct((plan.config.batch_size, *shape), jnp.float32)
    key = jax.eval_shape(jax.random.key, 0)
    apply = functools.partial(apply_in_training, model=plan.model, optimize=False)
    operations = explain_for_cpu(apply, key, images, state.params, state.model_state)
    for replaced, words in ((True, "replaced by faster forms on a CPU"), (False, "not replaced")):
        names = Counter(
            operation.name for operation in operations if operation.replaced == replaced
        )
        text = ", ".join(f"{count} {name}" for name, count in names.items())
        if text:
            console.print(f"Operations {words}: {text}.", highlight=False, soft_wrap=True)


def _train(plan: Plan, log: Sequence[str], console: Console) -> None:
    hooks = _hooks(console)
    if "tensorboard" in log:
        from fmnist_jax.report.tensorboard import TensorBoardHook

        hooks.append(TensorBoardHook(plan.run.workdir / "tensorboard"))
    report = fit_plan(plan, hooks=hooks).report
    if not processes.is_first():
        return
    facts = {"test accuracy": f"{report['test_accuracy']:.2%}"}
    for name in ("val_accuracy", "train_accuracy", "tta_accuracy"):
        if report[name] is not None:
            facts[name.replace("_", " ")] = f"{report[name]:.2%}"
    if report["arch"] in CLAIMS and is_fashion_mnist(report["data"]["sha256"]):
        facts["claim of the Keras project"] = CLAIMS[report["arch"]].text
    facts["time"] = (
        f"{report['train_seconds']:,.0f} s of training at {report['images_per_second']:,.0f} "
        f"images/s, {report['compile_seconds']:.1f} s of compilation"
    )
    console.print()
    shell.print_facts(console, facts, bold="test accuracy", sample=report["sample"])
    from fmnist_jax.report.run import write_report  # matplotlib takes a second to import

    page = write_report(plan.run.workdir)
    console.print(f"The report is {page}.", highlight=False, soft_wrap=True)


def _train_seeds(
    run: fm.Run, dataset: fm.Dataset, num_seeds: int, executor: Executor, console: Console
) -> None:
    summary = fm.fit_seeds(run, dataset, num_seeds, hooks=_hooks(console), executor=executor).report
    if not processes.is_first():
        return
    console.print("Writing the report ...")
    from fmnist_jax.report.seeds import write_seeds_report

    page = write_seeds_report(run.workdir)
    facts = {
        name.replace("_", " "): shell.format_accuracy(summary[name])
        for name in ("test_accuracy", "val_accuracy", "train_accuracy", "tta_accuracy")
        if summary[name] is not None
    }
    facts["ensemble"] = f"{summary['ensemble']['accuracy']:.2%}"
    facts["each seed"] = ", ".join(f"{v:.2%}" for v in summary["test_accuracy"]["values"])
    console.print()
    shell.print_facts(console, facts | {"report": str(page)}, sample=summary["sample"])


def _hooks(console: Console) -> list[fm.Hook]:
    hooks: list[fm.Hook] = [fm.ConsoleProgress(console)]
    if jax.process_count() > 1:
        # Ten times what JAX waits for a process that is dead.
        hooks.append(Watchdog(10 * processes.HEARTBEAT_SECONDS))
    return hooks


def _verify_resume(recipe: fm.Recipe, arguments: argparse.Namespace, console: Console) -> int:
    def say(text: str) -> None:
        console.print(text, highlight=False)

    started = time.monotonic()
    cache = ["--no-cache"] if arguments.no_cache else []
    expected, found = verify_resume(arguments.arch, [*cache, *flags.part_flags(recipe)], say)
    different = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
    for name in different:
        console.print(f"different: {name}", style="bold red")
    groups = Counter(name.partition(":")[0] for name in expected)
    say(", ".join(f"{group}: {number}" for group, number in groups.items()))
    verdict = "DIFFERENT" if different else "Bitwise identical"
    say(
        f"{verdict}: {len(expected)} items compared after three interruptions, in "
        f"{time.monotonic() - started:.0f} s."
    )
    return 1 if different else 0


def _replay(arguments: argparse.Namespace, dataset: fm.Dataset, console: Console) -> int:
    if arguments.workdir is None:
        raise ConfigError("--replay needs --workdir, the folder of the run")
    classes = (files.read_json(arguments.workdir / files.CONFIG) or {}).get("classes")
    if classes is not None:
        dataset = fm.select_classes(dataset, classes)
    console.print(f"Replaying step {arguments.replay:,} ...")
    parts = flags.named_parts(arguments)
    replay = fm.replay(arguments.workdir, dataset, arguments.replay, **parts)
    from fmnist_jax.report.run import write_replay

    picture = write_replay(arguments.workdir, replay, dataset.class_names, sample=dataset.sample)
    table = Table()
    for heading in ("training image", "label", "loss"):
        table.add_column(heading, justify="right")
    for example, label, loss in zip(replay.examples, replay.labels, replay.losses, strict=True):
        table.add_row(f"{example:,}", dataset.class_names[label], f"{loss:.4f}")
    console.print(table)
    console.print(
        f"Step {replay.step:,}: mean loss {replay.losses.mean():.4f}, gradient norm "
        f"{replay.gradient_norm:.4f}. The images that the network received: {picture}",
        soft_wrap=True,
    )
    return 0


def _print_recipes(console: Console) -> None:
    table = Table("recipe", "network", "epochs", "batch", "optimizer", "claim", box=None)
    for name, recipe in fm.RECIPES.items():
        claim = CLAIMS[name].text if name in CLAIMS else "our own recipe"
        sizes = map(str, (recipe.epochs, recipe.batch_size))
        table.add_row(name, recipe.arch, *sizes, recipe.optimizer, claim)
    console.print(table)
    console.print("--arch NAME --dry-run shows all settings of a recipe.", highlight=False)


def _print_plan(plan: Plan, console: Console) -> None:
    run, dataset = plan.run, plan.dataset
    own = "" if dataset.val_examples is None else " (the split of the data)"
    facts = {
        "network": run.recipe.arch,
        "data": f"{dataset.source}: {len(plan.train_examples):,} training, "
        f"{len(plan.val_examples):,} validation{own}, {len(dataset.test_labels):,} test images; "
        f"{len(dataset.class_names)} classes",
        **({} if is_fashion_mnist(dataset.sha256) else describe(dataset)),
        "recipe": ", ".join(_format_recipe(run.recipe)),
        "steps": f"{plan.total_steps:,}, {plan.steps_per_epoch:,} per epoch",
        "seed": str(run.seed),
        "folder": str(run.workdir),
    }
    if run.recipe.matmul_precision == "bfloat16" and jax.default_backend() == "cpu":
        facts["products"] = "in bfloat16"
        if not has_bfloat16_instructions():
            facts["products"] += (
                ", for which this processor has no instructions (avx512_bf16, amx_bf16); on Zen 3, "
                "training is 0.87 to 0.97 times as fast as in float32"
            )
    shell.print_facts(console, facts, bold="network")
    headings, *rows, totals = format_rows(plan.network)
    table = Table(*headings[:2])
    for heading in headings[2:]:
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*row)
    table.add_section()
    table.add_row(*totals)
    console.print(table)


def _format_recipe(recipe: fm.Recipe) -> list[str]:
    return [
        f"{name.replace('_', ' ')} {format_params(value) if isinstance(value, dict) else value}"
        for name, value in dataclasses.asdict(recipe).items()
        if name != "arch" and value is not None
    ]


main = shell.main_of(_run, create_parser)
