"""Runs the command line and kills it at an instant: python crash_child.py INSTANT FLAGS...

INSTANT is

- `file:N`: the N-th time that the folder of the run is about to be changed or read,
- `rename:N`: the N-th time that a checkpoint, written, is about to get its name,
- `removal:N`: the N-th time that a part of an old checkpoint is about to be removed,
- `FUNCTION:N`: after the N-th call of that function of fmnist_jax.runs.fit, such as `evaluate`,
- `hang-FUNCTION:N`: that call says so and never ends; nothing is killed,
- `never`: at the end the number of such file events is written to stderr.
"""

import ctypes
import importlib
import os
import runpy
import signal
import sys
from pathlib import Path

RUN = Path(__file__).parents[2] / "experiments" / "run.py"
EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.listdir", "os.scandir")


def main() -> None:
    instant, *flags = sys.argv[1:]
    name, _, count = instant.partition(":")
    workdir = flags[flags.index("--workdir") + 1]
    sys.argv = [str(RUN), *flags]
    sys.path.insert(0, str(RUN.parent))
    seen = {"file": 0, "rename": 0, "removal": 0}

    def audit(event: str, arguments: tuple) -> None:
        if event not in EVENTS:
            return
        path = path_of(event, arguments)
        if not path.startswith(workdir):
            return
        kinds = ["file"]
        if event == "os.rename" and "/.saving-" in path:
            kinds.append("rename")
        if event in ("os.remove", "os.rmdir") and "/.removing-" in path:
            kinds.append("removal")
        for kind in kinds:
            seen[kind] += 1
            if name == kind and seen[kind] == int(count):
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(audit)
    if name not in (*seen, "never"):
        act_in(name, int(count))
    try:
        runpy.run_path(str(RUN), run_name="__main__")
    finally:
        if name == "never":
            print(f"events: {seen['file']}", file=sys.stderr)


def path_of(event: str, arguments: tuple) -> str:
    """The path that it is about; `shutil.rmtree` names what is in an open folder."""
    path = arguments[0]
    folder = arguments[1] if event in ("os.remove", "os.rmdir") else -1
    if isinstance(path, int):
        folder, path = path, "."
    if folder >= 0:
        return str(Path(f"/proc/self/fd/{folder}").readlink() / path)
    return os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""


def act_in(name: str, count: int) -> None:
    hangs, name = name.startswith("hang-"), name.removeprefix("hang-")
    module = importlib.import_module(f"fmnist_jax.runs.{'results' if name == 'predict' else 'fit'}")
    calls = 0

    def acting(function):
        def wrapper(*args, **kwargs):
            nonlocal calls
            calls += 1
            if hangs and calls == count:
                print("hanging", flush=True)
                hang()
            result = function(*args, **kwargs)
            if calls == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapper

    setattr(module, name, acting(getattr(module, name)))
    if name == "train_steps":  # the same, as it was compiled before
        for maker in ("load_program", "keep_program"):
            setattr(module, maker, with_run(acting, getattr(module, maker)))


def with_run(acting, maker):
    def wrapper(plan):
        program = maker(plan)
        return program and program._replace(run=acting(program.run))

    return wrapper


def hang() -> None:
    """As a long call into XLA: Python takes no signal in it, other threads go on."""
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    for _ in range(2):  # the second waits for the first
        libc.pthread_mutex_lock(mutex)


if __name__ == "__main__":
    main()
