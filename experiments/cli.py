"""What the commands share: the data flags, and errors as one readable message."""

import argparse
import warnings
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

import fmnist_jax as fm
from fmnist_jax.xla.cache import remove_unreadable_entry


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that `load_data` reads."""
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--data-dir", type=Path, help="folder with the IDX files, or TFDS directory"
    )
    source.add_argument("--sample", action="store_true", help="use the embedded sample of the data")


def load_data(arguments: argparse.Namespace) -> fm.Dataset:
    """The data that the flags name."""
    return fm.load_fashion_mnist(arguments.data_dir, sample=arguments.sample)


def run(
    command: Callable[[argparse.Namespace, Console], int],
    arguments: argparse.Namespace,
    *,
    quiet: bool = False,
) -> int:
    """Runs a command and returns the exit status; errors and warnings are shown in one line.

    The status is the command's, or 1 for a verification that failed, 2 for bad input or a state
    that could not be saved, 3 where the loss is not finite, 130 or 143 after an interrupt.
    """
    console, errors = Console(quiet=quiet), Console(stderr=True)

    def show_warning(message, *_args, **_kwargs) -> None:
        remove_unreadable_entry(str(message))
        errors.print(f"warning: {message}", style="bold yellow", highlight=False, markup=False)

    with warnings.catch_warnings():
        for category in (fm.DataWarning, fm.CheckpointWarning, fm.EnvironmentWarning):
            warnings.simplefilter("always", category)
        warnings.showwarning = show_warning
        try:
            return command(arguments, console)
        except (fm.ConfigError, fm.DataError, fm.DamagedFileError, OSError) as error:
            message, status = f"error: {error}", 2
        except fm.VerificationError as error:
            message, status = f"not verified: {error}", 1
        except fm.DivergedError as error:
            message, status = f"diverged: {error}", 3
        except fm.Interrupted as stop:
            message, status = str(stop), 128 + stop.signal_number
    errors.print(message, highlight=False, markup=False, soft_wrap=True)
    return status
