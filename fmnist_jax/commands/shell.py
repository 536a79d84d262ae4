"""How a command runs: console, warnings, errors as one line, exit statuses."""

import argparse
import contextlib
import errno
import io
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
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
    """Prints text without markup; keeps running if its output cannot be written any longer."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def on_broken_pipe(self) -> None:
        """Discards all further output."""
        self.quiet = True
        _discard_output(self.file.fileno())
        error = sys.exc_info()[1]
        if isinstance(error, OSError) and error.errno != errno.EPIPE and not self.stderr:
            warnings.warn(
                f"the output cannot be written ({error.strerror}) and is discarded from here on",
                errors.EnvironmentWarning,
                stacklevel=2,
            )


class _Stream:
    """A text stream whose failures, as on a closed terminal or a full disk, are broken pipes."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for names that it cannot encode

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return self._attempt(self._stream.write, text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def _attempt(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except OSError as error:
            raise BrokenPipeError(error.errno, error.strerror) from error


# Prints to the console and returns the exit status.
Command = Callable[[argparse.Namespace, Console], int]


def main_of(
    command: Command, create_parser: Callable[[], argparse.ArgumentParser]
) -> Callable[[Sequence[str]], int]:
    """Returns a function that runs a command line and returns the exit status."""
    return lambda argv: run(command, create_parser().parse_args(argv))


def run(command: Command, arguments: argparse.Namespace) -> int:
    """Runs a command and prints errors and warnings in one line each.

    Args:
      command: returns the exit status.
      arguments: with the flags of `add_output_flags`.

    Returns:
      The exit status: that of the command, or 1 if a verification failed, 2 for bad input or if
      the state or the output could not be written or memory ran out, 3 if training diverged, 128
      plus the number of the signal if it was interrupted, 141 if standard output was closed.
    """
    console = CommandConsole(quiet=arguments.quiet)
    error_console = CommandConsole(stderr=True)

    def show_warning(message: Any, *_args: Any, **_kwargs: Any) -> None:
        remove_unreadable_entry(str(message))
        error_console.print(
            f"warning: {message}", style="bold yellow", highlight=False, soft_wrap=True
        )

    with warnings.catch_warnings(), _streams_and_settings():
        for category in _WARNINGS:
            warnings.simplefilter("always", category)
        warnings.showwarning = show_warning
        is_distributed = getattr(arguments, "distributed", False)
        try:
            _start_jax(arguments, is_distributed)
            if not processes.is_first():
                console.quiet = True
            jax.config.update("jax_enable_compilation_cache", not arguments.no_cache)
            if not arguments.no_cache:
                enable_compilation_cache()
            return command(arguments, console)
        except BrokenPipeError as error:  # print() could not write
            _discard_output(sys.stdout.fileno())
            if error.errno == errno.EPIPE:
                return 128 + signal.SIGPIPE
            message, status = f"error: the output cannot be written: {error.strerror}", 2
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
            first_line = errors.first_line(error)
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


@contextlib.contextmanager
def _streams_and_settings() -> Iterator[None]:
    """Sets what users may have set otherwise, for a `with` statement."""
    with contextlib.ExitStack() as stack:
        if sys.stdout is not None:  # None where the descriptor is closed
            stack.enter_context(contextlib.redirect_stdout(_Stream(sys.stdout)))
        if sys.stderr is not None:
            stack.enter_context(contextlib.redirect_stderr(_Stream(sys.stderr)))
        # Checks for debugging, which change no result.
        stack.enter_context(jax.numpy_dtype_promotion("standard"))
        stack.enter_context(jax.transfer_guard("allow"))
        yield


def _discard_output(descriptor: int) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def _error_text(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _start_jax(arguments: argparse.Namespace, is_distributed: bool) -> None:
    """Starts JAX with all processes, or with as many CPU devices as the flag asks for."""
    devices = getattr(arguments, "devices", None)
    if is_distributed:
        end_when_aborted()
        if not arguments.quiet:
            print("Connecting the processes; JAX waits up to five minutes ...", file=sys.stderr)
        processes.start()
    # A larger number is refused, because there are too few devices.
    elif devices is not None and re.fullmatch("[0-9]{1,4}", devices):
        jax.config.update("jax_num_cpu_devices", int(devices))
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        raise errors.ConfigError(
            f"JAX finds no device, with JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS')}; unset it, "
            f"or install JAX for this platform ({errors.first_line(error)})"
        ) from error


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
