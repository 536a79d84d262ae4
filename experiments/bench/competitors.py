"""The competitors: their Python environments and processes, and what the commands share."""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from fmnist_jax.digest import sha256_bytes
from fmnist_jax.errors import DataError

FOLDER = Path(__file__).parent
OURS = "fmnist_jax"


# Module in this folder, Python environment (None is that of this process), and options.
COMPETITORS: dict[str, tuple[str, str | None, dict[str, Any]]] = {
    OURS: ("ours", None, {}),
    f"{OURS}_bf16": ("ours", None, {"bf16": True}),
    f"{OURS}_matmul_bf16": ("ours", None, {"matmul_precision": "bfloat16"}),
    # Stock Flax layers in the loop of fmnist_jax, and the same without its optimization of layers.
    f"{OURS}_stock": ("ours", None, {"stock": True}),
    f"{OURS}_plain": ("ours", None, {"stock": True, "optimize": False}),
    "keras_tensorflow": ("keras_fit", "tensorflow", {}),
    "keras_tensorflow_bf16": ("keras_fit", "tensorflow", {"bf16": True}),
    "torch": ("torch_loop", "torch", {}),
    "torch_channels_last": ("torch_loop", "torch", {"channels_last": True}),
    "torch_channels_last_bf16": ("torch_loop", "torch", {"channels_last": True, "bf16": True}),
    "torch_compile_float32": ("torch_loop", "torch", {"channels_last": True, "compiled": True}),
    "torch_compile": (
        "torch_loop", "torch", {"channels_last": True, "bf16": True, "compiled": True}
    ),
    "linen": ("linen_loop", None, {}),
}  # fmt: skip


class CompetitorError(RuntimeError):
    """A competitor failed, or what it computes is wrong."""


class Child:
    """A competitor's process, suspended unless it executes a command.

    Args:
      name: a key of `COMPETITORS`.
      device: "cpu" or "gpu".
      data: .npz file with `images` and `labels`.

    Raises:
      CompetitorError: if packages cannot be installed.
    """

    def __init__(self, name: str, device: str, data: Path) -> None:
        self._name = name
        module, requirements, self._options = COMPETITORS[name]
        python = _interpreter(requirements, device)
        self._data = str(data)
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed by `close`)
        variables = {
            "TF_CPP_MIN_LOG_LEVEL": "3",
            # Several processes share the GPU's memory.
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
            "TF_FORCE_GPU_ALLOW_GROWTH": "true",
            "JAX_PLATFORMS": "cuda" if device == "gpu" else "cpu",
            "JAX_ENABLE_COMPILATION_CACHE": "false",
            "KERAS_BACKEND": "tensorflow",
        }
        if device == "cpu":
            variables["CUDA_VISIBLE_DEVICES"] = "-1"
        self._start = time.perf_counter()
        self._process = subprocess.Popen(  # noqa: S603 (our own command)
            [python, FOLDER / "worker.py", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env=os.environ | variables,
            # Ctrl-C reaches only this process, which then ends its children.
            process_group=0,
        )

    def prepare(self, case: tuple[str, int]) -> tuple[float, float]:
        """Takes the first step; returns the seconds since the process started, and the loss."""
        loss = self.ask("prepare", path=self._data, case=case, **self._options)["loss"]
        return time.perf_counter() - self._start, loss

    def call(self, function: str, **arguments: Any) -> Any:
        """Calls a function, "module.function", with the path of the data."""
        return self.ask(function, path=self._data, **arguments)

    def ask(self, do: str, **arguments: Any) -> Any:
        """Sends a command and waits for the reply.

        Raises:
          CompetitorError: if the process ends before it replies.
        """
        with contextlib.suppress(BrokenPipeError):
            os.killpg(self._process.pid, signal.SIGCONT)
            print(json.dumps({"do": do} | arguments), file=self._process.stdin, flush=True)
        assert self._process.stdout is not None
        reply = self._process.stdout.readline()
        if not reply:
            status = self._process.wait()
            self._log.seek(0)
            lines = self._log.read().splitlines()[-8:]
            raise CompetitorError("\n".join([f"{self._name} ended with status {status}", *lines]))
        os.killpg(self._process.pid, signal.SIGSTOP)
        return json.loads(reply)

    def close(self) -> None:
        """Ends the process and its children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        with contextlib.suppress(BrokenPipeError):  # an unread command
            self._process.communicate()
        self._log.close()


def _interpreter(requirements: str | None, device: str) -> Path:
    """Returns the interpreter of an environment; installs its packages at first use."""
    if requirements is None:
        return Path(sys.executable)
    path = FOLDER / "requirements" / f"{requirements}-{device}.txt"
    digest = sha256_bytes(path.read_bytes() + sys.version.encode())[:8]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "fmnist_jax" / "bench" / f"{path.stem}-{digest}"
    complete, python = folder / "complete", folder / "bin" / "python"
    if not complete.exists():
        print(f"installing {path.stem} into {folder}")
        commands: list[list[str | Path]] = [
            [sys.executable, "-m", "venv", "--clear", folder],
            [python, "-m", "pip", "install", "--quiet", "--requirement", path],
        ]
        for command in commands:
            done = subprocess.run(  # noqa: S603 (our own command)
                command, capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise CompetitorError(f"{path.stem} cannot be installed\n{done.stderr[-2000:]}")
        complete.touch()
    return python


def create_parser(
    description: str, workdir: str, **numbers: tuple[int | float, str]
) -> argparse.ArgumentParser:
    """Creates a parser with the common flags, and flags of numbers: their defaults and helps."""
    parser = argparse.ArgumentParser(usage="%(prog)s [options]", description=description)
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu", help="(%(default)s)")
    parser.add_argument(
        "--workdir", type=Path, metavar="DIR", default=Path(workdir),
        help="folder of the results (%(default)s)",
    )  # fmt: skip
    for name, (default, text) in numbers.items():
        parser.add_argument(
            f"--{name}", type=type(default), metavar=type(default).__name__, default=default,
            help=f"{text} (%(default)s)",
        )  # fmt: skip
    return parser


def parse(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, *positive: str
) -> argparse.Namespace:
    """Parses the command line; the flags that are named here must be above 0."""
    arguments = parser.parse_args(argv)
    for name in positive:
        if not 0 < getattr(arguments, name) < float("inf"):
            parser.error(f"--{name} is {getattr(arguments, name)}; expected a number above 0")
    return arguments


def run(
    command: Callable[[argparse.Namespace, Console], int], arguments: argparse.Namespace
) -> int:
    """Runs a command on the chosen device, prints errors, and returns the exit status."""
    # The children share the GPU's memory with this process.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    jax.config.update("jax_platforms", "cuda" if arguments.device == "gpu" else "cpu")
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 130)
    try:
        arguments.workdir.mkdir(parents=True, exist_ok=True)
        return command(arguments, console)
    except (CompetitorError, DataError, OSError) as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 1 if isinstance(error, CompetitorError) else 2


def exit_on_signals() -> None:
    """Makes SIGTERM and SIGINT raise `SystemExit`, so that the children end with this process.

    A child is suspended most of the time and would never end by itself.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
