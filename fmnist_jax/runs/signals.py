"""SIGINT and SIGTERM wait until the state is saved."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType


@contextlib.contextmanager
def deferred_signals() -> Iterator[list[int]]:
    """Records the first SIGINT or SIGTERM instead of acting on it.

    The former handlers are restored by the first signal, so that a second one acts at once. Python
    runs handlers between compiled calls. Ignored signals stay ignored. Outside the main thread,
    where Python handles no signals, this does nothing.

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
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # None is a handler that was not installed from Python and cannot be restored.
    handlers = {
        number: handler
        for number, handler in handlers.items()
        if handler not in (None, signal.SIG_IGN)
    }

    def restore() -> None:
        for number, handler in handlers.items():
            signal.signal(number, handler)

    def record(number: int, frame: FrameType | None) -> None:
        del frame
        received.append(number)
        restore()

    for number in handlers:
        signal.signal(number, record)
    try:
        yield received
    finally:
        restore()
