"""Shows that a run that is killed goes on to the very bits of one that was never stopped.

    python experiments/run.py --verify-resume --arch small_dropout

It trains on two classes of the embedded sample twice: in one go, and killed by SIGKILL in the
middle of a save, stopped by SIGTERM, killed right after a save, and each time started again.
"""

import contextlib
import hashlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import fmnist_jax as fm
from fmnist_jax.runs import files

RUN = Path(__file__).with_name("run.py")

# What a clock decides.
_TIMES = ("seconds", "images_per_second", "compile_seconds", "train_seconds")

# Two epochs of six updates. Two classes leave 200 test images, two percent few for validation.
FLAGS = (
    "--sample", "--classes", "sandal,bag", "--epochs", "2", "--batch-size", "8",
    "--train-examples", "48", "--val-fraction", "0.02", "--checkpoint-every", "2st",
)  # fmt: skip

# Side of resized images, so that it takes no longer than it must; each layer of deep_augmented is
# computed in the way that it is for 150.
IMAGE_SIZE = 96


def outcome(workdir: Path) -> dict[str, str]:
    """SHA-256 of each thing in a complete run's folder that must not depend on interruptions."""
    things: dict[str, Any] = {files.CONFIG: files.read_json(workdir / files.CONFIG)}
    # Of the others, those of a stop are more than there would have been.
    for which in ("latest", "best"):
        checkpoint = fm.load_checkpoint(workdir, which)
        name = f"{which} checkpoint, step {checkpoint.step}"
        things |= {f"{name}: {key}": array for key, array in checkpoint.arrays.items()}
        things[f"{name}: validation accuracy"] = checkpoint.score
    things[files.METRICS] = [_timeless(line) for line in files.read_lines(workdir / files.METRICS)]
    things[files.REPORT] = _timeless(files.read_json(workdir / files.REPORT))
    for name in (files.PREDICTIONS, files.EXAMPLES):
        for key, array in files.read_arrays(workdir / name).items():
            things[f"{name}: {key}"] = array
    return {name: _sha256(thing) for name, thing in things.items()}


def verify(recipe: fm.Recipe, console: Console, flags: Sequence[str] = ()) -> bool:
    """Runs, kills, goes on, compares and prints; True if every bit is equal.

    Args:
      recipe: of the network.
      console: where to print.
      flags: further flags of both runs.

    Raises:
      fm.VerificationError: if a run fails.
    """
    begun = time.monotonic()
    name = recipe.arch
    if recipe.image_size is not None:
        flags = [*flags, "--image-size", str(IMAGE_SIZE)]
        name += f" at {IMAGE_SIZE} x {IMAGE_SIZE} pixels"
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        straight, killed = Path(folder) / "straight", Path(folder) / "killed"

        def start(workdir: Path) -> subprocess.Popen[str]:
            command = [sys.executable, str(RUN), "--arch", recipe.arch, *FLAGS, *flags]
            return subprocess.Popen(
                [*command, "--quiet", "--workdir", str(workdir)], stderr=subprocess.PIPE, text=True
            )

        def interrupt(text: str, number: signal.Signals, *reached: str) -> None:
            console.print(f"{text} ...", highlight=False)
            _kill(start(killed), number, [killed / files.CHECKPOINTS / name for name in reached])

        # The save takes 50 ms; should it have ended, the kill comes after it.
        interrupt("Killing a run while it saves step 4", signal.SIGKILL, ".saving-4", "4")
        # The training loop is compiled by now, and found by those that follow.
        console.print(f"Training {name} in one go, and beside it:", highlight=False)
        whole = start(straight)
        stack.callback(whole.wait)  # for where an error ends this first
        stack.callback(whole.kill)
        interrupt("Going on, and stopping it after step 4", signal.SIGTERM, "4")
        interrupt("Going on, and killing it after step 10", signal.SIGKILL, "10")
        console.print("Going on to the end ...")
        last = start(killed)
        _finish(whole, straight)
        _finish(last, killed)
        expected, found = outcome(straight), outcome(killed)
    return _print_comparison(expected, found, console, time.monotonic() - begun)


def _finish(process: subprocess.Popen[str], workdir: Path) -> None:
    # Everything that is compared is there with the report; what follows only draws it.
    _wait_for([workdir / files.REPORT], process)
    process.kill()
    process.communicate()


def _kill(process: subprocess.Popen[str], number: signal.Signals, reached: Sequence[Path]) -> None:
    _wait_for(reached, process)
    process.send_signal(number)
    _, errors = process.communicate()
    expected = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 128 + signal.SIGTERM}[number]
    if process.returncode != expected:
        raise fm.VerificationError(
            f"a run ended with status {process.returncode} on {number.name}: {errors.strip()}"
        )


def _wait_for(paths: Sequence[Path], process: subprocess.Popen[str]) -> None:
    """Until one of them is there."""
    while not any(path.exists() for path in paths):
        # It may have been made, and the process ended, since the look above.
        if process.poll() is not None and not any(path.exists() for path in paths):
            raise fm.VerificationError(
                f"a run ended with status {process.returncode} too early: "
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
    for heading in ("compared", "things", "SHA-256 in one go", "killed three times"):
        table.add_column(heading)
    for group, names in groups.items():
        pair = [
            _sha256([things.get(name, "missing") for name in names])[:16]
            for things in (expected, found)
        ]
        style = None if pair[0] == pair[1] else "bold red"
        table.add_row(group, str(len(names)), *pair, style=style)
    console.print(table)
    different = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
    for name in different:
        console.print(f"different: {name}", style="bold red")
    equal = not different
    console.print(
        f"{'Equal to the last bit' if equal else 'NOT EQUAL'}: {len(expected)} things compared "
        f"after three interruptions, in {seconds:.0f} s."
    )
    return equal


def _timeless(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in _TIMES}


def _sha256(thing: Any) -> str:
    if isinstance(thing, np.ndarray):
        content = f"{thing.dtype} {thing.shape};".encode() + np.ascontiguousarray(thing).tobytes()
    else:
        content = json.dumps(thing).encode()
    return hashlib.sha256(content).hexdigest()
