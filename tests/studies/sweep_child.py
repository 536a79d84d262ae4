"""Continues a sweep and kills itself in a trial: python sweep_child.py FOLDER TRIALS KILL_AT

KILL_AT is the number of the trial in which it kills itself, or 0.
"""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import fmnist_jax as fm
from fmnist_jax.studies import sweep as sweep_lib
from tests.small import SMALL

RECIPE = fm.Recipe(arch=SMALL, epochs=2, batch_size=50)
SPACE = dict(map(sweep_lib.parse_domain, ["learning_rate=log:1e-4:1e-2", "dropout=0:0.5"]))


class Killer(fm.Hook):
    def __init__(self, kill_at: int) -> None:
        self.kill_at = kill_at

    def message(self, text: str) -> None:
        print(text, flush=True)
        if self.kill_at and text.startswith(f"{self.kill_at - 1} of "):
            evaluate = sweep_lib.evaluate

            def kill(*args: object, **kwargs: object) -> None:
                os.kill(os.getpid(), signal.SIGKILL)

            assert evaluate is not None
            sweep_lib.evaluate = kill  # type: ignore[assignment]


def create_run(folder: Path) -> fm.Run:
    return fm.Run(recipe=RECIPE, workdir=folder, train_examples=200)


def main(folder: Path, num_trials: int, kill_at: int) -> None:
    dataset = fm.load_fashion_mnist(sample=True)
    run = create_run(folder)
    fm.sweep(run, dataset, SPACE, num_trials, num_seeds=2, hooks=[Killer(kill_at)])


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
