"""Trains three seeds on a Ray of this machine while a worker is killed: python ray_child.py FOLDER

Prints a line for each kill, and at the end the SHA-256 of the parameters of each seed.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import fmnist_jax as fm
from fmnist_jax.runs import files
from fmnist_jax.studies.executors import RayExecutor

NUM_SEEDS = 3
RECIPE = fm.Recipe(arch="valid_2x2", epochs=12, batch_size=8)


def main(folder: Path) -> None:
    dataset = fm.load_fashion_mnist(sample=True)
    run = fm.Run(recipe=RECIPE, workdir=folder, train_examples=64, exclude=range(1000, 6000))
    threading.Thread(target=kill_one, args=(folder,), daemon=True).start()
    result = fm.fit_seeds(
        run, dataset, NUM_SEEDS, executor=RayExecutor("local", num_cpus=1), hooks=[Printer()]
    )
    print("hashes", *result.report["params_sha256"])


def kill_one(folder: Path) -> None:
    """Kills the first worker that has saved a checkpoint."""
    while not (saved := list(folder.glob(f"seed-*/{files.CHECKPOINTS}/[0-9]*"))):
        time.sleep(0.01)
    worker = process_with(saved[0].parents[1] / ".lock")
    os.kill(worker, signal.SIGKILL)
    print("killed", worker, flush=True)


def process_with(path: Path) -> int:
    """The process that has a file open."""
    for descriptor in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):  # it has ended, or closed the file
            if descriptor.readlink() == path:
                return int(descriptor.parts[2])
    raise AssertionError(f"no process has {path} open")


class Printer(fm.Hook):
    def message(self, text: str) -> None:
        print(text, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
