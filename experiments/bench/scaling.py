"""Measures the speed of one run on several devices and processes, and what fixed shards cost.

    python experiments/bench/scaling.py --arch small_dropout

A layout is a number of processes, which divide the cores of this machine among them, and of CPU
devices in each. Layouts take turns, so that a slow moment of the machine meets them all.

Exit status: 0 done, 1 a process failed, 2 bad usage.
"""

import argparse
import dataclasses
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

import competitors
import jax
import jax.numpy as jnp
from competitors import CompetitorError
from rich.console import Console
from rich.table import Table
from summary import spread

import fmnist_jax as fm
from fmnist_jax.distributed import processes
from fmnist_jax.runs import environment, files
from fmnist_jax.runs.plan import create_plan


class Case(NamedTuple):
    """One measurement: processes, devices in each, examples per step and shards."""

    num_processes: int
    num_devices: int
    batch_size: int
    shards: int


LAYOUTS = ((1, 1), (1, 2), (2, 1), (1, 4), (2, 2), (4, 1))
# In each table, speeds are relative to the first case.
TABLES = {
    "Shards of one device": [Case(1, 1, 1024, shards) for shards in (1, 2, 4, 8)],
    "1,024 images in all": [Case(*layout, 1024, 8) for layout in LAYOUTS],
    "256 images per device": [Case(p, d, 256 * p * d, 8) for p, d in LAYOUTS],
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    parser = competitors.create_parser(
        "Measures a run on devices and processes of a CPU.", "runs/scaling",
        rounds=(5, "measurements"), seconds=(4.0, "of a measurement"),
    )  # fmt: skip
    parser.add_argument(
        "--arch", choices=list(fm.RECIPES), default="small_dropout", help="recipe (%(default)s)"
    )
    parser.add_argument("--worker", nargs=4, type=int, help=argparse.SUPPRESS)
    arguments = competitors.parse(parser, argv, "rounds", "seconds")
    if arguments.worker is not None:
        print(_train(arguments.arch, Case(*arguments.worker), arguments.seconds))
        return 0
    return competitors.run(_run, arguments)


def _run(arguments: argparse.Namespace, console: Console) -> int:
    rounds: dict[Case, list[float]] = {case: [] for cases in TABLES.values() for case in cases}
    for number in range(arguments.rounds):
        for case, speeds in rounds.items():
            speeds.append(_measure(case, arguments))
        console.print(f"round {number + 1} of {arguments.rounds}")
    report = {
        "machine": environment.describe(),
        "arch": arguments.arch,
        "images_per_second": [case._asdict() | {"rounds": rounds[case]} for case in rounds],
    }
    files.write_json(arguments.workdir / "scaling.json", report)
    for title, cases in TABLES.items():
        table = Table(title=title)
        for heading in (*(name.replace("_", " ") for name in Case._fields), "images/s", "ratio"):
            table.add_column(heading, justify="right")
        for case in cases:
            ratios = [a / b for a, b in zip(rounds[case], rounds[cases[0]], strict=True)]
            table.add_row(*map(str, case), f"{median(rounds[case]):,.0f}", spread(ratios, ".2f"))
        console.print(table)
    console.print(f"The results are in {arguments.workdir}.")
    return 0


def _measure(case: Case, arguments: argparse.Namespace) -> float:
    """Starts the processes of a case and returns the images/s of the first."""
    cores = sorted(os.sched_getaffinity(0))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, __file__, "--arch", arguments.arch]
    command += ["--seconds", str(arguments.seconds), "--worker", *map(str, case)]
    children = []
    for number in range(case.num_processes):
        own = cores[number :: case.num_processes] or [cores[number % len(cores)]]
        variables = {
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": case.num_devices,
            "NPROC": max(len(own), case.num_devices),
            "JAX_COORDINATOR_ADDRESS": address,
            "JAX_NUM_PROCESSES": case.num_processes,
            "JAX_PROCESS_ID": number,
        }
        environ = os.environ | {name: str(value) for name, value in variables.items()}
        os.sched_setaffinity(0, own)  # which the child inherits
        children.append(
            subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environ
            )
        )
    os.sched_setaffinity(0, cores)
    outputs = [child.communicate()[0] for child in children]
    for child in children:
        if child.returncode:
            raise CompetitorError(f"a process ended with status {child.returncode}")
    return float(outputs[0].split("\n")[-2])


def _train(arch: str, case: Case, seconds: float) -> float:
    """Trains for some seconds and returns images/s."""
    if case.num_processes > 1:
        processes.start()
    recipe = dataclasses.replace(
        fm.RECIPES[arch], batch_size=case.batch_size, shards=case.shards, microbatch_size=None
    )
    run = fm.Run(recipe=recipe, workdir=Path(), devices="all")
    plan = create_plan(run, fm.load_fashion_mnist(sample=True))
    state, inputs = plan.config.layout.place((plan.create_state(), plan.inputs))

    def train(state: fm.TrainState, num_steps: int) -> tuple[fm.TrainState, float]:
        start = time.perf_counter()
        state, _ = fm.train_steps(state, inputs, jnp.int32(num_steps), config=plan.config)
        jax.block_until_ready(state)
        return state, time.perf_counter() - start

    state, _ = train(state, 1)  # compiles
    state, step_seconds = train(state, 2)
    # All processes take the same number of steps.
    num_steps = int(processes.gather([max(1, round(2 * seconds / step_seconds))])[0, 0])
    _, elapsed = train(state, num_steps)
    return num_steps * case.batch_size / elapsed


if __name__ == "__main__":
    sys.exit(main())
