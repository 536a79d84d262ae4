"""Signals are deferred, and a second urgent one is not."""

import os
import signal

import pytest

from fmnist_jax.runs.signals import deferred_signals


def test_the_second_signal_of_a_closed_terminal_does_not_end_the_process():
    with deferred_signals() as received:
        os.kill(os.getpid(), signal.SIGHUP)
        os.kill(os.getpid(), signal.SIGHUP)
    assert received == [signal.SIGHUP, signal.SIGHUP]


def test_a_second_interrupt_acts_at_once_after_any_other_signal():
    with deferred_signals() as received:
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGINT)
        assert received == [signal.SIGUSR1, signal.SIGINT]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
