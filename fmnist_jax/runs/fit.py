"""`fit`: trains one run. Epochs, progress, checkpoints, signals and files."""

import contextlib
import dataclasses
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fmnist_jax.config import Run, differences_message
from fmnist_jax.data.dataset import Dataset
from fmnist_jax.errors import CheckpointError, ConfigError, DivergedError
from fmnist_jax.runs import environment, files
from fmnist_jax.runs.checkpoint import Checkpoints
from fmnist_jax.runs.html import describe_run
from fmnist_jax.runs.plan import Plan, create_plan
from fmnist_jax.runs.results import write_results
from fmnist_jax.runs.saver import LoopState, Saver, restore, restore_finished
from fmnist_jax.runs.signals import deferred_signals
from fmnist_jax.runs.writers import ConsoleProgress, EpochLog, NullProgress, Writer
from fmnist_jax.train import metrics as metrics_lib
from fmnist_jax.train.loop import train_epoch, train_steps
from fmnist_jax.train.predict import evaluate, predict
from fmnist_jax.train.step import TrainState
from fmnist_jax.xla import processes
from fmnist_jax.xla.mesh import replicate

# Target duration of one compiled call. Progress is shown and signals are handled between calls.
# The length of a call changes no bit of the result.
_CALL_SECONDS = 0.5


class Result(NamedTuple):
    """A finished run.

    Attributes:
      state: the last state.
      model: the network, to be used with `state.variables`.
      report: the content of report.json.
      history: the lines of metrics.jsonl.
    """

    state: TrainState
    model: Any
    report: dict[str, Any]
    history: list[dict[str, Any]]

    def __repr__(self) -> str:
        accuracy = f"test accuracy {self.report['test_accuracy']:.2%}"
        return (
            f"Result({self.report['recipe']['arch']}, {self.report['steps']:,} steps, {accuracy})"
        )

    def _repr_html_(self) -> str:
        return describe_run(self.report, self.history)


def fit(
    run: Run,
    dataset: Dataset,
    *,
    progress: NullProgress | None = None,
    writers: Sequence[Writer] = (),
) -> Result:
    """Trains and evaluates a run and writes its files; resumes where an earlier call stopped.

    After each epoch it evaluates the validation split and saves a checkpoint. The test images are
    evaluated once, at the end. The first SIGINT or SIGTERM saves the state and stops, after the
    current compiled call or evaluation; a second one stops at once.

    A resumed run is bitwise identical to one that was never stopped. A damaged checkpoint is
    skipped in favour of the one before it. If a checkpoint cannot be written, for instance because
    the disk is full, training continues and the next interval tries again. Both are reported by a
    `CheckpointWarning`.

    Args:
      run: the settings. The same settings and folder resume a run, or return a finished run's
        result.
      dataset: the data.
      progress: receives progress; None prints it.
      writers: receive the log after each epoch, in the first process.

    Returns:
      The last state and the report.

    Raises:
      ConfigError: if settings and data do not fit, or the folder holds another run, is in use by
        another process, or cannot be written.
      DivergedError: if the loss is not finite.
      Interrupted: if a signal arrived.
      CheckpointError: if the last state cannot be written, or no checkpoint can be read.
      DamagedFileError: if another file of the run cannot be read.

    Example:
      >>> import dataclasses, tempfile, fmnist_jax as fm
      >>> recipe = dataclasses.replace(fm.RECIPES["small_dropout"], epochs=1)
      >>> run = Run(recipe=recipe, workdir=Path(tempfile.mkdtemp()), train_examples=500)
      >>> data = fm.load_fashion_mnist(sample=True)
      >>> fit(run, data, progress=NullProgress()).report["steps"]
      4
    """
    return fit_plan(create_plan(run, dataset), progress=progress, writers=writers)


def fit_plan(
    plan: Plan, *, progress: NullProgress | None = None, writers: Sequence[Writer] = ()
) -> Result:
    """Does what `fit` does, for a plan that exists already."""
    progress = progress or ConsoleProgress()
    if processes.is_first():
        return _fit(plan, progress, writers)
    # The others do the same in a folder that nobody reads.
    with tempfile.TemporaryDirectory() as folder:
        run = dataclasses.replace(plan.run, workdir=Path(folder))
        return _fit(dataclasses.replace(plan, run=run), progress, ())


def _fit(plan: Plan, progress: NullProgress, writers: Sequence[Writer]) -> Result:
    workdir, settings = plan.run.workdir, plan.settings
    processes.check_same("settings", settings)
    processes.check_same("environment", environment.decisive())
    checkpoints = Checkpoints(workdir / files.CHECKPOINTS, settings, keep_every=plan.keep_every)
    report = processes.on_first(lambda: _read_report(workdir, settings))
    if report is not None and (not plan.tta or report["tta_accuracy"] is not None):
        loop = restore_finished(plan, checkpoints)
        progress.say(f"This run is finished; its results are in {workdir}.")
        if writers:
            progress.say("Nothing is logged: writers log a run while it trains.")
        return Result(loop.state, plan.model, report, loop.history)
    with contextlib.ExitStack() as stack:
        processes.on_first(lambda: stack.enter_context(_exclusive(workdir, settings)))
        if report is None:
            loop, compile_seconds = _train(plan, checkpoints, progress, writers)
        else:
            progress.say("This run is finished; only test-time augmentation is evaluated.")
            loop, writers = restore_finished(plan, checkpoints), ()
            compile_seconds = report["compile_seconds"]
        report = write_results(
            plan,
            loop.state,
            loop.history,
            compile_seconds=compile_seconds,
            on_progress=progress.evaluate,
        )
        for writer in writers:
            writer.finish(report=report)
    return Result(loop.state, plan.model, report, loop.history)


def _train(
    plan: Plan, checkpoints: Checkpoints, progress: NullProgress, writers: Sequence[Writer]
) -> tuple[LoopState, float]:
    """Trains the remaining epochs; returns the last state and the seconds of compilation."""
    loop = restore(plan, checkpoints.restore)
    metrics_path = plan.run.workdir / files.METRICS
    if loop.step:
        progress.say(f"Resuming after step {loop.step:,} of {plan.total_steps:,}.")
    elif metrics_path.exists() and metrics_path.stat().st_size:
        progress.say("Starting from the first step: the earlier run has no checkpoint.")
    # Lines after the checkpoint are written again.
    files.write_lines(metrics_path, loop.history)
    saver = Saver(plan, checkpoints, loop.step)
    environment.record(
        plan.run.workdir / files.ENVIRONMENT, sample=plan.dataset.sample, is_resumed=loop.step > 0
    )
    for writer in writers:
        writer.start(settings=plan.settings, step=loop.step)
    if loop.step == plan.total_steps:
        return loop, 0.0
    dataset, mesh = plan.dataset, plan.config.mesh
    data: tuple[jax.Array, jax.Array, jax.Array] = replicate(
        (dataset.train_images, dataset.train_labels, plan.train_examples), mesh
    )
    streams, hyperparams = replicate((plan.streams, plan.hyperparams), mesh)
    num_devices = "" if mesh is None else f"{mesh.size} x "
    progress.say(
        f"Compiling the training loop of {plan.run.recipe.arch} for "
        f"{num_devices}{jax.devices()[0].device_kind} ..."
    )
    started = time.perf_counter()
    # No steps: this only compiles the program that all calls share.
    state, metrics = train_steps(
        loop.state, *data, streams, jnp.int32(0), hyperparams, loop.metrics, config=plan.config
    )
    loop = loop._replace(state=jax.block_until_ready(state), metrics=metrics)
    compile_seconds = time.perf_counter() - started
    pace = _Pace()
    progress.start(step=loop.step, total_steps=plan.total_steps)
    try:
        # Until here a signal ends the process at once, because nothing would be lost.
        with deferred_signals() as signals:
            while loop.step < plan.total_steps:
                loop = _train_epoch(plan, data, loop, saver, pace, signals, progress)
                loop = _end_epoch(plan, loop, saver, progress, writers)
                signal_number, *_ = _agree(signals)
                if signal_number:
                    saver.stop(loop, signal_number)
    finally:
        progress.stop()
    if saver.saved_step < loop.step:
        raise CheckpointError(
            f"the last state, of step {loop.step:,}, could not be saved; the same command resumes "
            f"after step {saver.saved_step:,}"
        )
    files.write_lines(metrics_path, loop.history)
    return loop, compile_seconds


def _train_epoch(
    plan: Plan,
    data: tuple[jax.Array, jax.Array, jax.Array],
    loop: LoopState,
    saver: Saver,
    pace: "_Pace",
    signals: list[int],
    progress: NullProgress,
) -> LoopState:
    """Trains to the end of the epoch; saves and stops on the way where it should."""
    epoch = loop.step // plan.steps_per_epoch
    first_step = epoch * plan.steps_per_epoch
    last_step = first_step + plan.steps_per_epoch
    step = loop.step
    calls = train_epoch(
        loop.state,
        *data,
        plan.streams,
        plan.hyperparams,
        loop.metrics,
        config=plan.config,
        next_num_steps=lambda left: min(pace.num_steps, left, saver.steps_until_due(step)),
    )
    started = time.perf_counter()
    for state, metrics in calls:
        host_metrics = jax.device_get(metrics)
        seconds = time.perf_counter() - started
        loop = LoopState(state, metrics, loop.epoch_seconds + seconds, loop.history)
        num_steps, step = loop.step - step, loop.step
        if host_metrics.finite_steps < step - first_step:
            raise DivergedError(
                f"the loss is not finite in epoch {epoch + 1}, step "
                f"{first_step + int(host_metrics.finite_steps) + 1:,}; "
                "a lower learning rate often helps"
            )
        progress.update(
            step=step,
            epoch=epoch + 1,
            images_per_second=num_steps * plan.config.batch_size / seconds,
            loss=float(host_metrics.loss / host_metrics.num_examples),
        )
        pace.update(num_steps, seconds)
        signal_number, is_due, pace.num_steps = _agree(signals, saver.is_due(step), pace.num_steps)
        # The end of an epoch is evaluated and logged before it is saved.
        if step < last_step:
            if signal_number:
                saver.stop(loop, signal_number)
            if is_due:
                saver.save(loop)
        started = time.perf_counter()
    return loop


def _end_epoch(
    plan: Plan,
    loop: LoopState,
    saver: Saver,
    progress: NullProgress,
    writers: Sequence[Writer],
) -> LoopState:
    """Evaluates the validation split, logs and saves."""
    epoch = loop.step // plan.steps_per_epoch
    common: dict[str, Any] = {"step": loop.step, "epoch": epoch}
    if plan.dataset.sample:
        common["sample"] = True
    train = common | {"split": "train"} | loop.metrics.means()
    train["images_per_second"] = round(len(plan.train_examples) / loop.epoch_seconds, 1)
    train["seconds"] = round(loop.epoch_seconds, 4)
    lines, val = [train], None
    if num_val := len(plan.val_examples):
        progress.evaluate(split="val", num_done=0, num_images=num_val)
        metrics = evaluate(
            loop.state.variables,
            plan.dataset.train_images[plan.val_examples],
            plan.dataset.train_labels[plan.val_examples],
            model=plan.model,
            on_call=lambda done: progress.evaluate(split="val", num_done=done, num_images=num_val),
            mesh=plan.config.mesh,
        )
        val = common | {"split": "val"} | metrics.means()
        if not math.isfinite(val["loss"]):
            raise DivergedError(
                f"the validation loss is not finite after epoch {epoch}, step {loop.step:,}; a "
                "lower learning rate often helps"
            )
        lines.append(val)
    # Before the checkpoint, so that a killed run repeats a line and leaves none out.
    for writer in writers:
        writer.epoch(_epoch_log(plan, loop, train, val))
    loop = LoopState(
        loop.state, metrics_lib.zeros(plan.config.log_norms), 0.0, [*loop.history, *lines]
    )
    if saver.is_due_after(epoch):
        saver.save(loop)
    # For readers only: the checkpoint holds the lines as well.
    with contextlib.suppress(OSError):
        files.write_lines(plan.run.workdir / files.METRICS, loop.history)
    progress.epoch(epoch=epoch, train=train, val=val)
    return loop


def _epoch_log(
    plan: Plan, loop: LoopState, train: dict[str, Any], val: dict[str, Any] | None
) -> EpochLog:
    images = plan.dataset.train_images[plan.val_examples]
    variables = loop.state.variables

    def val_logits() -> np.ndarray:
        return np.asarray(predict(variables, images, model=plan.model))

    labels = plan.dataset.train_labels[plan.val_examples]
    return EpochLog(
        train["epoch"], train["step"], train, val, variables, images, labels, val_logits
    )


def _agree(signals: list[int], is_due: bool = False, num_steps: int = 0) -> tuple[int, bool, int]:
    """Makes all processes do the same: a signal to any stops all, the first decides the rest."""
    rows = processes.gather([signals[0] if signals else 0, is_due, num_steps])
    return int(rows[:, 0].max()), bool(rows[0, 1]), int(rows[0, 2])


class _Pace:
    """Number of steps per compiled call, such that a call takes about `_CALL_SECONDS`."""

    def __init__(self) -> None:
        self.num_steps = 1

    def update(self, num_steps: int, seconds: float) -> None:
        if num_steps == self.num_steps:  # a call that was cut short says little
            target = round(num_steps * _CALL_SECONDS / seconds)
            self.num_steps = max(1, min(target, 16 * num_steps))


@contextlib.contextmanager
def _exclusive(workdir: Path, settings: dict[str, Any]) -> Iterator[None]:
    """Creates and locks the folder and writes the settings."""
    with contextlib.ExitStack() as stack:
        try:
            files.make_folder(workdir)
            stack.enter_context(files.locked(workdir))
            _read_report(workdir, settings)  # another process may have written it meanwhile
            files.write_json(workdir / files.CONFIG, settings)
        except OSError as error:
            raise ConfigError(
                f"workdir {workdir} cannot be used: {error.strerror or error}"
            ) from error
        yield


def _read_report(workdir: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Returns the report of this run, if it is finished.

    Raises:
      ConfigError: if the folder holds another run.
    """
    try:
        found = files.read_json(workdir / files.CONFIG)
        report = files.read_json(workdir / files.REPORT)
    except OSError as error:
        raise ConfigError(f"workdir {workdir} cannot be used: {error.strerror or error}") from error
    if found is None:
        return None
    message = differences_message(
        f"workdir {workdir} holds another run; use another folder. The settings differ:",
        found,
        settings,
    )
    if message:
        raise ConfigError(message)
    return report
