"""Exports a trained network for other programs.

    fmnist-jax export runs/mine --format onnx --output exported/

`stablehlo` runs with JAX and flatbuffers on CPU, CUDA and TPU; `onnx` in ONNX Runtime and others;
`safetensors` holds the weights. An export is written only if it gives the results of the network.

Exit status: 0 done, 1 an export differs from the network, 2 bad usage or bad input.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import jax
import jax.export
import numpy as np
from rich.console import Console
from rich.table import Table

import fmnist_jax as fm
from fmnist_jax.commands import flags, shell
from fmnist_jax.export.formats import FORMATS

# Of the measurement of speed.
BATCH_SIZES = (1, 1000)
ROUNDS = 9


def main(argv: Sequence[str]) -> int:
    """Runs the command line and returns the exit status."""
    return shell.run(_run, create_parser().parse_args(argv))


def create_parser() -> argparse.ArgumentParser:
    """Creates the parser of the command line."""
    parser = flags.Parser(description="Exports a trained network.")
    flags.add_network_arguments(parser)
    parser.add_argument(
        "--format", nargs="+", choices=list(FORMATS), default=list(FORMATS), help="default: all"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: export in RUN")
    parser.add_argument(
        "--time", action="store_true", help="measure the predictions of the exports, in turns"
    )
    flags.add_output_flags(parser)
    return parser


def _run(arguments: argparse.Namespace, console: Console) -> int:
    classifier = flags.load_classifier(arguments)
    folder = arguments.output or arguments.run / "export"
    for name in arguments.format:
        path = FORMATS[name](classifier, folder)
        console.print(
            f"{path}: {path.stat().st_size / 2**20:.1f} MiB, tested against the network",
            highlight=False,
            soft_wrap=True,
        )
    if arguments.time:
        console.print(_measure(classifier, folder, arguments.format))
    return 0


def _measure(classifier: fm.Classifier, folder: Path, formats: Sequence[str]) -> Table:
    functions: dict[str, Callable[[np.ndarray], Any]] = {"classifier.logits": classifier.logits}
    if "stablehlo" in formats:
        content = (folder / "model.stablehlo").read_bytes()
        call = jax.jit(jax.export.deserialize(bytearray(content)).call)
        functions["StableHLO, jax.jit"] = lambda images: jax.block_until_ready(call(images))
    if "onnx" in formats:
        import onnxruntime

        session = onnxruntime.InferenceSession(folder / "model.onnx")
        functions["ONNX Runtime"] = lambda images: session.run(None, {"images": images})
    table = Table("", *(f"batch of {size:,}, ms" for size in BATCH_SIZES))
    cells: dict[str, list[str]] = {name: [] for name in functions}
    for size in BATCH_SIZES:
        images = fm.load_fashion_mnist(sample=True).test_images[:size]
        rounds: dict[str, list[float]] = {name: [] for name in functions}
        for number in range(ROUNDS + 1):
            for name, function in functions.items():
                seconds = _seconds(function, images)
                if number:  # the first one compiles
                    rounds[name].append(seconds)
        for name, values in rounds.items():
            low, middle, high = (1e3 * f(values) for f in (min, median, max))
            cells[name].append(f"{middle:.3g} ({low:.3g} to {high:.3g})")
    for name, row in cells.items():
        table.add_row(name, *row)
    return table


def _seconds(function: Callable[[np.ndarray], Any], images: np.ndarray) -> float:
    """Returns the mean duration of the calls in a fifth of a second."""
    num_calls, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < 0.2 or num_calls == 0:
        function(images)
        num_calls += 1
    return elapsed / num_calls
