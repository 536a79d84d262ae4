"""Exports a trained network for other programs.

    fmnist-jax export runs/mine --format onnx --output exported/

`stablehlo` runs with JAX and flatbuffers on CPU, CUDA and TPU; `onnx` in ONNX Runtime and others;
`safetensors` holds the weights. An export is written only if it gives the results of the network.

Exit status: 0 done, 1 an export differs from the network, 2 bad usage or bad input.
"""

import argparse
from pathlib import Path

from rich.console import Console

from fmnist_jax.commands import flags, shell
from fmnist_jax.export.formats import FORMATS


def create_parser() -> argparse.ArgumentParser:
    """Creates the parser of the command line."""
    parser = flags.Parser(description="Exports a trained network.")
    flags.add_network_arguments(parser)
    parser.add_argument(
        "--format", nargs="+", choices=list(FORMATS), default=list(FORMATS), help="default: all"
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: export in RUN")
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
    return 0


main = shell.main_of(_run, create_parser)
