"""`Watchdog`: ends a process that makes no progress while others wait for it."""

import contextlib
import ctypes
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from fmnist_jax.train.hooks import EpochLog, Hook

# What schedulers take for a temporary failure (EX_TEMPFAIL).
LOST_STATUS = 75


def end_lost(message: str) -> None:
    """Prints one line and ends the process at once with `LOST_STATUS`.

    A regular exit would wait for the other processes.
    """
    with contextlib.suppress(OSError):  # the output may be closed
        print(f"{message}; the same command resumes the run", file=sys.stderr, flush=True)
        sys.stdout.flush()
    os._exit(LOST_STATUS)


def end_when_aborted() -> None:
    """Ends this process with one line and `LOST_STATUS` where JAX would abort it.

    JAX calls abort() in a thread of its own when another process is dead or stopped. Python must
    not run in a handler of SIGABRT. Its `faulthandler` writes to a pipe there, `pause` then holds
    the aborting thread, and the thread that reads the pipe ends the process.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
    libc.signal(signal.SIGABRT, ctypes.cast(libc.pause, ctypes.c_void_p))
    read_end, write_end = os.pipe()
    faulthandler.enable(write_end, all_threads=False)

    def wait() -> None:
        text = b""
        while b"Aborted" not in text:
            text += os.read(read_end, 1000)
        end_lost("another process has ended or cannot be reached")

    threading.Thread(target=wait, daemon=True).start()


class Watchdog(Hook):
    """Ends the process when no progress has come for too long, from start to end of training.

    JAX notices a process that is dead or stopped, but not one that is alive and stuck.

    Args:
      seconds: longest time without progress; saving a checkpoint and evaluating some 1,000 images
        must take less.
    """

    in_every_process = True

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._seen = time.monotonic()
        self._stopped = threading.Event()

    def start(self, *, settings: Mapping[str, Any], step: int, total_steps: int) -> None:
        self._seen = time.monotonic()
        self._stopped = threading.Event()
        threading.Thread(target=self._watch, args=(self._stopped,), daemon=True).start()

    def update(self, *, step: int, epoch: int, images_per_second: float, loss: float) -> None:
        self._seen = time.monotonic()

    def evaluate(self, *, split: str, num_done: int, num_images: int) -> None:
        self._seen = time.monotonic()

    def epoch(self, log: EpochLog) -> None:
        self._seen = time.monotonic()

    def stop(self) -> None:
        self._stopped.set()

    def _watch(self, stopped: threading.Event) -> None:
        while not stopped.wait(min(1.0, self._seconds / 4)):
            if time.monotonic() - self._seen > self._seconds:
                end_lost(f"no progress for {self._seconds:g} seconds")
