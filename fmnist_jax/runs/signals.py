"""SIGINT and SIGTERM: they wait for a place where nothing is lost, but not for ever."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Collection, Iterator
from types import FrameType
from typing import Any, NoReturn

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
        self._lock = threading.Lock()
        self._save: Callable[[], str] | None = None
        self._deadly: int | None = None

    @contextlib.contextmanager
    def saved_by(self, save: Callable[[], str]) -> Iterator[None]:
        """Within it a signal that would end the process does so at once, after a call of `save`.

        That is for what takes long and cannot be looked into. `save` is called in another thread,
        or here if the signal came before; it returns what to say, or raises OSError.
        """
        with self._lock:
            self._save = save
            if self._deadly is not None:
                self._end(self._deadly)
        try:
            yield
        finally:
            with self._lock:  # not while the other thread saves
                self._save = None

    def _came(self, number: int) -> None:
        """Takes a signal that would end the process."""
        with self._lock:
            second = self._deadly is not None
            self._deadly = number
            if second or self.nothing_to_lose:
                _exit("Stopped at once; the last checkpoint stands.", 128 + number)
            if self._save:
                self._end(number)

    def _end(self, number: int) -> NoReturn:
        assert self._save is not None
        try:
            text, status = self._save(), 128 + number
        except OSError as error:
            text, status = f"error: {error}", 2
        _exit(text, status)


@contextlib.contextmanager
def waiting_signals() -> Iterator[Signals]:
    """Within it the first SIGINT or SIGTERM is noted only; a second one acts as it did before.

    Python sees a signal when the call into XLA returns that it is in, which may be a compilation.
    Where the signal would end the process, a thread ends it at once: on the second signal, on the
    first while `nothing_to_lose`, and within `saved_by`.

    What is ignored stays ignored. Outside the main thread, where Python takes no signals, this does
    nothing.
    """
    signals = Signals()
    if threading.current_thread() is not threading.main_thread():
        yield signals
        return
    handlers: dict[int, Any] = {number: signal.getsignal(number) for number in _NUMBERS}
    previous = {number: it for number, it in handlers.items() if it != signal.SIG_IGN}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def note(number: int, frame: FrameType | None) -> None:
        del frame
        signals.received.append(number)
        restore()

    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    deadly = {number for number, handler in previous.items() if handler == signal.SIG_DFL}
    watcher = threading.Thread(target=_watch, args=(reader, deadly, signals), daemon=True)
    former = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    watcher.start()
    for number in previous:
        signal.signal(number, note)
    try:
        yield signals
    finally:
        restore()
        signal.set_wakeup_fd(former)
        os.close(writer)
        watcher.join()
        os.close(reader)


def _watch(reader: int, deadly: Collection[int], signals: Signals) -> None:
    while content := os.read(reader, 1):  # ends when the other end is closed
        if content[0] in deadly:
            signals._came(content[0])


def _exit(text: str, status: int) -> NoReturn:
    show_cursor = "\x1b[?25h" if sys.stdout.isatty() else ""
    os.write(2, f"{show_cursor}\n{text}\n".encode())
    os._exit(status)
