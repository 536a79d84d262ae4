"""Measures the training speed of this library beside that of other frameworks.

    python experiments/bench.py --arch small_dropout same_3x3

All competitors train the same network on the same images with the same batch size, optimizer and
float32 (but for those with bf16 in their name; on a GPU all may use TF32), each written as its own
users would write it. They are processes of their own, in environments that are made at first use
under `~/.cache/fmnist_jax/bench`. The rounds are interleaved, and a process whose turn it is not is
stopped by a signal, so that its spinning threads take no time from the others.

A wrong answer disqualifies: a loss that is not finite, a loss that has not come down after
`LEARNING_STEPS`, and, for this library, updates that differ from those of a plain network.

Exit status: 0 done, 1 where a competitor failed or was disqualified, 2 bad usage, 130 interrupted.
"""

import argparse
import contextlib
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import jax
import matplotlib as mpl
import numpy as np
from competitors import COMPETITORS, OURS, Child, ChildError
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

import fmnist_jax as fm
from fmnist_jax.runs import environment, files

AUGMENTED = "deep_augmented"
# Fewer updates than this may leave any network's loss above its first one.
LEARNING_STEPS = 50
# Largest relative difference of a loss, and of an update, from the plain network's. Rounding gives
# 1e-6 and 1e-5; an activation that rounds to the other side of zero now and then gives 1e-3.
LOSS_TOLERANCE, UPDATE_TOLERANCE = 1e-5, 1e-2
NUM_IMAGES = 60_000
GROWTH_BATCHES = (8, 16, 32, 64, 128, 256, 512, 1024)
GROWTH_IMAGES = (1000, 3000, 10_000, 30_000, 60_000)
GROWTH_CALLS = (1, 3, 10, 30, 100, 300)  # a call ends with its epoch, of 468 updates
GROWTH_SIDES = (50, 100, 150, 200)

_OURS_COLOUR, _PEER_COLOUR, _INK = "#2563eb", "#cbd5e1", "#1f2937"
_STYLE: Any = {
    "font.size": 10,
    "text.color": _INK,
    "axes.edgecolor": _PEER_COLOUR,
    "axes.labelcolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
}

console = Console(highlight=False, width=None if sys.stdout.isatty() else 130)


class Case(NamedTuple):
    """What all competitors train."""

    arch: str
    batch_size: int
    image_size: int
    num_images: int

    def __str__(self) -> str:
        return f"{self.arch}, batches of {self.batch_size}"


class Bench:
    """The settings of a benchmark, and the file with its images."""

    def __init__(self, arguments: argparse.Namespace, data: Path) -> None:
        self.arguments = arguments
        self.data = data

    def measure(self, case: Case) -> dict[str, Any]:
        """Measures all competitors on one network."""
        console.rule(str(case))
        records: dict[str, dict[str, Any]] = {name: {} for name in self.arguments.competitor}
        rates = []
        with contextlib.ExitStack() as stack:
            # A process that does not compete, so that its work counts for nobody.
            probe = self._open(OURS, stack)
            flops = probe.ask("call", function="flops", **self._about(case))
            children = {}
            for name, record in records.items():
                with _reported(name, record):
                    children[name] = self._prepare(name, case, record, stack)
            for number in range(self.arguments.rounds):
                console.print(f"round {number + 1} of {self.arguments.rounds}")
                rates.append(probe.ask("call", function="matrix_rate", **self._about(case)))
                turn = number % len(records)
                for name in [*records][turn:] + [*records][:turn]:
                    record = records[name]
                    if "problem" not in record:
                        with _reported(name, record):
                            child, steps = children[name], record["steps"]
                            # Untimed, because a stopped process finds the caches full of others'.
                            child.ask("train", steps=-(-steps // 8))
                            record["rounds"].append(child.ask("train", steps=steps))
            for name, record in records.items():
                if "problem" not in record:
                    with _reported(name, record):
                        record["memory"] = children[name].ask("memory")
                        record["problem"] = _wrong_answer(record)
            if OURS in records and not records[OURS]["problem"]:
                records[OURS] |= self._compared(case, probe)
        return {
            "case": case._asdict(),
            "flops_per_step": flops,
            "matrix_flops_per_second": rates,
            "competitors": records,
        }

    def measure_growth(self) -> list[dict[str, Any]]:
        """What an image costs this library, as one thing at a time grows."""
        small, large = _case("small_dropout", 128), _case(AUGMENTED, 16)
        settings = [
            *(("images an update", n, small._replace(batch_size=n)) for n in GROWTH_BATCHES),
            *(("training images", n, small._replace(num_images=n)) for n in GROWTH_IMAGES),
            *(("updates a call", n, small) for n in GROWTH_CALLS),
            *(("side of the images", n, large._replace(image_size=n)) for n in GROWTH_SIDES),
        ]
        points = []
        for axis, value, case in settings:
            console.print(f"{axis}: {value:,}")
            with contextlib.ExitStack() as stack:
                child = self._open(OURS, stack)
                child.ask("prepare", **self._about(case), device=self.arguments.device)
                fixed = {"steps": value} if axis == "updates a call" else {}
                free = "calls" if fixed else "steps"
                fixed[free] = self._calibrate(child, free, **fixed)
                rounds = [child.ask("train", **fixed) for _ in range(self.arguments.rounds)]
            seconds = [r["seconds"] / r["steps"] / case.batch_size for r in rounds]
            points.append({"axis": axis, "value": value, "seconds_per_image": seconds})
        return points

    def _open(self, name: str, stack: contextlib.ExitStack, cache: str | None = None) -> Child:
        child = Child(name, self.arguments.device, console.print, cache)
        stack.callback(child.close)
        return child

    def _prepare(
        self, name: str, case: Case, record: dict[str, Any], stack: contextlib.ExitStack
    ) -> Child:
        """Starts a competitor, twice for --start, and finds how many updates a round has."""
        record |= {"first_step_seconds": [], "rounds": []}
        cache = None
        if self.arguments.start:
            cache = stack.enter_context(tempfile.TemporaryDirectory())
        for last in (False, True) if self.arguments.start else (True,):
            console.print(f"{name}: starting and compiling")
            child = self._open(name, stack, cache)
            first = child.ask(
                "prepare",
                **self._about(case),
                device=self.arguments.device,
                **COMPETITORS[name].options,
            )
            record["first_step_seconds"].append(first["seconds"])
            if not last:
                child.close()
        record["first_loss"] = first["loss"]
        record["versions"] = child.ask("versions")
        record["steps"] = self._calibrate(child, "steps")
        return child

    def _calibrate(self, child: Child, free: str, **fixed: int) -> int:
        """How many steps, or calls, take about as long as a round should."""
        target, count = self.arguments.seconds, 1
        while True:
            reply = child.ask("train", **{free: count}, **fixed)
            # A competitor may have done more than it was asked for.
            done = reply["steps"] if free == "steps" else count
            if reply["seconds"] > target / 4:
                final = max(1, round(done * target / reply["seconds"]))
                if final != count:
                    # Once untimed: a scan is compiled anew for this length.
                    child.ask("train", **{free: final}, **fixed)
                return final
            count = max(2 * done, int(done * target / 2 / reply["seconds"]))

    def _compared(self, case: Case, probe: Child) -> dict[str, Any]:
        """Compares this library's updates with a plain network's, in small batches."""
        console.print("comparing the updates with those of a plain network")
        small = case._replace(batch_size=4 if case.arch == AUGMENTED else 8)
        difference = probe.ask("call", function="follow_reference", **self._about(small))
        loss, update = difference["loss"], difference["update"]
        right = loss <= LOSS_TOLERANCE and update <= UPDATE_TOLERANCE
        problem = f"disqualified: losses differ by {loss:.1e}, updates by {update:.1e}"
        return {"difference": difference, "problem": None if right else problem}

    def _about(self, case: Case) -> dict[str, Any]:
        arguments: dict[str, Any] = case._asdict()
        data = {"path": str(self.data), "num_images": arguments.pop("num_images")}
        return arguments | {"data": data}


@contextlib.contextmanager
def _reported(name: str, record: dict[str, Any]) -> Iterator[None]:
    """Goes on without a competitor that fails."""
    try:
        yield
    except ChildError as error:
        record["problem"] = f"failed: {error}"
        console.print(f"{name} failed: {error}", style="red", markup=False)


def _wrong_answer(record: dict[str, Any]) -> str | None:
    losses = [record["first_loss"], *(r["loss"] for r in record["rounds"])]
    if None in losses:
        return "disqualified: the loss is not finite"
    steps = sum(r["steps"] for r in record["rounds"])
    if steps >= LEARNING_STEPS and losses[-1] >= losses[0]:
        return f"disqualified: after {steps} steps the loss is {losses[-1]:.3f}, not lower"
    return None


def _case(arch: str, batch_size: int | None = None) -> Case:
    recipe = fm.RECIPES[arch]
    batch_size = batch_size or (126 if arch == AUGMENTED else 128)
    return Case(arch, batch_size, recipe.image_size or 28, NUM_IMAGES)


def _speeds(result: dict[str, Any], name: str) -> list[float]:
    """Images a second in each round; none for a competitor with a problem."""
    record = result["competitors"].get(name, {"problem": "absent"})
    if record["problem"]:
        return []
    return [r["steps"] * result["case"]["batch_size"] / r["seconds"] for r in record["rounds"]]


def _best_peer(result: dict[str, Any]) -> str | None:
    speeds = {name: _speeds(result, name) for name in result["competitors"] if name != OURS}
    return max((n for n in speeds if speeds[n]), key=lambda n: median(speeds[n]), default=None)


def _ratios(result: dict[str, Any], name: str) -> list[float]:
    """This library's speed over a competitor's, round by round."""
    return [a / b for a, b in zip(_speeds(result, OURS), _speeds(result, name), strict=False)]


def _range(values: Sequence[float], digits: str) -> str:
    if not values:
        return "-"
    if min(values) == max(values):
        return f"{values[0]:{digits}}"
    return f"{median(values):{digits}} ({min(values):{digits}} to {max(values):{digits}})"


def _print_result(result: dict[str, Any]) -> None:
    case = Case(**result["case"])
    table = Table(title=str(case))
    for heading in (
        "competitor", "images/s", "ours over it", "steps/s", "of matrix rate", "peak MiB",
        "first step, s",
    ):  # fmt: skip
        left = heading == "competitor"
        table.add_column(heading, justify="left" if left else "right", no_wrap=left)
    problems = {}
    for name, record in result["competitors"].items():
        speeds = _speeds(result, name)
        if not speeds:
            problems[name] = record["problem"]
            continue
        steps = [speed / case.batch_size for speed in speeds]
        shares = [
            step * result["flops_per_step"] / rate
            for step, rate in zip(steps, result["matrix_flops_per_second"], strict=True)
        ]
        memory = record["memory"]
        table.add_row(
            name,
            _range(speeds, ",.0f"),
            "" if name == OURS else _range(_ratios(result, name), ".2f"),
            f"{median(steps):,.2f}",
            f"{median(shares):.0%}",
            " + ".join(f"{memory[key]:,.0f}" for key in memory if memory[key] is not None),
            ", ".join(f"{seconds:.1f}" for seconds in record["first_step_seconds"]),
            style="bold" if name == OURS else "",
        )
    console.print(table)
    for name, problem in problems.items():
        console.print(f"{name} {problem}", style="red", markup=False)
    difference = result["competitors"].get(OURS, {}).get("difference")
    if difference:
        console.print(
            f"Ten updates beside a plain network's: losses differ by {difference['loss']:.1e}, "
            f"updates by {difference['update']:.1e} at most."
        )
    peer = _best_peer(result)
    if peer and _ratios(result, peer):
        console.print(f"{_range(_ratios(result, peer), '.2f')} times the best peer, {peer}")


def _draw_results(results: list[dict[str, Any]]) -> Figure:
    """A chart of bars a network: images/s over those of the best peer."""
    heights = [1 + 0.3 * len(result["competitors"]) for result in results]
    figure = Figure(figsize=(8, sum(heights)), layout="constrained")
    charts = figure.subplots(len(results), squeeze=False, height_ratios=heights)[:, 0]
    for chart, result in zip(charts, results, strict=True):
        speeds = {name: _speeds(result, name) for name in result["competitors"]}
        medians = {name: median(speeds[name]) for name in speeds if speeds[name]}
        names = sorted(medians, key=lambda name: medians[name])
        peer = _best_peer(result)
        unit = medians[peer or OURS] if medians else 1
        bars = chart.barh(
            names,
            [medians[name] / unit for name in names],
            color=[_OURS_COLOUR if name == OURS else _PEER_COLOUR for name in names],
            height=0.7,
        )
        chart.bar_label(bars, [f"{medians[name]:,.0f}" for name in names], padding=4)
        chart.set_title(str(Case(**result["case"])), loc="left", fontweight="bold")
        chart.axvline(1, color=_INK, linewidth=0.8, linestyle=":")
        chart.margins(x=0.12)
        chart.spines[["top", "right", "left"]].set_visible(False)
        chart.tick_params(axis="y", length=0)
    charts[-1].set_xlabel("speed over the best peer's; the numbers are images/s")
    return figure


def _draw_growth(points: list[dict[str, Any]]) -> Figure:
    figure = Figure(figsize=(8, 6), layout="constrained")
    axes = dict.fromkeys(point["axis"] for point in points)
    for chart, axis in zip(figure.subplots(2, 2).flat, axes, strict=True):
        some = [point for point in points if point["axis"] == axis]
        values = [point["value"] for point in some]
        costs = [1e6 * median(point["seconds_per_image"]) for point in some]
        chart.plot(values, costs, marker="o", color=_OURS_COLOUR)
        chart.set(xscale="log", xlabel=axis, ylabel="µs an image", ylim=(0, 1.15 * max(costs)))
        chart.spines[["top", "right"]].set_visible(False)
        chart.set_xticks(values, [f"{value:,}" for value in values], rotation=45)
        chart.minorticks_off()
    return figure


def _print_growth(points: list[dict[str, Any]]) -> None:
    table = Table(title=f"{OURS}: what an image costs")
    for heading in ("", "value", "µs an image", "images/s"):
        table.add_column(heading, justify="right" if heading else "left")
    for point in points:
        seconds = point["seconds_per_image"]
        table.add_row(
            point["axis"],
            f"{point['value']:,}",
            _range([1e6 * value for value in seconds], ",.1f"),
            f"{1 / median(seconds):,.0f}",
        )
    console.print(table)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        usage="%(prog)s [options]",
        description="Measures the training speed beside other frameworks.",
    )
    parser.add_argument("--arch", nargs="+", choices=list(fm.RECIPES), default=list(fm.RECIPES))
    parser.add_argument(
        "--batch-size", nargs="+", type=int, help="default: 128, and 126 for deep_augmented"
    )
    parser.add_argument("--competitor", nargs="+", choices=list(COMPETITORS))
    parser.add_argument("--rounds", type=int, default=5, help="(%(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="training of each in a round (%(default)s)"
    )
    parser.add_argument("--device", choices=("cpu", "gpu"), help="default: the one JAX finds")
    parser.add_argument(
        "--start",
        action="store_true",
        help="start each twice: the second takes what the first compiled",
    )
    parser.add_argument(
        "--growth", action="store_true", help="measure how the cost of an image grows instead"
    )
    parser.add_argument("--output", type=Path, default=Path("bench"), help="folder (%(default)s)")
    arguments = parser.parse_args(argv)

    if arguments.rounds < 1 or not 0 < arguments.seconds < float("inf"):
        parser.error("--rounds must be at least 1 and --seconds above 0")
    if not all(0 < size <= NUM_IMAGES for size in arguments.batch_size or []):
        parser.error(f"--batch-size must be 1 to {NUM_IMAGES:,}")
    if arguments.device is not None:
        jax.config.update("jax_platforms", "cuda" if arguments.device == "gpu" else "cpu")
    try:
        arguments.device = jax.default_backend()
    except (RuntimeError, AssertionError):  # the latter from its plugin for GPUs
        parser.error(f"JAX finds no {arguments.device} here")
    able = [name for name in COMPETITORS if arguments.device in COMPETITORS[name].devices]
    arguments.competitor = list(dict.fromkeys(arguments.competitor or able))
    unable = set(arguments.competitor) - set(able)
    if unable:
        parser.error(f"{', '.join(unable)} does not take part on {arguments.device}")
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    # The children share the GPU's memory with this process.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    arguments = _parse(argv)
    # So that the children end with this process in any case.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        return _run(arguments)
    except ChildError as error:
        console.print(f"{OURS} {error}", style="red", markup=False)
        return 1
    except (fm.DataError, OSError) as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 2
    except KeyboardInterrupt:
        console.print(f"interrupted; what is complete is in {arguments.output}")
        return 130


def _run(arguments: argparse.Namespace) -> int:
    arguments.output.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {
        "machine": environment.describe(),
        "rounds": arguments.rounds,
        "seconds": arguments.seconds,
    }
    with tempfile.TemporaryDirectory() as folder, mpl.rc_context(_STYLE):
        data = Path(folder) / "data.npz"
        dataset = fm.load_fashion_mnist()
        np.savez(data, images=dataset.train_images, labels=dataset.train_labels)
        bench = Bench(arguments, data)
        if arguments.growth:
            report["growth"] = bench.measure_growth()
            files.write_json(arguments.output / "growth.json", report)
            _draw_growth(report["growth"]).savefig(arguments.output / "growth.png", dpi=144)
            _print_growth(report["growth"])
            return 0
        results = report["results"] = []
        for arch in arguments.arch:
            for batch_size in arguments.batch_size or [None]:
                results.append(bench.measure(_case(arch, batch_size)))
                files.write_json(arguments.output / "bench.json", report)
                _draw_results(results).savefig(arguments.output / "bench.png", dpi=144)
                _print_result(results[-1])
    problems = any(r["problem"] for result in results for r in result["competitors"].values())
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
