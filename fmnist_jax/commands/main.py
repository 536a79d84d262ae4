"""Starts a command: `fmnist-jax COMMAND`, or a script in `experiments/`."""

import importlib
import os
import signal
import sys
from importlib.metadata import version
from typing import NoReturn

COMMANDS = {
    "run": "train a recipe and write a report",
    "compare": "compare two recipes over the same seeds",
    "sweep": "search for better settings",
    "predict": "classify pictures with a trained network",
    "export": "export a trained network for other programs",
    "audit": "examine the data: duplicates, pixels, label issues",
    "claims": "compare the recipes with the claims of the Keras projects",
}


def main(command: str | None = None) -> NoReturn:
    """Runs a command with the arguments of the process, and ends the process.

    Args:
      command: a key of `COMMANDS`; None takes it from the first argument.
    """
    # Until training starts, Ctrl-C ends the process: an exception during an import or the
    # start of JAX would print a traceback. `fit` handles signals while it trains. A
    # shell starts background jobs with SIGINT ignored, which stays.
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    if os.getpid() == 1:  # in a container, where the kernel ignores signals without a handler
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _frame: os._exit(128 + number))
    arguments = sys.argv[1:]
    if command is None:
        command, *arguments = arguments or ["--help"]
        if command == "--version":
            print(version("fmnist_jax"))
            sys.exit(0)
        if command not in COMMANDS:
            sys.exit(_usage(command))
        sys.argv[0] = f"fmnist-jax {command}"  # for the usage line of the command
    # The figures have their own settings, and the user's may be unreadable.
    os.environ |= {"MPLBACKEND": "agg", "MATPLOTLIBRC": os.devnull}
    try:
        # Here, because JAX takes seconds to import.
        module = importlib.import_module(f"fmnist_jax.commands.{command}")
    except ValueError as error:  # of a variable of JAX
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(module.main(arguments))


def _usage(argument: str) -> int:
    """Prints the commands; returns the exit status."""
    lines = [f"  {name:8} {text}" for name, text in COMMANDS.items()]
    if argument in ("-h", "--help"):
        print("usage: fmnist-jax COMMAND [flags]; COMMAND --help shows its flags", *lines, sep="\n")
        return 0
    print(
        f"error: unknown command {argument!r}; choose one of {', '.join(COMMANDS)}", file=sys.stderr
    )
    return 2
