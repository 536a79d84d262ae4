"""Measures the training speed of fmnist_jax beside that of other frameworks.

    python experiments/bench/bench.py --arch small_dropout same_3x3
    python experiments/bench/bench.py --arch small_resnet --competitor linen keras_tensorflow

All competitors train the same network on the same images with the same batch size, optimizer and
float32 (except those with bf16 in their name and torch_compile; on a GPU all may use TF32), each
written as its users would write it. Each has a process and a Python environment, which is installed
at first use in `~/.cache/fmnist_jax/bench`. Rounds are interleaved. A process is suspended while
others train, so that its spinning threads take no time from them.

A loss that is not finite, a loss that has not fallen after `LEARNING_STEPS`, and updates of
fmnist_jax that differ from those of a plain network end the benchmark. The results of the networks
before it are kept.

Exit status: 0 done, 1 a competitor failed or is wrong, 2 bad usage, 130 or 143 interrupted.
"""

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import competitors
import numpy as np
from competitors import COMPETITORS, OURS, Child, CompetitorError
from networks import ARCHS
from rich.console import Console
from summary import print_result
from worker import AUGMENTED, NETWORKS, Case

import fmnist_jax as fm
from fmnist_jax.runs import environment, files

# With fewer steps the loss of some networks may still be above the first one.
LEARNING_STEPS = 50
# Largest relative difference of a loss, and of an update, from the plain network's. Rounding gives
# 1e-6 and 1e-5. An activation that rounds to another sign now and then gives 1e-3.
LOSS_TOLERANCE, UPDATE_TOLERANCE = 1e-5, 1e-2


def measure(
    case: Case, data: Path, arguments: argparse.Namespace, console: Console
) -> dict[str, Any]:
    """Measures all competitors on one case."""
    console.rule(str(case))
    records: dict[str, dict[str, Any]] = {}
    children: dict[str, Child] = {}
    rates = []
    with contextlib.ExitStack() as stack:

        def start(name: str) -> Child:
            return stack.enter_context(contextlib.closing(Child(name, arguments.device, data)))

        # A separate process, so that this work affects no competitor.
        probe = start(OURS)
        flops = probe.ask("ours.flops", case=case)
        for name in dict.fromkeys([OURS, *arguments.competitor]):
            console.print(f"{name}: starting and compiling")
            children[name] = child = start(name)
            seconds, loss = child.prepare(case)
            steps = calibrate(child, arguments.seconds)
            records[name] = {
                "first_step_seconds": seconds, "first_loss": loss, "steps": steps, "rounds": []
            }  # fmt: skip
        for number in range(arguments.rounds):
            console.print(f"round {number + 1} of {arguments.rounds}")
            rates.append(probe.ask("ours.matrix_rate"))
            turn = number % len(children)
            for name in ([*children] * 2)[turn : turn + len(children)]:
                steps = records[name]["steps"]
                # Untimed, because the caches hold the data of other processes.
                children[name].ask("train", num_steps=-(-steps // 8))
                records[name]["rounds"].append(children[name].ask("train", num_steps=steps))
        for name, record in records.items():
            record["memory"] = children[name].ask("memory")
            check_losses(name, record)
        console.print("comparing steps with those of a plain network")
        small = case._replace(batch_size=4 if case.arch == AUGMENTED else 8)
        difference = probe.call("ours.compare_steps", case=small)
        check_steps(**difference)
    return {
        "case": case._asdict(),
        "flops_per_step": flops,
        "matrix_flops_per_second": rates,
        "difference": difference,
        "competitors": records,
    }


def calibrate(child: Child, seconds: float) -> int:
    """Returns the number of steps that take about as long as a round should."""
    steps = 1
    while True:
        reply = child.ask("train", num_steps=steps)
        done = reply["steps"]  # a competitor may have taken more
        if reply["seconds"] > seconds / 4:
            return max(1, round(done * seconds / reply["seconds"]))
        steps = max(2 * done, int(done * seconds / 2 / reply["seconds"]))


def check_losses(name: str, record: dict[str, Any]) -> None:
    """Raises `CompetitorError` if the losses of a competitor are not finite or have not fallen."""
    losses = [record["first_loss"], *(r["loss"] for r in record["rounds"])]
    if None in losses:
        raise CompetitorError(f"{name}: the loss is not finite")
    steps = sum(r["steps"] for r in record["rounds"])
    if steps >= LEARNING_STEPS and losses[-1] >= losses[0]:
        raise CompetitorError(
            f"{name}: after {steps} steps the loss is {losses[-1]:.3f}, not lower"
        )


def check_steps(loss: float, update: float) -> None:
    """Raises `CompetitorError` if steps differ too much from those of a plain network."""
    if not (loss <= LOSS_TOLERANCE and update <= UPDATE_TOLERANCE):
        raise CompetitorError(f"{OURS}: losses differ by {loss:.1e}, updates by {update:.1e}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    parser = competitors.create_parser(
        "Measures the training speed beside other frameworks.", "runs/bench",
        rounds=(5, "measurements"), seconds=(2.0, "training of each competitor per round"),
    )  # fmt: skip
    parser.add_argument(
        "--arch", nargs="+", choices=[*NETWORKS, *ARCHS], default=list(NETWORKS),
        help="default: the networks of the library",
    )  # fmt: skip
    parser.add_argument(
        "--batch-size", nargs="+", type=int, metavar="INT",
        help="default: 128, and 126 for deep_augmented",
    )  # fmt: skip
    parser.add_argument(
        "--competitor", nargs="+", choices=list(COMPETITORS),
        default=["keras_tensorflow", "torch_channels_last"], help=f"besides {OURS}",
    )  # fmt: skip
    arguments = competitors.parse(parser, argv, "rounds", "seconds")
    if any(size < 1 for size in arguments.batch_size or []):
        parser.error("--batch-size must be at least 1")
    return competitors.run(_run, arguments)


def _run(arguments: argparse.Namespace, console: Console) -> int:
    dataset = fm.load_fashion_mnist()
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.npz"
        np.savez(data, images=dataset.train_images, labels=dataset.train_labels)
        for arch in arguments.arch:
            for batch_size in arguments.batch_size or [126 if arch == AUGMENTED else 128]:
                results.append(measure(Case(arch, batch_size), data, arguments, console))
                report = {"machine": environment.describe(), "results": results}
                files.write_json(arguments.workdir / "bench.json", report)
                print_result(results[-1], console)
    console.print(f"The results are in {arguments.workdir}.")
    return 0


if __name__ == "__main__":
    competitors.exit_on_signals()
    sys.exit(main())
