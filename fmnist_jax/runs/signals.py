"""Signals that ask a run to stop wait until the state is saved."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

# A second one acts at once. The others do not, because a closed terminal sends SIGHUP twice.
_URGENT = {signal.SIGINT, signal.SIGTERM}

# What a closed session (HUP), a scheduler (USR1, USR2, and XCPU at a limit of processor time), a
# timer (ALRM) and a failing power supply (PWR) send. Windows has none of them.
_NAMES = ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGALRM", "SIGPWR")
STOPPING = _URGENT | {getattr(signal, name) for name in _NAMES if hasattr(signal, name)}


@contextlib.contextmanager
def deferred_signals() -> Iterator[list[int]]:
    """Records the signals of `STOPPING` instead of acting on them.

    A second SIGINT or SIGTERM acts at once. Python runs handlers between compiled calls. Ignored
    signals stay ignored, and those other than SIGINT and SIGTERM keep a handler of the user's.
    Outside the main thread, where Python handles no signals, this does nothing.

    Yields:
      The numbers of the recorded signals; empty until one arrives.

    Example:
      >>> import os
      >>> with deferred_signals() as received:
      ...     os.kill(os.getpid(), signal.SIGTERM)
      ...     received == [signal.SIGTERM]
      True
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    handlers = {number: signal.getsignal(number) for number in STOPPING}
    # None is a handler that was not installed from Python and cannot be restored.
    handlers = {
        number: handler
        for number, handler in handlers.items()
        if handler == signal.SIG_DFL
        or (number in _URGENT and handler not in (None, signal.SIG_IGN))
    }

    def restore(numbers: set[signal.Signals]) -> None:
        for number in numbers & handlers.keys():
            signal.signal(number, handlers[number])

    def record(number: int, frame: FrameType | None) -> None:
        del frame
        if number in _URGENT and not _URGENT.isdisjoint(received):
            restore(_URGENT)
            signal.raise_signal(number)
        received.append(number)

    for number in handlers:
        signal.signal(number, record)
    try:
        yield received
    finally:
        restore(STOPPING)
