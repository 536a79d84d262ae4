"""Measures the speed of one run on several devices and processes, and what fixed shards cost.

    python experiments/bench/scaling.py --arch small_dropout

A layout is a number of processes, which divide the cores of this machine among them, and of CPU
devices in each. Layouts take turns, so that a slow moment of the machine meets them all. A model of
the time of a step is fitted and carried to other machines.

Exit status: 0 done, 1 a process failed, 2 bad usage.
"""

import argparse
import dataclasses
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib as mpl
from rich.console import Console
from rich.table import Table
from summary import STYLE, draw_scaling

import fmnist_jax as fm
from fmnist_jax.distributed import processes
from fmnist_jax.distributed.mesh import replicate
from fmnist_jax.runs import environment, files
from fmnist_jax.runs.plan import create_plan, loop_cost


class Case(NamedTuple):
    """One measurement: processes, devices in each, examples per step and shards."""

    num_processes: int
    num_devices: int
    batch_size: int
    shards: int

    @property
    def total_devices(self) -> int:
        """Devices of all processes."""
        return self.num_processes * self.num_devices


BATCH_SIZE = 1024
SMALL_BATCH_SIZE = 256
LAYOUTS = ((1, 1), (1, 2), (2, 1), (1, 4), (2, 2), (4, 1))
SHARD_CASES = [Case(1, 1, BATCH_SIZE, shards) for shards in (1, 2, 4, 8)]
FIXED_BATCH = [Case(*layout, BATCH_SIZE, 8) for layout in LAYOUTS]
FIXED_PER_DEVICE = [Case(p, d, SMALL_BATCH_SIZE * p * d, 8) for p, d in LAYOUTS]


class Machine(NamedTuple):
    """Assumptions about a machine.

    Attributes:
      name: for the legend.
      flops: floating-point operations per second that a device reaches on the network.
      overhead: seconds of a step that do not depend on the batch.
      bandwidth: bytes per second that a device sends while it receives as many.
      latency: seconds of one collective operation between two devices.
      num_devices: the largest number of devices to show.
    """

    name: str
    flops: float
    overhead: float
    bandwidth: float
    latency: float
    num_devices: int


# An H100: a tenth of its 67 TFLOP/s in float32, since the network is small; a millisecond for some
# hundred kernels; half of NVLink's 450 GB/s; 10 microseconds, as usual for NCCL in one host.
GPUS = Machine("8 GPUs of one host", 6.7e12, 1e-3, 225e9, 10e-6, 8)
# Half of Ethernet's 100 Gbit/s; 50 microseconds, as usual for TCP between hosts.
NETWORK = {"bandwidth": 6.25e9, "latency": 50e-6}


def create_parser() -> argparse.ArgumentParser:
    """Creates the parser of the command line."""
    parser = argparse.ArgumentParser(description="Measures a run on devices and processes.")
    parser.add_argument(
        "--arch", choices=list(fm.RECIPES), default="small_dropout", help="recipe (%(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="(%(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=4, metavar="S", help="of a measurement (%(default)s)"
    )
    parser.add_argument("--workdir", type=Path, metavar="DIR", default=Path("runs/scaling"))
    parser.add_argument("--worker", nargs=4, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--cores", nargs="+", type=int, help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    parser = create_parser()
    arguments = parser.parse_args(argv)
    if arguments.rounds < 1 or arguments.seconds <= 0:
        parser.error("--rounds must be at least 1 and --seconds above 0")
    if arguments.worker is not None:
        os.sched_setaffinity(0, arguments.cores)  # for all threads that start later
        print(json.dumps(_work(arguments.arch, Case(*arguments.worker), arguments.seconds)))
        return 0
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    rounds: dict[Case, list[float]] = {
        case: [] for case in [*SHARD_CASES, *FIXED_BATCH, *FIXED_PER_DEVICE]
    }
    try:
        for number in range(arguments.rounds):
            for case in rounds:
                rounds[case].append(_measure(case, arguments))
            console.print(f"round {number + 1} of {arguments.rounds}")
    except subprocess.CalledProcessError as error:
        console.print(f"a process ended with status {error.returncode}", style="red")
        return 1
    model = fit_model(arguments.arch, {case: median(rounds[case]) for case in rounds})
    files.make_folder(arguments.workdir)
    report = {
        "machine": environment.describe(),
        "arch": arguments.arch,
        "images_per_second": [case._asdict() | {"rounds": rounds[case]} for case in rounds],
        "model": model,
    }
    files.write_json(arguments.workdir / "scaling.json", report)
    with mpl.rc_context(STYLE):
        draw_scaling(projections(model)).savefig(arguments.workdir / "scaling.png", dpi=144)
    for table in _tables(rounds):
        console.print(table)
    console.print_json(json.dumps(model))
    console.print(f"The results are in {arguments.workdir}.")
    return 0


def fit_model(arch: str, speeds: dict[Case, float]) -> dict[str, float]:
    """Fits a model of the time of a step.

    On one device, a step of `batch` images takes `overhead + batch * flops_per_image / flops`. Two
    processes of one core take `exchange_seconds` more than two devices of one process.

    Args:
      arch: a recipe.
      speeds: images/s of each case.

    Returns:
      The constants, and the bytes that a device sends per step to sum the gradients.
    """
    seconds = {case: case.batch_size / speed for case, speed in speeds.items()}
    small, large = (seconds[Case(1, 1, size, 8)] for size in (SMALL_BATCH_SIZE, BATCH_SIZE))
    per_image = (large - small) / (BATCH_SIZE - SMALL_BATCH_SIZE)
    plan = create_plan(fm.Run(recipe=_recipe(arch, SHARD_CASES[0]), workdir=Path()), _data())
    flops_per_image = loop_cost(plan).flops / BATCH_SIZE
    exchange = seconds[Case(2, 1, BATCH_SIZE, 8)] - seconds[Case(1, 2, BATCH_SIZE, 8)]
    return {
        "flops": flops_per_image / per_image,
        "flops_per_image": flops_per_image,
        "overhead": max(0.0, small - SMALL_BATCH_SIZE * per_image),
        "exchange_seconds": exchange,
        # Each device sends all parts but its own twice: to their adders, and its sum to all.
        "bytes_per_step": 2 * 4 * plan.num_params,
    }


def projections(model: dict[str, float]) -> dict[str, list[tuple[int, float]]]:
    """Returns the efficiency by number of devices, for each machine and way to scale."""
    hosts = Machine(
        "64 hosts like this one", model["flops"], model["overhead"], num_devices=64, **NETWORK
    )
    curves = {}
    for machine in (GPUS, hosts):
        for way, batch in (("1,024 images in all", 1024), ("1,024 images per device", None)):
            points, count = [], 1
            while count <= machine.num_devices:
                images = 1024 if batch is None else batch / count
                alone = step_seconds(machine, model, 1, 1024)
                ideal = alone if batch is None else alone / count
                points.append((count, ideal / step_seconds(machine, model, count, images)))
                count *= 2
            curves[f"{machine.name}, {way}"] = points
    return curves


def step_seconds(
    machine: Machine, model: dict[str, float], num_devices: int, images_per_device: float
) -> float:
    """Returns the seconds of a step: computing, and exchanging the gradients."""
    compute = images_per_device * model["flops_per_image"] / machine.flops + machine.overhead
    sent = model["bytes_per_step"] * (num_devices - 1) / num_devices
    # Two collectives, each with a latency for every doubling of the devices.
    return compute + sent / machine.bandwidth + 2 * machine.latency * (num_devices - 1).bit_length()


def _tables(rounds: dict[Case, list[float]]) -> list[Table]:
    tables = []
    for title, cases in (
        ("Shards of one device", SHARD_CASES),
        (f"{BATCH_SIZE:,} images in all", FIXED_BATCH),
        (f"{SMALL_BATCH_SIZE} images per device", FIXED_PER_DEVICE),
    ):
        table = Table(title=title)
        for heading in (
            "processes",
            "devices in each",
            "batch size",
            "shards",
            "images/s",
            "ratio",
        ):
            table.add_column(heading, justify="right")
        for case in cases:
            ratios = [a / b for a, b in zip(rounds[case], rounds[cases[0]], strict=True)]
            cells = (str(number) for number in case)
            ratio = f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            table.add_row(*cells, f"{median(rounds[case]):,.0f}", ratio)
        tables.append(table)
    return tables


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
        variables: dict[str, Any] = {
            "JAX_NUM_CPU_DEVICES": case.num_devices,
            "NPROC": max(len(own), case.num_devices),
        }
        if case.num_processes > 1:
            variables |= {
                "JAX_COORDINATOR_ADDRESS": address,
                "JAX_NUM_PROCESSES": case.num_processes,
                "JAX_PROCESS_ID": number,
            }
        children.append(
            subprocess.Popen(
                [*command, "--cores", *map(str, own)],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                env=os.environ | {name: str(value) for name, value in variables.items()},
            )
        )
    outputs = [child.communicate()[0] for child in children]
    for child in children:
        if child.returncode:
            raise subprocess.CalledProcessError(child.returncode, command)
    return float(outputs[0].split("\n")[-2])


def _work(arch: str, case: Case, seconds: float) -> float:
    """Trains for some seconds and returns images/s."""
    if case.num_processes > 1:
        processes.start()
    dataset = _data()
    run = fm.Run(recipe=_recipe(arch, case), workdir=Path(), devices="all")
    plan = create_plan(run, dataset)
    mesh = plan.config.mesh
    images, labels, order, streams, hyperparams, state = replicate(
        (
            dataset.train_images,
            dataset.train_labels,
            plan.train_examples,
            plan.streams,
            plan.hyperparams,
            plan.create_state(),
        ),
        mesh,
    )

    def train(state: Any, num_steps: int) -> tuple[Any, float]:
        start = time.perf_counter()
        state, _ = fm.train_steps(
            state, images, labels, order, streams, jnp.int32(num_steps), hyperparams,
            config=plan.config,
        )  # fmt: skip
        jax.block_until_ready(state)
        return state, time.perf_counter() - start

    state, _ = train(state, 1)  # compiles
    state, step_seconds = train(state, 2)
    # All processes take the same number of steps.
    num_steps = int(processes.gather([max(1, round(2 * seconds / step_seconds))])[0, 0])
    _, elapsed = train(state, num_steps)
    return num_steps * case.batch_size / elapsed


def _recipe(arch: str, case: Case) -> fm.Recipe:
    return dataclasses.replace(
        fm.RECIPES[arch], batch_size=case.batch_size, shards=case.shards, microbatch_size=None
    )


def _data() -> fm.Dataset:
    return fm.load_fashion_mnist(sample=True)


if __name__ == "__main__":
    sys.exit(main())
