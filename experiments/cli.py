"""What the commands share: flags, data, texts and exit statuses."""

import argparse
import ctypes
import dataclasses
import os
import re
import signal
import sys
import types
import typing
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import jax
from rich.console import Console
from rich.table import Table
from rich.text import Text

import fmnist_jax as fm
from fmnist_jax import config, errors
from fmnist_jax.digest import sha256_json
from fmnist_jax.runs.watchdog import end_lost
from fmnist_jax.studies.executors import Executor, RayExecutor, fit_in_turn
from fmnist_jax.xla import processes
from fmnist_jax.xla.cache import enable_compilation_cache, remove_unreadable_entry

SAMPLE_NOTE = "Trained on the embedded sample; these accuracies are not results."

# The C library has a pointer to the handler.
_KEPT: list[Any] = []

_WARNINGS = (errors.DataWarning, errors.CheckpointWarning, errors.EnvironmentWarning)


class Parser(argparse.ArgumentParser):
    """A parser that reports bad usage in one line."""

    def error(self, message: str) -> NoReturn:
        """Prints the message and exits with status 2."""
        self.exit(2, f"error: {message}; --help shows all flags\n")


class CommandConsole(Console):
    """Prints text without markup; keeps running if its output is closed, as by `| head`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, **options)

    def on_broken_pipe(self) -> None:
        """Discards all further output."""
        self.quiet = True
        _discard_output()


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say where the data are."""
    group = parser.add_argument_group("data").add_mutually_exclusive_group()
    group.add_argument(
        "--data-dir",
        type=Path,
        metavar="DIR",
        help="folder with the four IDX files, or TFDS directory",
    )
    group.add_argument("--sample", action="store_true", help="use the embedded sample")


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the data flags and one flag per field of `Recipe` and `Run` that has a help text.

    A training flag that is not given is absent from the parsed arguments.
    """
    add_data_flags(parser)
    group = parser.add_argument_group("recipe", "The defaults are those of the recipe.")
    for field in _fields(fm.Recipe):
        _add_flag(group, field, field.metadata["help"])
    group = parser.add_argument_group("run")
    for field in _fields(fm.Run):
        default = "" if field.default is None else f" ({field.default})"
        _add_flag(group, field, field.metadata["help"] + default)
    group.add_argument(
        "--exclude",
        type=Path,
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="file that lists training images to leave out, one position per line",
    )
    group.add_argument(
        "--classes", metavar="A,B,...", help="train on these, by name or number; default: all"
    )


def add_output_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that `run` reads."""
    parser.add_argument(
        "--no-cache", action="store_true", help="do not use the persistent compilation cache"
    )
    parser.add_argument("--quiet", action="store_true", help="print errors and warnings only")


def add_network_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that `load_classifier` reads."""
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--which",
        metavar="CHECKPOINT",
        default="latest",
        help="latest, best (by validation accuracy), or a step (%(default)s)",
    )


def load_classifier(arguments: argparse.Namespace) -> fm.Classifier:
    """Loads the network that the arguments of `add_network_arguments` describe."""
    which = arguments.which
    if which in ("latest", "best"):
        return fm.load_classifier(arguments.run, which)
    if not which.isdecimal():
        raise errors.ConfigError(f"--which is {which!r}; expected latest, best or a step")
    return fm.load_classifier(arguments.run, int(which))


def add_ray_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that `create_executor` reads."""
    group = parser.add_argument_group("Ray", "Independent runs at once, on a Ray cluster.")
    group.add_argument(
        "--ray",
        metavar="ADDRESS",
        nargs="?",
        const="local",
        help="cluster, such as auto or ray://head:10001; without an address, this machine",
    )
    group.add_argument("--ray-cpus", type=float, metavar="N", default=1, help="cores of a run (1)")
    group.add_argument("--ray-gpus", type=float, metavar="N", default=0, help="GPUs of a run (0)")


def create_executor(arguments: argparse.Namespace) -> Executor:
    """Creates the executor that the flags of `add_ray_flags` describe."""
    if arguments.ray is None:
        return fit_in_turn
    return RayExecutor(arguments.ray, num_cpus=arguments.ray_cpus, num_gpus=arguments.ray_gpus)


def create_run(
    arguments: argparse.Namespace, arch: str, workdir: Path, *, base: fm.Run | None = None
) -> fm.Run:
    """Creates the run that the training flags describe.

    Args:
      arguments: with the flags of `add_training_flags`.
      arch: name of a recipe, a key of `fmnist_jax.RECIPES`.
      workdir: folder of the run.
      base: settings of the run that no flag gives; the recipe is not taken from it.

    Raises:
      ConfigError: if a value is outside its range.
    """
    if arch not in fm.RECIPES:
        raise errors.ConfigError(
            f"unknown architecture {arch!r}; choose one of {', '.join(fm.RECIPES)}"
        )
    recipe = dataclasses.replace(fm.RECIPES[arch], **_given(arguments, fm.Recipe))
    settings = _given(arguments, fm.Run)
    if "exclude" in arguments:
        settings["exclude"] = _read_positions(arguments.exclude)
    if base is None:
        return fm.Run(recipe=recipe, workdir=workdir, **settings)
    return dataclasses.replace(base, recipe=recipe, workdir=workdir, **settings)


def training_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the settings that training flags give."""
    exclude = {"exclude": arguments.exclude} if "exclude" in arguments else {}
    return _given(arguments, fm.Recipe) | _given(arguments, fm.Run) | exclude


def load_data(arguments: argparse.Namespace) -> fm.Dataset:
    """Loads the data that the flags describe.

    Raises:
      ConfigError: if --exclude was made for other data, or is combined with --classes.
      DataError: if the data cannot be read.
    """
    classes = getattr(arguments, "classes", None)
    if classes is not None and "exclude" in arguments:
        raise errors.ConfigError(
            "--exclude lists positions among the images of all classes; leave --classes out"
        )
    dataset = fm.load_fashion_mnist(arguments.data_dir, sample=arguments.sample)
    check_excluded(arguments, dataset)
    return dataset if classes is None else fm.select_classes(dataset, classes)


def check_excluded(arguments: argparse.Namespace, dataset: fm.Dataset) -> None:
    """Refuses a list of excluded images whose comments name the SHA-256 of other data."""
    if "exclude" not in arguments:
        return
    named = re.search(r"#.*SHA-256 ([0-9a-f]{64})", _read_text(arguments.exclude))
    if named is not None and named[1] != dataset.sha256:
        raise errors.ConfigError(
            f"{arguments.exclude} lists images of other data, with SHA-256 {named[1][:12]}...; "
            f"this is {dataset.source}, {dataset.sha256[:12]}..."
        )


def name_workdir(parent: Path, run: fm.Run, dataset: fm.Dataset, *, seeds: bool) -> Path:
    """Returns a folder for these settings, so that the same settings find the same run again.

    Args:
      parent: folder of the folder.
      run: the run, or the first of several seeds.
      dataset: the data.
      seeds: whether runs with further seeds share the folder.
    """
    digest = sha256_json([config.to_dict(run), dataset.class_names, dataset.sha256])
    # Without the number of seeds, so that more can be added.
    name = f"seeds-from-{run.seed}" if seeds else f"seed{run.seed}"
    return parent / f"{run.recipe.arch}-{name}-{digest[:8]}"


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
                _exit_when_lost()
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
            message, status = f"error: {_describe(error)}", 2
        except errors.VerificationError as error:
            message, status = f"verification failed: {error}", 1
        except errors.DivergedError as error:
            message, status = f"diverged: {error}", 3
        except errors.Interrupted as stop:
            message, status = str(stop), 128 + stop.signal_number
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


def _describe(error: Exception) -> str:
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _choose_devices(devices: str | None, is_distributed: bool) -> None:
    """Makes JAX divide the CPU into as many devices as the flag asks for."""
    # A larger number is refused for want of devices.
    if devices is not None and re.fullmatch("[0-9]{1,4}", devices) and not is_distributed:
        jax.config.update("jax_num_cpu_devices", int(devices))


def _exit_when_lost() -> None:
    """Ends this process with one line and `LOST_STATUS` where JAX would abort it.

    JAX calls abort() in a thread of its own when another process is dead or stopped.
    """

    def end(_: int) -> None:
        end_lost("another process has ended or cannot be reached")

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(end)
    _KEPT.append(handler)
    ctypes.CDLL(None).signal(signal.SIGABRT, handler)


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
        f"{figures['mean']:.2%} (95% interval {format_interval(figures['low'], figures['high'])}, "
        f"standard deviation {100 * figures['std']:.2f} points, n = {figures['n']})"
    )


def format_interval(low: float, high: float) -> str:
    """Formats an interval of fractions.

    Example:
      >>> format_interval(0.91, 0.93)
      '91.00% to 93.00%'
    """
    return f"{low:.2%} to {high:.2%}"


def _fields(settings: type[fm.Recipe] | type[fm.Run]) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(settings) if "help" in field.metadata]


def _given(
    arguments: argparse.Namespace, settings: type[fm.Recipe] | type[fm.Run]
) -> dict[str, Any]:
    names = [field.name for field in _fields(settings)]
    return {name: getattr(arguments, name) for name in names if name in arguments}


def _add_flag(
    group: argparse._ArgumentGroup, field: dataclasses.Field[Any], help_text: str
) -> None:
    is_optional = typing.get_origin(field.type) in (types.UnionType, typing.Union)
    kind: Any = typing.get_args(field.type)[0] if is_optional else field.type
    options: dict[str, Any] = {"type": kind, "metavar": getattr(kind, "__name__", None)}
    if typing.get_origin(kind) is typing.Literal:
        options = {"choices": typing.get_args(kind)}
    elif kind is bool:
        options = {"action": argparse.BooleanOptionalAction}
    group.add_argument(
        f"--{field.name.replace('_', '-')}",
        default=argparse.SUPPRESS,
        help=help_text.replace("%", "%%"),
        **options,
    )


def _read_positions(path: Path) -> list[int]:
    """Reads one integer per line; # starts a comment."""
    lines = [line.partition("#")[0].strip() for line in _read_text(path).splitlines()]
    wrong = next((line for line in lines if line and not line.isdecimal()), None)
    if wrong is not None:
        raise errors.ConfigError(f"{path} has the line {wrong!r}; expected one integer per line")
    return [int(line) for line in lines if line]


def _read_text(path: Path) -> str:
    return path.read_text(errors="replace")
