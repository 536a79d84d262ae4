"""Measures the training speed of fmnist_jax beside that of other frameworks.

    python experiments/bench/bench.py --arch small_dropout same_3x3

All competitors train the same network on the same images with the same batch size, optimizer and
float32 (except those with bf16 in their name; on a GPU all may use TF32), each written as its users
would write it. Each has a process and a Python environment, which is installed at first use in
`~/.cache/fmnist_jax/bench`. Rounds are interleaved. A process is suspended while others train, so
that its spinning threads take no time from them.

A competitor is disqualified by a loss that is not finite, by a loss that has not fallen after
`LEARNING_STEPS`, and fmnist_jax also by updates that differ from those of a plain network.

Exit status: 0 done, 1 a competitor failed or was disqualified, 2 bad usage, 130 or 143 interrupted.
"""

import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np
from competitors import COMPETITORS, OURS, Child, ChildError
from rich.console import Console
from summary import draw_growth, draw_results, print_growth, print_result
from worker import AUGMENTED, NETWORKS, Case

import fmnist_jax as fm
from fmnist_jax.analysis.plots import encode
from fmnist_jax.errors import DataError
from fmnist_jax.runs import environment, files

# With fewer steps the loss of some networks may still be above the first one.
LEARNING_STEPS = 50
# Largest relative difference of a loss, and of an update, from the plain network's. Rounding gives
# 1e-6 and 1e-5. An activation that rounds to another sign now and then gives 1e-3.
LOSS_TOLERANCE, UPDATE_TOLERANCE = 1e-5, 1e-2
NUM_IMAGES = 60_000
# The measurements of --growth, by quantity.
GROWTH = {
    "batch size": (8, 16, 32, 64, 128, 256, 512, 1024),
    "training images": (1000, 3000, 10_000, 30_000, 60_000),
    "steps per call": (1, 3, 10, 30, 100, 300),  # an epoch has 468
    "image size, pixels": (50, 100, 150, 200),
}


class Bench:
    """Settings of a benchmark, and the file with its images."""

    def __init__(self, arguments: argparse.Namespace, data: Path, console: Console) -> None:
        self.arguments = arguments
        self.data = data
        self.console = console

    def measure(self, case: Case) -> dict[str, Any]:
        """Measures all competitors on one case."""
        self.console.rule(str(case))
        records: dict[str, dict[str, Any]] = {name: {} for name in self.arguments.competitor}
        rates = []
        with contextlib.ExitStack() as stack:
            # A separate process, so that this work affects no competitor.
            probe = self._open(OURS, stack)
            flops = probe.call("flops", case)
            children = {}
            for name, record in records.items():
                with self._failures(name, record):
                    children[name] = self._prepare(name, case, record, stack)
            for number in range(self.arguments.rounds):
                self.console.print(f"round {number + 1} of {self.arguments.rounds}")
                rates.append(probe.call("matrix_rate", case))
                turn = number % len(records)
                for name in [*records][turn:] + [*records][:turn]:
                    record = records[name]
                    if "problem" not in record:
                        with self._failures(name, record):
                            child, steps = children[name], record["steps"]
                            # Untimed, because the caches hold the data of other processes.
                            child.ask("train", num_steps=-(-steps // 8))
                            record["rounds"].append(child.ask("train", num_steps=steps))
            for name, record in records.items():
                if "problem" not in record:
                    with self._failures(name, record):
                        record["memory"] = children[name].ask("memory")
                        record["problem"] = wrong_losses(record)
            if OURS in records and not records[OURS]["problem"]:
                records[OURS] |= self._compare_steps(case, probe)
        return {
            "case": case._asdict(),
            "flops_per_step": flops,
            "matrix_flops_per_second": rates,
            "competitors": records,
        }

    def measure_growth(self) -> list[dict[str, Any]]:
        """Measures the time of fmnist_jax per image as one quantity at a time grows."""
        small, large = create_case("small_dropout", 128), create_case(AUGMENTED, 16)
        changes = {
            "batch size": lambda value: small._replace(batch_size=value),
            "training images": lambda value: small._replace(num_images=value),
            "steps per call": lambda value: small,
            "image size, pixels": lambda value: large._replace(image_size=value),
        }
        points = []
        for axis, values in GROWTH.items():
            for value in values:
                self.console.print(f"{axis}: {value:,}")
                case = changes[axis](value)
                fixed = {"num_steps": value} if axis == "steps per call" else {}
                seconds = self._seconds_per_image(case, fixed)
                points.append({"axis": axis, "value": value, "seconds_per_image": seconds})
        return points

    def _seconds_per_image(self, case: Case, fixed: dict[str, int]) -> list[float]:
        """Measures one point of --growth, a value per round."""
        with contextlib.ExitStack() as stack:
            child = self._open(OURS, stack)
            child.prepare(case, {})
            free = "num_calls" if fixed else "num_steps"
            arguments = {**fixed, free: self._calibrate(child, free, **fixed)}
            rounds = [child.ask("train", **arguments) for _ in range(self.arguments.rounds)]
        return [r["seconds"] / r["steps"] / case.batch_size for r in rounds]

    def _open(self, name: str, stack: contextlib.ExitStack, cache: str | None = None) -> Child:
        child = Child(name, self.arguments.device, self.data, self.console.print, cache)
        stack.callback(child.close)
        return child

    def _prepare(
        self, name: str, case: Case, record: dict[str, Any], stack: contextlib.ExitStack
    ) -> Child:
        """Starts a competitor, twice with --start, and calibrates the steps of a round."""
        record |= {"first_step_seconds": [], "rounds": []}
        cache = None
        if self.arguments.start:
            cache = stack.enter_context(tempfile.TemporaryDirectory())
        for is_last in (False, True) if self.arguments.start else (True,):
            self.console.print(f"{name}: starting and compiling")
            child = self._open(name, stack, cache)
            first = child.prepare(case, COMPETITORS[name].options)
            record["first_step_seconds"].append(first["seconds"])
            if not is_last:
                child.close()
        record["first_loss"] = first["loss"]
        record["versions"] = child.ask("versions")
        record["steps"] = self._calibrate(child, "num_steps")
        return child

    def _calibrate(self, child: Child, free: str, **fixed: int) -> int:
        """Returns the number of steps, or of calls, that take about as long as a round should."""
        target, count = self.arguments.seconds, 1
        while True:
            reply = child.ask("train", **{free: count}, **fixed)
            # A competitor may have taken more steps.
            done = reply["steps"] if free == "num_steps" else count
            if reply["seconds"] > target / 4:
                final = max(1, round(done * target / reply["seconds"]))
                if final != count:
                    # Once untimed: a scan is compiled for each length.
                    child.ask("train", **{free: final}, **fixed)
                return final
            count = max(2 * done, int(done * target / 2 / reply["seconds"]))

    def _compare_steps(self, case: Case, probe: Child) -> dict[str, Any]:
        """Compares steps of fmnist_jax with those of a plain network, with small batches."""
        self.console.print("comparing steps with those of a plain network")
        small = case._replace(batch_size=4 if case.arch == AUGMENTED else 8)
        difference = probe.call("compare_steps", small)
        loss, update = difference["loss"], difference["update"]
        is_right = loss <= LOSS_TOLERANCE and update <= UPDATE_TOLERANCE
        problem = f"disqualified: losses differ by {loss:.1e}, updates by {update:.1e}"
        return {"difference": difference, "problem": None if is_right else problem}

    @contextlib.contextmanager
    def _failures(self, name: str, record: dict[str, Any]) -> Iterator[None]:
        """Records a competitor's failure; the others continue."""
        try:
            yield
        except ChildError as error:
            record["problem"] = f"failed: {error}"
            self.console.print(f"{name} failed: {error}", style="red", markup=False)


def wrong_losses(record: dict[str, Any]) -> str | None:
    """Returns why the losses of a competitor disqualify it; None if they do not."""
    losses = [record["first_loss"], *(r["loss"] for r in record["rounds"])]
    if None in losses:
        return "disqualified: the loss is not finite"
    steps = sum(r["steps"] for r in record["rounds"])
    if steps >= LEARNING_STEPS and losses[-1] >= losses[0]:
        return f"disqualified: after {steps} steps the loss is {losses[-1]:.3f}, not lower"
    return None


def create_case(arch: str, batch_size: int | None = None) -> Case:
    """Returns the case of a network; the default batch size is 128, or 126 for deep_augmented."""
    batch_size = batch_size or (126 if arch == AUGMENTED else 128)
    return Case(arch, batch_size, fm.RECIPES[arch].image_size or 28, NUM_IMAGES)


def create_parser() -> argparse.ArgumentParser:
    """Creates the parser of the command line."""
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]",
        description="Measures the training speed beside other frameworks.",
    )
    parser.add_argument("--arch", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument(
        "--batch-size",
        nargs="+",
        type=int,
        metavar="int",
        help="default: 128, and 126 for deep_augmented",
    )
    parser.add_argument("--competitor", nargs="+", choices=list(COMPETITORS))
    parser.add_argument(
        "--rounds", type=int, metavar="int", default=5, help="measurements (%(default)s)"
    )
    parser.add_argument(
        "--seconds",
        type=float,
        metavar="float",
        default=2.0,
        help="training of each competitor per round (%(default)s)",
    )
    parser.add_argument(
        "--start",
        action="store_true",
        help="start each twice; the second start finds the programs of the first in a cache",
    )
    parser.add_argument(
        "--growth",
        action="store_true",
        help="measure how the time per image grows with sizes instead",
    )
    add_place_flags(parser)
    return parser


def add_place_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say where to measure and where the results go."""
    parser.add_argument("--device", choices=("cpu", "gpu"), help="default: that of JAX")
    parser.add_argument(
        "--workdir",
        type=Path,
        metavar="DIR",
        default=Path("runs/bench"),
        help="folder of the results (%(default)s)",
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses and checks the command line, and selects JAX's device."""
    parser = create_parser()
    arguments = parser.parse_args(argv)
    if arguments.rounds < 1 or not 0 < arguments.seconds < float("inf"):
        parser.error("--rounds must be at least 1 and --seconds above 0")
    if not all(0 < size <= NUM_IMAGES for size in arguments.batch_size or []):
        parser.error(f"--batch-size must be 1 to {NUM_IMAGES:,}")
    if arguments.device is not None:
        jax.config.update("jax_platforms", "cuda" if arguments.device == "gpu" else "cpu")
    try:
        arguments.device = jax.default_backend()
    except (RuntimeError, AssertionError):  # the latter from JAX's plugin for GPUs
        parser.error(f"JAX finds no {arguments.device}")
    able = [name for name in COMPETITORS if arguments.device in COMPETITORS[name].devices]
    arguments.competitor = list(dict.fromkeys(arguments.competitor or able))
    unable = set(arguments.competitor) - set(able)
    if unable:
        parser.error(f"{', '.join(unable)} cannot run on {arguments.device}")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    # The children share the GPU's memory with this process.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    arguments = parse(argv)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 130)
    try:
        return _run(arguments, console)
    except ChildError as error:
        console.print(f"{OURS} {error}", style="red", markup=False)
        return 1
    except (DataError, OSError) as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 2


def _run(arguments: argparse.Namespace, console: Console) -> int:
    folder = arguments.workdir
    folder.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        "machine": environment.describe(),
        "rounds": arguments.rounds,
        "seconds": arguments.seconds,
    }
    with tempfile.TemporaryDirectory() as data_folder:
        data = Path(data_folder) / "data.npz"
        dataset = fm.load_fashion_mnist()
        np.savez(data, images=dataset.train_images, labels=dataset.train_labels)
        bench = Bench(arguments, data, console)
        if arguments.growth:
            report["growth"] = bench.measure_growth()
            files.write_json(folder / "growth.json", report)
            files.write_bytes(folder / "growth.png", encode(draw_growth(report["growth"])))
            print_growth(report["growth"], console)
            return 0
        results = report["results"] = []
        for arch in arguments.arch:
            for batch_size in arguments.batch_size or [None]:
                results.append(bench.measure(create_case(arch, batch_size)))
                files.write_json(folder / "bench.json", report)
                files.write_bytes(folder / "bench.png", encode(draw_results(results)))
                print_result(results[-1], console)
    console.print(f"The results are in {folder}.")
    problems = any(r["problem"] for result in results for r in result["competitors"].values())
    return 1 if problems else 0


def raise_exit(number: int, _: FrameType | None) -> None:
    """Handles a signal by an exception."""
    sys.exit(128 + number)


if __name__ == "__main__":
    # An exception, so that the children end with this process. A competitor's process is suspended
    # most of the time and would never end by itself.
    signal.signal(signal.SIGTERM, raise_exit)
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, raise_exit)
    sys.exit(main())
