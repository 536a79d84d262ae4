"""`verify_resume`: checks that a killed run resumes to the bits of an uninterrupted one."""

import contextlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from fmnist_jax.digest import sha256_array, sha256_json
from fmnist_jax.errors import VerificationError
from fmnist_jax.recipes import find_recipe
from fmnist_jax.runs import files
from fmnist_jax.runs.checkpoint import load_checkpoint

# Measured times, which differ between runs.
_TIMES = ("seconds", "images_per_second", "compile_seconds", "train_seconds")

# Two epochs of six steps. Two classes leave 200 test images, and 2% leaves 24 for validation.
_FLAGS = (
    "--sample", "--classes", "sandal,bag", "--epochs", "2", "--batch-size", "8",
    "--train-examples", "48", "--val-fraction", "0.02", "--checkpoint-every", "2st", "--quiet",
)  # fmt: skip

# Side of resized images, to save time. Each layer of deep_augmented uses the same algorithm as at
# 150 pixels.
_IMAGE_SIZE = 96


def outcome(workdir: Path) -> dict[str, str]:
    """Returns the SHA-256 of each item of a finished run that interruptions must not change."""
    items: dict[str, Any] = {files.CONFIG: files.read_json(workdir / files.CONFIG)}
    # An interrupted run has further checkpoints, those of its stops.
    for which in ("latest", "best"):
        checkpoint = load_checkpoint(workdir, which)
        name = f"{which} checkpoint, step {checkpoint.step}"
        items |= {f"{name}: {key}": array for key, array in checkpoint.arrays.items()}
        items[f"{name}: validation accuracy"] = checkpoint.score
    items[files.METRICS] = [_timeless(line) for line in files.read_lines(workdir / files.METRICS)]
    items[files.REPORT] = _timeless(files.read_json(workdir / files.REPORT))
    for name in (files.PREDICTIONS, files.EXAMPLES):
        arrays = files.read_arrays(workdir / name)
        items |= {f"{name}: {key}": array for key, array in arrays.items()}
    return {name: _sha256_item(item) for name, item in items.items()}


def verify_resume(
    name: str, flags: Sequence[str] = (), say: Callable[[str], None] = lambda _: None
) -> tuple[dict[str, str], dict[str, str]]:
    """Trains on two classes of the embedded sample twice, once with three interruptions.

    The interrupted run is killed by SIGKILL during a save, stopped by SIGTERM and killed after a
    save, and resumed each time.

    Args:
      name: of a recipe; its network is trained.
      flags: further flags of both runs.
      say: receives messages.

    Returns:
      What `outcome` returns, of the uninterrupted run and of the other.

    Raises:
      VerificationError: if a run fails.
    """
    if find_recipe(name).image_size is not None:
        flags = [*flags, "--image-size", str(_IMAGE_SIZE)]
    with contextlib.ExitStack() as stack:
        for number in (signal.SIGINT, signal.SIGTERM):
            stack.callback(signal.signal, number, signal.signal(number, _exit))
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        straight, killed = Path(folder) / "straight", Path(folder) / "killed"

        def start(workdir: Path) -> subprocess.Popen[str]:
            command = [sys.executable, "-m", "fmnist_jax", "run", "--arch", name, *_FLAGS, *flags]
            process = subprocess.Popen(  # noqa: S603 (this package itself)
                [*command, "--workdir", str(workdir)], stderr=subprocess.PIPE, text=True
            )
            # Killed at the end of this function, also after an error or a signal.
            stack.callback(process.wait)
            stack.callback(process.kill)
            return process

        def interrupt(text: str, number: signal.Signals, *reached: str) -> None:
            say(f"{text} ...")
            _kill(start(killed), number, [killed / files.CHECKPOINTS / path for path in reached])

        # The save takes 50 ms; otherwise the kill follows it.
        interrupt(
            f"Training {name}; killing it during the save of step 4",
            signal.SIGKILL, ".saving-4", "4",
        )  # fmt: skip
        # The training loop is cached by now.
        say("Training another without interruption, meanwhile:")
        whole = start(straight)
        interrupt("Resuming the first; stopping it after step 4", signal.SIGTERM, "4")
        interrupt("Resuming; killing it after step 10", signal.SIGKILL, "10")
        say("Resuming to the end ...")
        last = start(killed)
        _finish(whole, straight)
        _finish(last, killed)
        return outcome(straight), outcome(killed)


def _sha256_item(item: Any) -> str:
    """SHA-256 of an array with its dtype and shape, or of a JSON value."""
    if isinstance(item, np.ndarray):
        return sha256_json([str(item.dtype), item.shape, sha256_array(item)])
    return sha256_json(item)


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


def _timeless(values: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in _TIMES}
