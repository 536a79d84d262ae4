"""Executors: functions that train independent runs, one after the other or on a Ray cluster.

`executor(runs, dataset, progress)` returns when every run is finished. The results are in the runs'
folders, with the same bits for every executor.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from fmnist_jax.config import Run
from fmnist_jax.data.dataset import Dataset
from fmnist_jax.errors import ConfigError
from fmnist_jax.runs.fit import fit
from fmnist_jax.runs.writers import NullProgress
from fmnist_jax.xla.cache import enable_compilation_cache

Executor = Callable[[Sequence[Run], Dataset, NullProgress], None]

# A resumed run repeats at most one checkpoint interval, so a retry is cheap.
_MAX_RETRIES = 10

# Seconds between two looks at the messages of the tasks.
_POLL_SECONDS = 0.5


def fit_in_turn(runs: Sequence[Run], dataset: Dataset, progress: NullProgress) -> None:
    """Trains the runs in this process, one after the other; equal shapes share a program."""
    alike = len({run.recipe for run in runs}) == 1
    for index, run in enumerate(runs):
        progress.say(f"{_name(run)}, {index + 1} of {len(runs)}:")
        part = _PartProgress(progress, index, len(runs)) if alike else progress
        fit(run, dataset, progress=part)


class RayExecutor:
    """Trains each run in a Ray task, which is retried when its worker or node dies.

    A retried run resumes from its checkpoints, so all nodes need the same file system, and this
    package. Needs the package `ray` (`pip install 'fmnist_jax[ray]'`).

    Args:
      address: of a Ray cluster, such as "auto" or "ray://head:10001"; None starts one on this
        machine.
      num_cpus: cores that Ray reserves for a run. JAX uses all cores of a node for each run, unless
        the variable NPROC says otherwise; their number changes the rounding.
      num_gpus: GPUs of a run.

    Raises:
      ConfigError: if Ray is not installed, or the cluster cannot be reached.
    """

    def __init__(
        self, address: str | None = None, *, num_cpus: float = 1, num_gpus: float = 0
    ) -> None:
        try:
            import ray
        except ImportError as error:
            raise ConfigError("Ray is not installed; pip install 'fmnist_jax[ray]'") from error
        self._ray: Any = ray
        self._options = {"num_cpus": num_cpus, "num_gpus": num_gpus, "max_retries": _MAX_RETRIES}
        if not ray.is_initialized():
            try:
                ray.init(address, log_to_driver=False, include_dashboard=False)
            except (ConnectionError, ValueError) as error:
                raise ConfigError(f"the Ray cluster {address!r} cannot be used: {error}") from error

    def __call__(self, runs: Sequence[Run], dataset: Dataset, progress: NullProgress) -> None:
        """Trains the runs; raises the error of the first that fails."""
        ray = self._ray
        mailbox = ray.remote(_Mailbox).options(num_cpus=0).remote()
        shared = ray.put(dataset)
        uses_cache = bool(jax.config.jax_compilation_cache_dir)  # type: ignore[attr-defined]
        remote = ray.remote(_fit_remotely).options(**self._options)
        tasks = [remote.remote(run, shared, mailbox, uses_cache) for run in runs]
        progress.say(f"Training {len(runs)} runs on Ray ...")
        while tasks:
            done, tasks = ray.wait(tasks, timeout=_POLL_SECONDS)
            for message in ray.get(mailbox.take.remote()):
                progress.say(message)
            for task in done:
                try:
                    ray.get(task)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from error
                except ray.exceptions.RayError as error:
                    raise ConfigError(f"a run failed on Ray: {error}") from error
        for message in ray.get(mailbox.take.remote()):
            progress.say(message)


def _fit_remotely(run: Run, dataset: Dataset, mailbox: Any, uses_cache: bool) -> None:
    if uses_cache:
        enable_compilation_cache()
    fit(run, dataset, progress=_MailboxProgress(mailbox, run))


class _Mailbox:
    """A Ray actor that collects messages."""

    def __init__(self) -> None:
        self._messages: list[str] = []

    def put(self, message: str) -> None:
        self._messages.append(message)

    def take(self) -> list[str]:
        messages, self._messages = self._messages, []
        return messages


class _MailboxProgress(NullProgress):
    """Sends a line for each message and each epoch of a run."""

    def __init__(self, mailbox: Any, run: Run) -> None:
        self._mailbox, self._run = mailbox, run

    def say(self, text: str) -> None:
        self._mailbox.put.remote(f"{_name(self._run)}: {text}")

    def epoch(self, *, epoch: int, train: dict[str, Any], val: dict[str, Any] | None) -> None:
        accuracy = "" if val is None else f", validation accuracy {val['accuracy']:.2%}"
        self.say(
            f"epoch {epoch} of {self._run.recipe.epochs}, loss {train['loss']:.4f}{accuracy}, "
            f"{train['images_per_second']:,.0f} images/s"
        )


class _PartProgress(NullProgress):
    """Shows one of several runs as a part of all their steps."""

    def __init__(self, progress: NullProgress, index: int, num_runs: int) -> None:
        self._progress, self._index, self._num_runs = progress, index, num_runs
        self._before = 0

    def say(self, text: str) -> None:
        self._progress.say(text)

    def start(self, *, step: int, total_steps: int) -> None:
        self._before = self._index * total_steps
        self._progress.start(step=self._before + step, total_steps=self._num_runs * total_steps)

    def update(self, *, step: int, epoch: int, images_per_second: float, loss: float) -> None:
        self._progress.update(
            step=self._before + step, epoch=epoch, images_per_second=images_per_second, loss=loss
        )

    def evaluate(self, *, split: str, num_done: int, num_images: int) -> None:
        self._progress.evaluate(split=split, num_done=num_done, num_images=num_images)

    def epoch(self, *, epoch: int, train: dict[str, Any], val: dict[str, Any] | None) -> None:
        self._progress.epoch(epoch=epoch, train=train, val=val)

    def stop(self) -> None:
        self._progress.stop()


def _name(run: Run) -> str:
    return f"{run.recipe.arch}, seed {run.seed}"
