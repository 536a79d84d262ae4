"""A process that makes no progress is ended."""

import queue
import time

import pytest

from fmnist_jax.distributed import watchdog


@pytest.fixture
def statuses(monkeypatch):
    """Receives the exit status instead of the operating system."""
    statuses: queue.Queue[int] = queue.Queue()
    monkeypatch.setattr(watchdog.os, "_exit", statuses.put)
    return statuses


def test_a_process_without_progress_ends_with_status_75(statuses, capsys):
    hook = watchdog.Watchdog(0.2)
    hook.start(settings={}, step=0, total_steps=10)
    assert statuses.get(timeout=30) == 75
    hook.stop()
    assert capsys.readouterr().err.startswith("no progress for 0.2 seconds; the same command")


def test_progress_keeps_the_process(statuses):
    hook = watchdog.Watchdog(1.0)
    hook.start(settings={}, step=0, total_steps=10)
    for step in range(15):
        time.sleep(0.1)
        hook.update(step=step, epoch=0, images_per_second=1.0, loss=1.0)
    hook.stop()
    time.sleep(1.1)
    assert statuses.empty()
