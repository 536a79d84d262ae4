"""Runs the command line and kills it at an instant: python crash_child.py INSTANT FLAGS...

INSTANT is

- `file:N`: the N-th time that the folder of the run is about to be changed or read,
- `FUNCTION:N`: the N-th call of that function of fmnist_jax.fit, such as `evaluate`,
- `never`: at the end the number of such file events is written to stderr.
"""

import importlib
import os
import runpy
import signal
import sys
from pathlib import Path

RUN = Path(__file__).parent.parent / "experiments" / "run.py"
EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.listdir", "os.scandir")


def main() -> None:
    instant, *flags = sys.argv[1:]
    name, _, count = instant.partition(":")
    workdir = flags[flags.index("--workdir") + 1]
    sys.argv = [str(RUN), *flags]
    sys.path.insert(0, str(RUN.parent))
    seen = 0

    def audit(event: str, arguments: tuple) -> None:
        nonlocal seen
        if event in EVENTS and str(arguments[0]).startswith(workdir):
            seen += 1
            if name == "file" and seen == int(count):
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(audit)
    if name not in ("file", "never"):
        kill_in(name, int(count))
    try:
        runpy.run_path(str(RUN), run_name="__main__")
    finally:
        if name == "never":
            print(f"events: {seen}", file=sys.stderr)


def kill_in(name: str, count: int) -> None:
    module = importlib.import_module(f"fmnist_jax.{'results' if name == 'predict' else 'fit'}")
    function, calls = getattr(module, name), 0

    def wrapper(*args, **kwargs):
        nonlocal calls
        result = function(*args, **kwargs)
        calls += 1
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(module, name, wrapper)


if __name__ == "__main__":
    main()
