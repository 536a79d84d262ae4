"""How a command runs: console, warnings, errors as one line, exit statuses."""

import argparse
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable
from typing import Any

import jax
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fmnist_jax import errors
from fmnist_jax.distributed import processes
from fmnist_jax.distributed.watchdog import end_lost, end_when_aborted
from fmnist_jax.xla.cache import enable_compilation_cache, remove_unreadable_entry

SAMPLE_NOTE = "Trained on the embedded sample; these accuracies are not results."

_WARNINGS = (errors.DataWarning, errors.CheckpointWarning, errors.EnvironmentWarning)


class CommandConsole(Console):
    """Prints text without markup; keeps running if its output is closed, as by `| head`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def on_broken_pipe(self) -> None:
        """Discards all further output."""
        self.quiet = True
        _discard_output()


def run(
    command: Callable[[argparse.Namespace, Console], int], arguments: argparse.Namespace
) -> int:
    """Runs a command and prints errors and warnings in one line each.

    Args:
      command: returns the exit status.
      arguments: with the flags of `add_output_flags`.

    Returns:
      The exit status: that of the command, or 1 if a verification failed, 2 for bad input or if
      the state could not be saved or memory ran out, 3 if training diverged, 130 or 143 if it was
      interrupted, 141 if standard output was closed.
    """
    console = CommandConsole(quiet=arguments.quiet)
    error_console = CommandConsole(stderr=True)

    def show_warning(message: Any, *_args: Any, **_kwargs: Any) -> None:
        remove_unreadable_entry(str(message))
        error_console.print(f"warning: {message}", style="bold yellow", highlight=False)

    with warnings.catch_warnings():
        for category in _WARNINGS:
            warnings.simplefilter("always", category)
        warnings.showwarning = show_warning
        is_distributed = getattr(arguments, "distributed", False)
        try:
            _choose_devices(getattr(arguments, "devices", None), is_distributed)
            if is_distributed:
                processes.start()
                end_when_aborted()
                if not processes.is_first():
                    console.quiet = True
            jax.config.update("jax_enable_compilation_cache", not arguments.no_cache)
            if not arguments.no_cache:
                enable_compilation_cache()
            return command(arguments, console)
        except BrokenPipeError:  # standard output was closed
            _discard_output()
            return 128 + signal.SIGPIPE
        # CheckpointError is an OSError.
        except (errors.ConfigError, errors.DataError, errors.DamagedFileError, OSError) as error:
            message, status = f"error: {_error_text(error)}", 2
        except errors.VerificationError as error:
            message, status = f"verification failed: {error}", 1
        except errors.DivergedError as error:
            message, status = f"diverged: {error}", 3
        except errors.Interrupted as stop:
            message, status = str(stop), 128 + (stop.signal_number or signal.SIGINT)
        except (jax.errors.JaxRuntimeError, ValueError) as error:
            # JAX's errors begin with a status such as UNAVAILABLE.
            first_line = str(error).partition("\n")[0]
            if first_line.startswith("RESOURCE_EXHAUSTED"):
                hint = "a smaller batch, microbatch or image size needs less memory"
                message, status = f"error: out of memory; {hint} ({first_line})", 2
            elif is_distributed and re.match(r"[A-Z_]+: ", first_line):
                end_lost(f"another process has ended or cannot be reached ({first_line[:60]}...)")
            else:
                raise
    if is_distributed and not processes.is_first():
        message = f"process {jax.process_index()}: {message}"
    error_console.print(message, highlight=False, soft_wrap=True)
    return status


def _discard_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _error_text(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _choose_devices(devices: str | None, is_distributed: bool) -> None:
    """Makes JAX divide the CPU into as many devices as the flag asks for."""
    # A larger number is refused, because there are too few devices.
    if devices is not None and re.fullmatch("[0-9]{1,4}", devices) and not is_distributed:
        jax.config.update("jax_num_cpu_devices", int(devices))


def print_facts(
    console: Console, facts: dict[str, str], *, bold: str = "", sample: bool = False
) -> None:
    """Prints names and values in two columns.

    Args:
      console: receives them.
      facts: the values by name.
      bold: name of the most important one.
      sample: whether to add that they are from the embedded sample.
    """
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")  # paths are shown whole
    for name, value in facts.items():
        table.add_row(name, Text(value, "bold" if name == bold else ""))
    console.print(table)
    if sample:
        console.print(SAMPLE_NOTE, style="bold red")


def format_accuracy(figures: dict[str, Any]) -> str:
    """Formats a mean over seeds and its interval, as `seeds.json` holds them.

    Example:
      >>> format_accuracy({"mean": 0.92, "std": 0.001, "low": 0.91, "high": 0.93, "n": 3})
      '92.00% (95% interval 91.00% to 93.00%, standard deviation 0.10 points, n = 3)'
    """
    if figures["std"] is None:
        return f"{figures['mean']:.2%} (n = 1)"
    return (
        f"{figures['mean']:.2%} (95% interval {figures['low']:.2%} to {figures['high']:.2%}, "
        f"standard deviation {100 * figures['std']:.2f} points, n = {figures['n']})"
    )
