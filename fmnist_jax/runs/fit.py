"""`fit`: the host side of a run. Epochs, progress, checkpoints, interrupts and files."""

import contextlib
import math
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from fmnist_jax.config import Interval, Run, differences
from fmnist_jax.data.sources import Dataset
from fmnist_jax.errors import (
    CheckpointError,
    CheckpointWarning,
    ConfigError,
    DivergedError,
    EnvironmentWarning,
    Interrupted,
)
from fmnist_jax.runs import environment, files
from fmnist_jax.runs.checkpoint import Checkpoints
from fmnist_jax.runs.lock import locked
from fmnist_jax.runs.plan import Plan, create_plan
from fmnist_jax.runs.program import (
    Program,
    forget_program,
    keep_program,
    load_program,
    program_sha256,
)
from fmnist_jax.runs.progress import ConsoleProgress, Silence
from fmnist_jax.runs.results import write_results
from fmnist_jax.runs.signals import Signals, waiting_signals
from fmnist_jax.train import metrics as metrics_lib
from fmnist_jax.train.loop import TrainState, epoch_order, train_steps
from fmnist_jax.train.metrics import Metrics
from fmnist_jax.train.predict import evaluate

# Training returns to Python about so often, to show progress and to see an interrupt. The length
# of a call changes no bit of the result.
_CALL_SECONDS = 0.5


class _WrongProgramError(Exception):
    """The kept training loop is another than this run's."""


class Result(NamedTuple):
    """What a run comes to.

    Attributes:
      state: the last state.
      model: the network, to use with `state.params`.
      report: the content of report.json.
      history: the lines of metrics.jsonl.
    """

    state: TrainState
    model: Any
    report: dict[str, Any]
    history: list[dict[str, Any]]


def fit(run: Run, dataset: Dataset, *, progress: Silence | None = None) -> Result:
    """Trains, evaluates and writes the files of a run; goes on where an earlier call stopped.

    After each epoch it evaluates on the validation split and saves a checkpoint. The test images
    are looked at once, at the end. SIGINT and SIGTERM save and stop; a second one stops at once.

    A run that goes on gives the bits of one that was never stopped, wherever that was. A damaged
    checkpoint is passed over for the one before it. Where one cannot be written, the disk being
    full for instance, training goes on and the next interval tries again; both are reported by a
    `CheckpointWarning`.

    Args:
      run: the settings. The same settings and folder go on, or return a finished run's result.
      dataset: the data.
      progress: who is told; None prints, `Silence()` does not.

    Returns:
      The last state and the report.

    Raises:
      ConfigError: if settings and data do not fit, or the folder holds another run, is used by
        one that is under way, or cannot be written.
      DivergedError: if the loss is not finite.
      Interrupted: if a signal came.
      CheckpointError: if the last state cannot be written, or no checkpoint can be read.
      DamagedFileError: if another file of the run cannot be read.

    Example:
      >>> import dataclasses, tempfile, fmnist_jax as fm
      >>> recipe = dataclasses.replace(fm.RECIPES["small_dropout"], epochs=1)
      >>> run = Run(recipe=recipe, workdir=Path(tempfile.mkdtemp()), train_examples=500)
      >>> result = fit(run, fm.load_fashion_mnist(sample=True), progress=Silence())
      >>> result.report["steps"]
      4
    """
    return fit_plan(create_plan(run, dataset), progress=progress)


def fit_plan(plan: Plan, *, progress: Silence | None = None) -> Result:
    """`fit`, for a plan that is made already."""
    progress = progress or ConsoleProgress()
    settings = plan.settings
    workdir = plan.run.workdir
    with contextlib.ExitStack() as stack:
        signals = stack.enter_context(waiting_signals())
        signals.nothing_to_lose = True
        report = _read_report(workdir, settings)
        if report is None:
            try:
                files.make_folder(workdir)
                stack.enter_context(locked(workdir))
                _claim(workdir, settings)
            except OSError as error:
                raise ConfigError(f"workdir {workdir} cannot be used: {error}") from error
        loop = _Loop(plan, settings, progress)
        if report is None:
            loop.train(signals)
            signals.nothing_to_lose = True
            report = loop.finish()
            if signals.received:
                raise Interrupted("Stopped; the run is complete.", signals.received[0])
        else:
            loop.restore_complete(report)
            progress.say(f"This run is complete; its results are in {workdir}.")
    return Result(loop.state, plan.model, report, loop.history)


class _Loop:
    """A run under way: its state on the device and its log on the disk."""

    def __init__(self, plan: Plan, settings: dict[str, Any], progress: Silence) -> None:
        self.plan = plan
        self.progress = progress
        self.every = Interval.parse("checkpoint_every", plan.run.checkpoint_every)
        self.checkpoints = Checkpoints(
            plan.run.workdir / files.CHECKPOINTS, settings, keep_every=plan.keep_every
        )
        self.metrics_path = plan.run.workdir / files.METRICS
        self.history: list[dict[str, Any]] = []
        self.compile_seconds = 0.0
        self.call_steps = 1
        self.program: Program | None = None
        self.program_sha256: str | None = None  # once the program is known to be the plan's
        self.has_updated = False
        self.saved_at = time.monotonic()  # the time of day may jump
        self.saved_step = 0
        self.val_accuracy: float | None = None  # of the state as it is
        self.before_last: dict[str, Any] = {}  # what the last update of an epoch begins with

    def restore(self) -> None:
        """The newest state that was saved, or the first one."""
        restored = self.checkpoints.restore(self.plan.checkpoint_shapes)
        if restored is None:
            self.state, self.metrics = self.plan.create_state(), metrics_lib.zeros()
            self.epoch_seconds = 0.0
            return
        tree, meta = restored
        self.state, self.metrics = tree["state"], tree["metrics"]
        self.epoch_seconds, self.history = meta["epoch_seconds"], meta["history"]
        self.saved_step = self.step

    def restore_complete(self, report: dict[str, Any]) -> None:
        """The last state of a complete run.

        Raises:
          CheckpointError: if it is not there any more.
        """
        if not self.checkpoints.steps():
            raise CheckpointError(
                f"the run in {self.plan.run.workdir} is complete, but it has no checkpoint to take "
                "its state from; its results stay as they are, and another folder starts anew"
            )
        tree, meta = self.checkpoints.restore_step(report["steps"], self.plan.checkpoint_shapes)
        self.state, self.history = tree["state"], meta["history"]

    @property
    def step(self) -> int:
        return int(self.state.step)

    def train(self, signals: Signals) -> None:
        """Every epoch that is left."""
        try:
            self._train(signals, load_program(self.plan))
        except _WrongProgramError:
            # It did some updates, but nothing of them has been saved.
            forget_program(self.plan)
            signals.nothing_to_lose = True
            self._train(signals, None)

    def _train(self, signals: Signals, program: Program | None) -> None:
        plan, recipe = self.plan, self.plan.run.recipe
        self.restore()
        images = jnp.asarray(plan.dataset.train_images)
        labels = jnp.asarray(plan.dataset.train_labels)
        val_images = jnp.asarray(plan.dataset.train_images[plan.val_examples])
        val_labels = jnp.asarray(plan.dataset.train_labels[plan.val_examples])
        if self.step:
            self.progress.say(f"Going on after step {self.step:,} of {plan.total_steps:,}.")
        elif self.metrics_path.exists() and self.metrics_path.stat().st_size:
            self.progress.say("Starting anew: no checkpoint had been made.")
        # What was logged after the checkpoint will be logged again.
        files.write_lines(self.metrics_path, self.history)
        self.program, self.program_sha256, self.has_updated = program, None, False
        if self.step == plan.total_steps:
            self._check_program()
        else:
            self._compile(images, labels)
        self.progress.start(step=self.step, total_steps=plan.total_steps)
        signals.nothing_to_lose = False
        try:
            for epoch in range(self.step // plan.steps_per_epoch, recipe.epochs):
                self._train_epoch(epoch, images, labels, signals)
                self._end_epoch(epoch, val_images, val_labels, signals)
                if signals.received:
                    self._stop(signals)
        finally:
            self.progress.stop()

    def finish(self) -> dict[str, Any]:
        """Evaluates the last state and writes the results.

        Raises:
          CheckpointError: if that state could not be saved.
        """
        if self.saved_step < self.step:
            raise CheckpointError(
                f"the last state, of step {self.step:,}, could not be saved; the same command goes "
                f"on after step {self.saved_step:,}"
            )
        files.write_lines(self.metrics_path, self.history)
        num_images = len(self.plan.dataset.test_labels)
        self.progress.say(f"Evaluating on {num_images:,} test images ...")
        return write_results(
            self.plan, self.state.params, self.history, compile_seconds=self.compile_seconds
        )

    def _check_program(self) -> None:
        """Before anything is saved: a kept loop goes by a name, which can be wrong."""
        if self.program_sha256 is None:
            sha256 = program_sha256(self.plan)
            if self.program is not None and self.program.sha256 != sha256:
                raise _WrongProgramError
            self.program_sha256 = sha256
            self._note_conditions()

    def _note_conditions(self) -> None:
        """Adds this process to environment.json, and says what has changed since the last one."""
        path = self.plan.run.workdir / files.ENVIRONMENT
        entry = environment.describe() | {"program": self.program_sha256}
        if self.plan.dataset.sample:
            entry["sample"] = True
        entries = files.read_json(path) or []
        if entries and self.saved_step:
            before, now = (
                {key: conditions.get(key) for key in environment.DECISIVE}
                for conditions in (entries[-1], entry)
            )
            changed = differences(before, now, ("before", "here"))
            if changed:
                warnings.warn(
                    "the conditions are not those of before, so the bits of what follows may be "
                    "others than without the stop:\n" + "\n".join(f"  {line}" for line in changed),
                    EnvironmentWarning,
                    stacklevel=2,
                )
        files.write_json(path, [*entries, entry])

    def _compile(self, images: jax.Array, labels: jax.Array) -> None:
        begun = time.perf_counter()
        is_kept = self.program is not None
        if not is_kept:
            self.progress.say(
                f"Compiling the training loop of {self.plan.run.recipe.arch} for "
                f"{jax.devices()[0].device_kind}, unless it is kept from before ..."
            )
            self.program = keep_program(self.plan)
        order = jnp.asarray(self.plan.train_examples)
        try:
            self._run_steps(images, labels, order, 0)  # this makes the program, or tries it
        except (jax.errors.JaxRuntimeError, TypeError, ValueError) as error:
            if is_kept:
                raise _WrongProgramError from error
            raise
        self.compile_seconds = time.perf_counter() - begun

    def _run_steps(
        self, images: jax.Array, labels: jax.Array, order: jax.Array, count: int
    ) -> Metrics:
        arguments = (
            self.state,
            images,
            labels,
            order,
            self.plan.streams,
            jnp.int32(count),  # as in the program's shapes, so that it is traced once
            self.metrics,
        )
        if self.program is None:
            self.state, self.metrics = train_steps(*arguments, **self.plan.step_options)
        else:
            self.state, self.metrics = self.program.run(*arguments)
        # While XLA works, and not beside the first update, which need not wait for it.
        if self.has_updated:
            self._check_program()
        self.has_updated = count > 0
        return jax.device_get(self.metrics)

    def _train_epoch(
        self, epoch: int, images: jax.Array, labels: jax.Array, signals: Signals
    ) -> None:
        plan = self.plan
        first_step = epoch * plan.steps_per_epoch
        done = self.step - first_step
        order = epoch_order(plan.streams.shuffle, epoch, jnp.asarray(plan.train_examples))
        while done < plan.steps_per_epoch:
            left = plan.steps_per_epoch - done
            # The last update is a call of its own, so that what it begins with can be saved until
            # the epoch is evaluated.
            count = min(self.call_steps, max(left - 1, 1))
            if self.every.unit == "st":
                count = min(count, self.every.number - (first_step + done) % self.every.number)
            if left == 1:
                # Copies, because the update reuses the arrays.
                self.before_last = jax.tree.map(np.array, self._tree())
            begun = time.perf_counter()
            metrics = self._run_steps(images, labels, order, count)
            seconds = time.perf_counter() - begun
            self.epoch_seconds += seconds
            self.val_accuracy = None
            done += count
            if metrics.finite_steps < done:
                self._check_program()
                raise DivergedError(
                    f"the loss is not finite in epoch {epoch + 1}, step "
                    f"{first_step + int(metrics.finite_steps) + 1:,}; "
                    "a lower learning rate often helps"
                )
            self.progress.update(
                step=first_step + done,
                epoch=epoch + 1,
                images_per_second=count * plan.run.recipe.batch_size / seconds,
                loss=float(metrics.loss / metrics.num_examples),
            )
            # The end of an epoch is evaluated and logged before it is saved.
            if done < plan.steps_per_epoch:
                if signals.received:
                    self._stop(signals)
                if self._is_due():
                    self._save()
            if count == self.call_steps:
                self.call_steps = _next_call_steps(count, seconds)

    def _is_due(self) -> bool:
        """Whether a checkpoint is wanted inside an epoch."""
        if self.every.unit == "s":
            return time.monotonic() - self.saved_at >= self.every.number
        return self.every.unit == "st" and self.step % self.every.number == 0

    def _end_epoch(
        self, epoch: int, val_images: jax.Array, val_labels: jax.Array, signals: Signals
    ) -> None:
        self._check_program()
        common: dict[str, Any] = {"step": self.step, "epoch": epoch + 1}
        if self.plan.dataset.sample:
            common["sample"] = True
        train = common | {"split": "train"} | self.metrics.means()
        train["images_per_second"] = round(len(self.plan.train_examples) / self.epoch_seconds, 1)
        train["seconds"] = round(self.epoch_seconds, 4)
        lines, val = [train], None
        if len(val_labels):
            with signals.saved_by(self._save_before_last):
                result = evaluate(self.state.params, val_images, val_labels, model=self.plan.model)
                val = common | {"split": "val"} | result.means()
            lines.append(val)
            if not math.isfinite(val["loss"]):
                raise DivergedError(
                    f"the validation loss is not finite after epoch {epoch + 1}, step "
                    f"{self.step:,}; a lower learning rate often helps"
                )
            self.val_accuracy = val["accuracy"]
        self.history += lines
        self.metrics, self.epoch_seconds = metrics_lib.zeros(), 0.0
        last = self.step == self.plan.total_steps
        if last or self.every.unit != "ep" or (epoch + 1) % self.every.number == 0:
            self._save()
        # For readers only: the checkpoint has the lines as well.
        with contextlib.suppress(OSError):
            files.write_lines(self.metrics_path, self.history)
        self.progress.epoch(epoch=epoch + 1, train=train, val=val)

    def _stop(self, signals: Signals) -> NoReturn:
        total = self.plan.total_steps
        if self.saved_step < self.step:
            self._save()
        if self.saved_step < self.step:
            raise CheckpointError(
                f"stopped after step {self.step:,} of {total:,}, which could not be saved; the "
                f"same command goes on after step {self.saved_step:,}"
            )
        raise Interrupted(self._stopped(self.step), signals.received[0])

    def _stopped(self, step: int) -> str:
        return (
            f"Stopped after step {step:,} of {self.plan.total_steps:,}, saved; "
            "the same command goes on from there."
        )

    def _save_before_last(self) -> str:
        """Saves the state before the last update; returns what to say."""
        step = int(self.before_last["state"].step)
        if self.saved_step < step:
            self.checkpoints.save(step, self.before_last, self._meta())
        return self._stopped(step)

    def _tree(self) -> dict[str, Any]:
        return {"state": self.state, "metrics": self.metrics}

    def _meta(self) -> dict[str, Any]:
        return {"epoch_seconds": self.epoch_seconds, "history": self.history}

    def _save(self) -> None:
        self._check_program()
        try:
            self.checkpoints.save(self.step, self._tree(), self._meta(), self.val_accuracy)
        except CheckpointError as error:
            warnings.warn(
                f"{error}; training goes on, and the next checkpoint is tried as usual",
                CheckpointWarning,
                stacklevel=2,
            )
        else:
            self.saved_step = self.step
        self.saved_at = time.monotonic()


def _next_call_steps(count: int, seconds: float) -> int:
    """Updates of the next call into XLA, after one of `count` took so long."""
    return max(1, min(round(count * _CALL_SECONDS / seconds), 16 * count))


def _read_report(workdir: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """The report of this very run, if it is complete.

    Raises:
      ConfigError: if the folder holds another run.
    """
    try:
        found = files.read_json(workdir / files.CONFIG)
        report = files.read_json(workdir / files.REPORT)
    except OSError as error:
        raise ConfigError(f"workdir {workdir} cannot be used: {error}") from error
    if found is None:
        return None
    changed = differences(found, settings)
    if changed:
        raise ConfigError(
            f"workdir {workdir} holds another run; name another folder. It differs in\n"
            + "\n".join(f"  {line}" for line in changed)
        )
    return report


def _claim(workdir: Path, settings: dict[str, Any]) -> None:
    """Makes the folder this run's; it is locked."""
    # Another process may have been faster since the folder was looked at.
    if _read_report(workdir, settings) is not None:
        raise ConfigError(f"the run in {workdir} was just completed; the same command shows it")
    files.write_json(workdir / files.CONFIG, settings)
