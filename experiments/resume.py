"""Verifies that a killed run resumes to the bits of an uninterrupted one.

    python experiments/run.py --verify-resume --arch small_dropout

Trains on two classes of the embedded sample twice: without interruption, and killed by SIGKILL
during a save, stopped by SIGTERM and killed after a save, resumed each time.
"""

import contextlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from rich.console import Console
from rich.table import Table

import fmnist_jax as fm
from fmnist_jax.digest import sha256_array, sha256_json
from fmnist_jax.errors import VerificationError
from fmnist_jax.runs import files

RUN = Path(__file__).with_name("run.py")

# Measured times, which differ between runs.
_TIMES = ("seconds", "images_per_second", "compile_seconds", "train_seconds")

# Two epochs of six steps. Two classes leave 200 test images, and 2% leaves 24 for validation.
FLAGS = (
    "--sample", "--classes", "sandal,bag", "--epochs", "2", "--batch-size", "8",
    "--train-examples", "48", "--val-fraction", "0.02", "--checkpoint-every", "2st",
)  # fmt: skip

# Side of resized images, to save time. Each layer of deep_augmented uses the same algorithm as at
# 150 pixels.
IMAGE_SIZE = 96


def outcome(workdir: Path) -> dict[str, str]:
    """Returns the SHA-256 of each item of a finished run that interruptions must not change."""
    items: dict[str, Any] = {files.CONFIG: files.read_json(workdir / files.CONFIG)}
    # An interrupted run has further checkpoints, those of its stops.
    for which in ("latest", "best"):
        checkpoint = fm.load_checkpoint(workdir, which)
        name = f"{which} checkpoint, step {checkpoint.step}"
        items |= {f"{name}: {key}": array for key, array in checkpoint.arrays.items()}
        items[f"{name}: validation accuracy"] = checkpoint.score
    items[files.METRICS] = [_timeless(line) for line in files.read_lines(workdir / files.METRICS)]
    items[files.REPORT] = _timeless(files.read_json(workdir / files.REPORT))
    for name in (files.PREDICTIONS, files.EXAMPLES):
        arrays = files.read_arrays(workdir / name)
        items |= {f"{name}: {key}": array for key, array in arrays.items()}
    return {name: _sha256(item) for name, item in items.items()}


def verify(arch: str, console: Console, flags: Sequence[str] = ()) -> bool:
    """Trains, kills, resumes and compares.

    Args:
      arch: name of a recipe; its network is trained.
      console: receives progress and result.
      flags: further flags of both runs.

    Returns:
      Whether every bit is equal.

    Raises:
      VerificationError: if a run fails.
    """
    started = time.monotonic()
    name = arch
    if fm.RECIPES[arch].image_size is not None:
        flags = [*flags, "--image-size", str(IMAGE_SIZE)]
        name += f" at {IMAGE_SIZE} x {IMAGE_SIZE} pixels"
    with contextlib.ExitStack() as stack:
        for number in (signal.SIGINT, signal.SIGTERM):
            stack.callback(signal.signal, number, signal.signal(number, _exit))
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        straight, killed = Path(folder) / "straight", Path(folder) / "killed"

        def start(workdir: Path) -> subprocess.Popen[str]:
            command = [sys.executable, str(RUN), "--arch", arch, *FLAGS, *flags]
            process = subprocess.Popen(
                [*command, "--quiet", "--workdir", str(workdir)], stderr=subprocess.PIPE, text=True
            )
            # Killed at the end of this function, also after an error or a signal.
            stack.callback(process.wait)
            stack.callback(process.kill)
            return process

        def interrupt(text: str, number: signal.Signals, *reached: str) -> None:
            console.print(f"{text} ...", highlight=False)
            _kill(start(killed), number, [killed / files.CHECKPOINTS / name for name in reached])

        # The save takes 50 ms; if it has ended, the kill comes after it.
        interrupt(
            f"Training {name}; killing it during the save of step 4",
            signal.SIGKILL, ".saving-4", "4",
        )  # fmt: skip
        # The training loop is cached by now.
        console.print("Training another without interruption, meanwhile:", highlight=False)
        whole = start(straight)
        interrupt("Resuming the first; stopping it after step 4", signal.SIGTERM, "4")
        interrupt("Resuming; killing it after step 10", signal.SIGKILL, "10")
        console.print("Resuming to the end ...")
        last = start(killed)
        _finish(whole, straight)
        _finish(last, killed)
        expected, found = outcome(straight), outcome(killed)
    return _print_comparison(expected, found, console, time.monotonic() - started)


def _exit(number: int, frame: Any) -> NoReturn:
    del frame
    raise SystemExit(128 + number)


def _finish(process: subprocess.Popen[str], workdir: Path) -> None:
    # The report is the last file that is compared.
    _wait_for([workdir / files.REPORT], process)
    process.kill()
    process.communicate()


def _kill(process: subprocess.Popen[str], number: signal.Signals, reached: Sequence[Path]) -> None:
    _wait_for(reached, process)
    process.send_signal(number)
    _, errors = process.communicate()
    expected = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 128 + signal.SIGTERM}[number]
    if process.returncode != expected:
        raise VerificationError(
            f"a run ended with status {process.returncode} after {number.name}: {errors.strip()}"
        )


def _wait_for(paths: Sequence[Path], process: subprocess.Popen[str]) -> None:
    """Waits until one of the paths exists."""
    while not any(path.exists() for path in paths):
        # The process may have created it and ended since the check above.
        if process.poll() is not None and not any(path.exists() for path in paths):
            raise VerificationError(
                f"a run ended with status {process.returncode} before it was expected: "
                f"{process.communicate()[1].strip()}"
            )
        time.sleep(0.0005)


def _print_comparison(
    expected: dict[str, str], found: dict[str, str], console: Console, seconds: float
) -> bool:
    groups: dict[str, list[str]] = {}
    for name in {**expected, **found}:
        groups.setdefault(name.partition(":")[0], []).append(name)
    table = Table()
    for heading in ("file", "items", "SHA-256, uninterrupted", "SHA-256, interrupted"):
        table.add_column(heading)
    for group, names in groups.items():
        pair = [
            _sha256([items.get(name, "missing") for name in names])[:16]
            for items in (expected, found)
        ]
        style = None if pair[0] == pair[1] else "bold red"
        table.add_row(group, str(len(names)), *pair, style=style)
    console.print(table)
    different = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
    for name in different:
        console.print(f"different: {name}", style="bold red")
    verdict = "DIFFERENT" if different else "Bitwise identical"
    console.print(
        f"{verdict}: {len(expected)} items compared after three interruptions, in {seconds:.0f} s."
    )
    return not different


def _timeless(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in _TIMES}


def _sha256(item: Any) -> str:
    if isinstance(item, np.ndarray):
        return sha256_json([str(item.dtype), item.shape, sha256_array(item)])
    return sha256_json(item)
