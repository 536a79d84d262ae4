"""Runs the command line with a small network and kills it: python crash_child.py INSTANT FLAGS...

INSTANT is

- `file:N`: the N-th time that the folder of the run is about to be changed or read,
- `rename:N`: the N-th time that a finished checkpoint is about to be renamed,
- `removal:N`: the N-th time that a part of an old checkpoint is about to be removed,
- `FUNCTION:N`: after the N-th call of that function, a key of `FUNCTIONS`,
- `hang-FUNCTION:N`: that call prints "hanging" and then sleeps; nothing is killed,
- `never`: nothing is killed; the number of file events is written to stderr.
"""

import importlib
import os
import runpy
import signal
import sys
import time
import types
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from fmnist_jax.nn import models
from fmnist_jax.runs import files
from tests.small import Small

RUN = Path(__file__).parents[2] / "experiments" / "run.py"
EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.listdir", "os.scandir")


def main() -> None:
    instant, *flags = sys.argv[1:]
    models.ARCHS = {**models.ARCHS, "small_dropout": Small}
    # Plots would take 3 of 6 s, and are made from the files of a finished run alone.
    report = types.ModuleType("fmnist_jax.report.run")
    report.write_report = write_page  # type: ignore[attr-defined]
    sys.modules[report.__name__] = report
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


def write_page(workdir: Path) -> Path:
    files.write_bytes(workdir / "report.html", b"a page without plots")
    return workdir / "report.html"


def path_of(event: str, arguments: tuple) -> str:
    """The path of an event; `shutil.rmtree` names files relative to an open folder."""
    path = arguments[0]
    folder = arguments[1] if event in ("os.remove", "os.rmdir") else -1
    if isinstance(path, int):
        folder, path = path, "."
    if folder >= 0:
        return str(Path(f"/proc/self/fd/{folder}").readlink() / path)
    return os.fsdecode(path) if isinstance(path, str | bytes | os.PathLike) else ""


FUNCTIONS = {
    "train_steps": "fmnist_jax.train.loop",
    "evaluate": "fmnist_jax.runs.fit",
    "predict": "fmnist_jax.runs.results",
}


def act_in(name: str, count: int) -> None:
    hangs, name = name.startswith("hang-"), name.removeprefix("hang-")
    module = importlib.import_module(FUNCTIONS[name])
    function, calls = getattr(module, name), 0

    def acting(*args, **kwargs):
        nonlocal calls
        calls += 1
        if hangs and calls == count:
            print("hanging", flush=True)
            time.sleep(5)
        result = function(*args, **kwargs)
        if calls == count and not hangs:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(module, name, acting)


if __name__ == "__main__":
    main()
