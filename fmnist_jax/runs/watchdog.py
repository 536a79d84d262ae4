"""`Watchdog`: ends a process that makes no progress while others wait for it."""

import os
import sys
import threading
import time
from typing import Any

from fmnist_jax.runs.writers import NullProgress

# What schedulers take for a temporary failure (EX_TEMPFAIL).
LOST_STATUS = 75


def end_lost(message: str) -> None:
    """Prints one line and ends the process at once with `LOST_STATUS`.

    A regular exit would wait for the other processes.
    """
    print(f"{message}; the same command resumes the run", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(LOST_STATUS)


class Watchdog(NullProgress):
    """Passes progress on, and ends the process when none has come for too long.

    It watches from the start of training to its end. JAX notices a process that is dead or stopped,
    but not one that is alive and stuck.

    Args:
      progress: receives the progress.
      seconds: longest time without progress; saving a checkpoint and evaluating some 1,000 images
        must take less.
    """

    def __init__(self, progress: NullProgress, seconds: float) -> None:
        self._progress, self._seconds = progress, seconds
        self._seen = time.monotonic()
        self._stopped = threading.Event()

    def say(self, text: str) -> None:
        self._progress.say(text)

    def start(self, *, step: int, total_steps: int) -> None:
        self._seen = time.monotonic()
        self._stopped = threading.Event()
        threading.Thread(target=self._watch, args=(self._stopped,), daemon=True).start()
        self._progress.start(step=step, total_steps=total_steps)

    def update(self, *, step: int, epoch: int, images_per_second: float, loss: float) -> None:
        self._seen = time.monotonic()
        self._progress.update(
            step=step, epoch=epoch, images_per_second=images_per_second, loss=loss
        )

    def evaluate(self, *, split: str, num_done: int, num_images: int) -> None:
        self._seen = time.monotonic()
        self._progress.evaluate(split=split, num_done=num_done, num_images=num_images)

    def epoch(self, *, epoch: int, train: dict[str, Any], val: dict[str, Any] | None) -> None:
        self._seen = time.monotonic()
        self._progress.epoch(epoch=epoch, train=train, val=val)

    def stop(self) -> None:
        self._stopped.set()
        self._progress.stop()

    def _watch(self, stopped: threading.Event) -> None:
        while not stopped.wait(min(1.0, self._seconds / 4)):
            if time.monotonic() - self._seen > self._seconds:
                end_lost(f"no progress for {self._seconds:g} seconds")
