"""SIGINT and SIGTERM: they wait for a place where nothing is lost, but not for ever."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

_NUMBERS = (signal.SIGINT, signal.SIGTERM)


class Signals:
    """What came so far.

    Attributes:
      received: numbers of the signals.
      nothing_to_lose: True while the end of the process would lose nothing.
    """

    def __init__(self) -> None:
        self.received: list[int] = []
        self.nothing_to_lose = False


@contextlib.contextmanager
def waiting_signals() -> Iterator[Signals]:
    """Within it the first SIGINT or SIGTERM is noted only; a second one acts as it did before.

    Python sees a signal when the call into XLA returns that it is in, which may be a compilation.
    Where the signal would end the process, a thread ends it at once, on the second signal, and on
    the first while `nothing_to_lose`.

    Outside the main thread, where Python takes no signals, this does nothing.
    """
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    previous: dict[int, Any] = {number: signal.getsignal(number) for number in _NUMBERS}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def note(number: int, frame: FrameType | None) -> None:
        del frame
        signals.received.append(number)
        restore()

    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    watcher = threading.Thread(target=_watch, args=(reader, previous, signals), daemon=True)
    former = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    watcher.start()
    for number in _NUMBERS:
        signal.signal(number, note)
    try:
        yield signals
    finally:
        restore()
        signal.set_wakeup_fd(former)
        os.close(writer)
        watcher.join()
        os.close(reader)


def _watch(reader: int, previous: dict[int, Any], signals: Signals) -> None:
    count = 0
    while content := os.read(reader, 1):  # ends when the other end is closed
        number = content[0]
        if number not in previous:
            continue
        count += 1
        if previous[number] == signal.SIG_DFL and (count > 1 or signals.nothing_to_lose):
            show_cursor = "\x1b[?25h" if sys.stdout.isatty() else ""
            os.write(2, f"{show_cursor}\nStopped at once; the last checkpoint stands.\n".encode())
            os._exit(128 + number)
