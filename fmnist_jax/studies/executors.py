"""Executors: functions that train independent runs, sequentially or on a Ray cluster.

`executor(runs, dataset, hooks)` returns when every run is finished. The results are in the runs'
folders, with the same bits for every executor.
"""

import dataclasses
import os
import socket
import urllib.parse
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax

from fmnist_jax.config import Run, short_name
from fmnist_jax.data.dataset import Dataset
from fmnist_jax.errors import ConfigError, Interrupted, import_optional
from fmnist_jax.runs import files
from fmnist_jax.runs.fit import fit
from fmnist_jax.train.hooks import EpochLog, Hook, say
from fmnist_jax.xla.cache import enable_compilation_cache

Executor = Callable[[Sequence[Run], Dataset, Sequence[Hook]], None]

# A resumed run repeats at most one checkpoint interval, so a retry is cheap.
_MAX_RETRIES = 10

_TIMEOUT_SECONDS = 10.0

# Seconds between two looks at the messages of the tasks.
_POLL_SECONDS = 0.5


def fit_in_turn(runs: Sequence[Run], dataset: Dataset, hooks: Sequence[Hook]) -> None:
    """Trains the runs in this process, one after the other; equal shapes share a program."""
    alike = len({run.recipe for run in runs}) == 1
    for index, run in enumerate(runs):
        say(hooks, f"{_name(run)}, {index + 1} of {len(runs)}:")
        if alike:
            for hook in hooks:
                hook.series(index=index, num_runs=len(runs))
        fit(run, dataset, hooks=hooks)


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
        ray = self._ray = import_optional("ray", "ray")
        self._options = {
            "num_cpus": num_cpus,
            "num_gpus": num_gpus,
            "max_retries": _MAX_RETRIES,
            "retry_exceptions": [Interrupted],  # by a signal to the worker
        }
        if not ray.is_initialized():
            _check_reachable(address or "local")
            try:
                with warnings.catch_warnings():
                    # JAX warns of forks; Ray replaces the program of its forks at once.
                    warnings.filterwarnings("ignore", r"os\.fork\(\) was called", RuntimeWarning)
                    ray.init(address or "local", log_to_driver=False, include_dashboard=False)
            except (ConnectionError, ValueError) as error:
                raise ConfigError(f"the Ray cluster {address!r} cannot be used: {error}") from error

    def __call__(self, runs: Sequence[Run], dataset: Dataset, hooks: Sequence[Hook]) -> None:
        """Trains the runs; raises the error of the first that fails."""
        ray = self._ray
        # The workers have other current folders.
        runs = [dataclasses.replace(run, workdir=run.workdir.absolute()) for run in runs]
        mailbox = ray.remote(_Mailbox).options(num_cpus=0).remote()
        shared = ray.put(dataset)
        uses_cache = bool(jax.config.jax_compilation_cache_dir)  # type: ignore[attr-defined]
        remote = ray.remote(_fit_remotely).options(**self._options)
        tasks = [remote.remote(run, shared, mailbox, uses_cache) for run in runs]
        say(hooks, f"Training {len(runs)} runs on Ray ...")
        while tasks:
            done, tasks = ray.wait(tasks, timeout=_POLL_SECONDS)
            for message in ray.get(mailbox.take.remote()):
                say(hooks, message)
            for task in done:
                try:
                    ray.get(task)
                except ray.exceptions.RayTaskError as error:
                    raise error.cause from error
                except ray.exceptions.RayError as error:
                    raise ConfigError(f"a run failed on Ray: {error}") from error
        for message in ray.get(mailbox.take.remote()):
            say(hooks, message)
        for run in runs:
            if not (run.workdir / files.REPORT).exists():
                raise ConfigError(
                    f"{run.workdir} has no {files.REPORT} here, although a worker finished the "
                    "run; all nodes need the same file system"
                )


def _check_reachable(address: str) -> None:
    # Ray tries for minutes, in which it handles no signal.
    target = os.environ.get("RAY_ADDRESS", "") if address == "auto" else address
    scheme, _, place = target.rpartition("://")
    parts = urllib.parse.urlsplit(f"//{place}")
    try:
        port = parts.port or (10001 if scheme == "ray" else None)  # Ray's default
        if port is not None:
            socket.create_connection((parts.hostname or "", port), _TIMEOUT_SECONDS).close()
    except (OSError, ValueError) as error:
        raise ConfigError(f"the Ray cluster {address!r} cannot be reached: {error}") from error


def _fit_remotely(run: Run, dataset: Dataset, mailbox: Any, uses_cache: bool) -> None:
    if uses_cache:
        enable_compilation_cache()
    fit(run, dataset, hooks=[_MailboxHook(mailbox, run)])


class _Mailbox:
    """A Ray actor that collects messages."""

    def __init__(self) -> None:
        self._messages: list[str] = []

    def put(self, message: str) -> None:
        self._messages.append(message)

    def take(self) -> list[str]:
        messages, self._messages = self._messages, []
        return messages


class _MailboxHook(Hook):
    """Sends a line for each message and each epoch of a run."""

    def __init__(self, mailbox: Any, run: Run) -> None:
        self._mailbox, self._run = mailbox, run

    def message(self, text: str) -> None:
        self._mailbox.put.remote(f"{_name(self._run)}: {text}")

    def epoch(self, log: EpochLog) -> None:
        accuracy = "" if log.val is None else f", validation accuracy {log.val['accuracy']:.2%}"
        self.message(
            f"epoch {log.epoch} of {self._run.recipe.epochs}, loss {log.train['loss']:.4f}"
            f"{accuracy}, {log.train['images_per_second']:,.0f} images/s"
        )


def _name(run: Run) -> str:
    return f"{short_name(run.recipe.arch)}, seed {run.seed}"
