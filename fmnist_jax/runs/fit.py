"""`fit`: trains one run. Epochs, hooks, checkpoints, signals and files."""

import contextlib
import dataclasses
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from fmnist_jax.config import Run, short_name
from fmnist_jax.data.dataset import Dataset
from fmnist_jax.distributed import processes
from fmnist_jax.errors import CheckpointError, ConfigError, DivergedError
from fmnist_jax.parts.objects import Parts, create_part
from fmnist_jax.runs import environment, files
from fmnist_jax.runs.checkpoint import Checkpoints
from fmnist_jax.runs.console import ConsoleProgress
from fmnist_jax.runs.html import render_result
from fmnist_jax.runs.plan import Plan, create_plan
from fmnist_jax.runs.results import write_results
from fmnist_jax.runs.saver import LoopState, Saver, restore, restore_finished
from fmnist_jax.runs.signals import deferred_signals
from fmnist_jax.train import metrics as metrics_lib
from fmnist_jax.train.hooks import (
    EarlyStopping,
    EpochLog,
    Hook,
    Stop,
    evaluation_progress,
    say,
    started,
)
from fmnist_jax.train.loop import TrainInputs, train_epochs, train_steps
from fmnist_jax.train.metrics import Metrics
from fmnist_jax.train.predict import evaluate, predict
from fmnist_jax.train.step import TrainState

# Target duration of one compiled call. Progress is shown and signals are handled between calls.
# The length of a call does not change the result.
_CALL_SECONDS = 0.5

# A call that takes this many times as long as the one before and as the target was suspended, as by
# Ctrl-Z; this is not counted as training time.
_SUSPENDED = 20

# What the hooks ask for at the end of an epoch.
_CONTINUE, _INTERRUPT, _FINISH = range(3)


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
            f"Result({short_name(self.report['arch'])}, {self.report['steps']:,} steps, {accuracy})"
        )

    def _repr_html_(self) -> str:
        return render_result(self.report, self.history)


def fit(
    run: Run, dataset: Dataset, *, hooks: Sequence[Hook] | None = None, **parts: Unpack[Parts]
) -> Result:
    """Trains and evaluates a run and writes its files; resumes where an earlier call stopped.

    After each epoch it evaluates the validation split and saves a checkpoint. The test images are
    evaluated once, at the end. The first signal of `runs.signals.STOPPING`, such as SIGINT, saves
    the state and stops, after the current compiled call or evaluation; a second SIGINT or SIGTERM
    stops at once.

    A resumed run is bitwise identical to one that was never stopped. A damaged checkpoint is
    skipped in favour of the one before it. If a checkpoint cannot be written, for instance because
    the disk is full, training continues and the next interval tries again. Both are reported by a
    `CheckpointWarning`.

    Args:
      run: the settings. The same settings and folder resume a run, or return a finished run's
        result.
      dataset: the data.
      hooks: receive the events of the run; None prints its progress.
      **parts: `model`, `tx`, `loss`, `augment` and `schedule` replace the parts that the recipe
        names, as in `StepConfig`. A class of modules or a function takes the options of the
        recipe.

    Returns:
      The last state and the report.

    Raises:
      ConfigError: if settings and data do not fit, or the folder holds another run, is in use by
        another process, or cannot be written.
      DivergedError: if the loss is not finite.
      Interrupted: if a signal arrived, or a hook asked to stop.
      CheckpointError: if the last state cannot be written, or no checkpoint can be read.
      DamagedFileError: if another file of the run cannot be read.

    Example:
      >>> import dataclasses, tempfile, fmnist_jax as fm
      >>> recipe = dataclasses.replace(fm.RECIPES["small_dropout"], epochs=1)
      >>> run = Run(recipe=recipe, workdir=Path(tempfile.mkdtemp()), train_examples=500)
      >>> data = fm.load_fashion_mnist(sample=True)
      >>> fit(run, data, hooks=()).report["steps"]
      4
    """
    return fit_plan(create_plan(run, dataset, **parts), hooks=hooks)


def fit_plan(plan: Plan, *, hooks: Sequence[Hook] | None = None) -> Result:
    """Runs `fit` for an existing plan.

    Raises:
      ConfigError: also if the model of the plan is not the one that its recipe names.
    """
    model = create_part("arch", plan.run, len(plan.dataset.class_names))
    if model != plan.model:
        raise ConfigError(
            f"the model of the plan is not {short_name(plan.run.recipe.arch)}, which its recipe "
            "names; pass it as model= to create_plan"
        )
    hooks = [ConsoleProgress()] if hooks is None else list(hooks)
    if plan.run.recipe.patience is not None:
        hooks.append(EarlyStopping(plan.run.recipe.patience))
    if processes.is_first():
        return _fit(plan, hooks)
    # The other processes write to a temporary folder, which is discarded.
    with tempfile.TemporaryDirectory() as folder:
        run = dataclasses.replace(plan.run, workdir=Path(folder))
        hooks = [hook for hook in hooks if hook.in_every_process]
        return _fit(dataclasses.replace(plan, run=run), hooks)


def _fit(plan: Plan, hooks: Sequence[Hook]) -> Result:
    workdir, settings = plan.run.workdir, plan.settings
    processes.check_same("settings", settings)
    processes.check_same("environment", environment.decisive())
    checkpoints = Checkpoints(workdir / files.CHECKPOINTS, settings, keep_every=plan.keep_every)
    report = processes.on_first(lambda: _read_report(workdir, settings))
    if report is not None and (not plan.tta or report["tta_accuracy"] is not None):
        loop = restore_finished(plan, checkpoints, report["steps"])
        say(hooks, f"This run is finished; its results are in {workdir}.")
        return Result(loop.state, plan.model, report, loop.history)
    with contextlib.ExitStack() as stack:
        processes.on_first(lambda: stack.enter_context(_exclusive(workdir, settings)))
        if report is None:
            loop, compile_seconds = _train(plan, checkpoints, hooks)
        else:
            say(hooks, "This run is finished; only test-time augmentation is evaluated.")
            loop = restore_finished(plan, checkpoints, report["steps"])
            compile_seconds = report["compile_seconds"]
        is_trained = report is None
        report = write_results(
            plan, loop.state, loop.history, compile_seconds=compile_seconds, hooks=hooks
        )
        for hook in hooks if is_trained else ():
            hook.finish(report=report)
    return Result(loop.state, plan.model, report, loop.history)


def _train(plan: Plan, checkpoints: Checkpoints, hooks: Sequence[Hook]) -> tuple[LoopState, float]:
    """Trains the remaining epochs; returns the last state and the seconds of compilation."""
    loop = restore(plan, checkpoints.restore)
    metrics_path = plan.run.workdir / files.METRICS
    if loop.step:
        say(hooks, f"Resuming after step {loop.step:,} of {plan.total_steps:,}.")
    elif metrics_path.exists() and metrics_path.stat().st_size:
        say(hooks, "Starting from the first step: the earlier run has no checkpoint.")
    # Lines after the checkpoint are written again.
    files.write_lines(metrics_path, loop.history)
    saver = Saver(plan, checkpoints, loop.step)
    environment.record(
        plan.run.workdir / files.ENVIRONMENT, sample=plan.dataset.sample, sources=plan.sources,
        is_resumed=loop.step > 0,
    )  # fmt: skip
    inputs, compile_seconds = plan.config.layout.place(plan.inputs), 0.0
    if loop.step < plan.total_steps and not loop.is_finished:
        loop, compile_seconds = _compile(plan, inputs, loop, hooks)
    with started(hooks, plan.settings, loop.step, plan.total_steps):
        loop = loop if loop.is_finished else _train_epochs(plan, inputs, loop, saver, hooks)
    if saver.saved_step < loop.step:
        raise CheckpointError(
            f"the last state, of step {loop.step:,}, could not be saved; the same command resumes "
            f"after step {saver.saved_step:,}"
        )
    files.write_lines(metrics_path, loop.history)
    return loop, compile_seconds


def _compile(
    plan: Plan, inputs: TrainInputs, loop: LoopState, hooks: Sequence[Hook]
) -> tuple[LoopState, float]:
    """Compiles the program that all calls share; returns the same state and the seconds."""
    device, num_devices = jax.devices()[0].device_kind, plan.config.layout.num_devices
    name = device if num_devices == 1 else f"{num_devices} x {device}"
    arch = short_name(plan.run.recipe.arch)
    say(hooks, f"Compiling the training loop of {arch} for {name} ...")
    start = time.perf_counter()
    state, metrics = train_steps(loop.state, inputs, jnp.int32(0), loop.metrics, config=plan.config)
    loop = loop._replace(state=jax.block_until_ready(state), metrics=metrics)
    return loop, time.perf_counter() - start


def _train_epochs(
    plan: Plan, inputs: TrainInputs, loop: LoopState, saver: Saver, hooks: Sequence[Hook]
) -> LoopState:
    """Trains to the last epoch; evaluates, saves and stops between compiled calls."""
    # Before this a signal ends the process at once: there is nothing to save.
    with deferred_signals() as signals:
        for call in train_calls(
            plan, inputs, loop.state, loop.metrics, hooks=hooks,
            steps_until_due=saver.steps_until_due,
        ):  # fmt: skip
            seconds = loop.epoch_seconds + call.seconds
            loop = LoopState(call.state, call.metrics, seconds, loop.history)
            stop, is_epoch_end = _CONTINUE, loop.step % plan.steps_per_epoch == 0
            if is_epoch_end:
                loop, stop = _end_epoch(plan, loop, hooks)
            signal_number, stop, is_due = _agree(signals, stop, saver.is_due(loop.step))
            loop = loop._replace(is_finished=stop == _FINISH)
            if is_due or loop.is_finished:
                saver.save(loop)
            if is_epoch_end:
                # For readers only: the checkpoint holds the lines as well.
                with contextlib.suppress(OSError):
                    files.write_lines(plan.run.workdir / files.METRICS, loop.history)
            if loop.is_finished:
                say(hooks, f"Training is finished after epoch {loop.step // plan.steps_per_epoch}.")
                break
            if signal_number or (stop and loop.step < plan.total_steps):
                saver.stop(loop, signal_number or None)
    return loop


class Call(NamedTuple):
    """A compiled call of the training loop that has ended.

    Attributes:
      state: the state after it. Donated to the next call.
      metrics: sums over the epoch so far.
      seconds: its duration.
    """

    state: TrainState
    metrics: Metrics
    seconds: float


def train_calls(
    plan: Plan,
    inputs: TrainInputs,
    state: TrainState,
    metrics: Metrics | None = None,
    *,
    hooks: Sequence[Hook] = (),
    steps_until_due: Callable[[int], int] | None = None,
) -> Iterator[Call]:
    """Trains the remaining epochs of a plan.

    Args:
      plan: what to train.
      inputs: its inputs, on the devices.
      state: the current state. Donated.
      metrics: sums over the epoch that the state is in; None starts at zero.
      hooks: receive the progress after each call.
      steps_until_due: maps the step to the most steps of the next call; None sets no limit but
        the end of the epoch.

    Yields:
      Each call, in every process the same number of them.

    Raises:
      DivergedError: if the loss is not finite.
    """
    most = 1  # steps of the next call

    def next_num_steps(step: int, left: int) -> int:
        return min(most, left, left if steps_until_due is None else steps_until_due(step))

    calls = train_epochs(
        state, inputs, plan.run.recipe.epochs, metrics, config=plan.config,
        next_num_steps=next_num_steps,
    )  # fmt: skip
    step, pace, start = int(state.step), math.inf, time.perf_counter()
    for state, metrics in calls:
        sums = jax.device_get(metrics)  # waits for the end of the call
        seconds = time.perf_counter() - start
        num_steps, step = int(state.step) - step, int(state.step)
        if seconds > max(_SUSPENDED * pace * num_steps, _SUSPENDED * _CALL_SECONDS):
            seconds = pace * num_steps
        pace = seconds / num_steps
        _check_finite(plan, step, sums)
        for hook in hooks:
            hook.update(
                step=step,
                epoch=(step - 1) // plan.steps_per_epoch + 1,
                images_per_second=num_steps * plan.config.batch_size / seconds,
                loss=float(sums.loss / sums.num_examples),
            )
        if num_steps == most:  # not after a call that was cut short
            most = int(processes.gather([_adapted(num_steps, seconds)])[0, 0])
        yield Call(state, metrics, seconds)
        start = time.perf_counter()


def _adapted(num_steps: int, seconds: float) -> int:
    """Returns how many steps take about `_CALL_SECONDS`, if so many took that long."""
    return max(1, min(round(num_steps * _CALL_SECONDS / seconds), 16 * num_steps))


def _check_finite(plan: Plan, step: int, sums: Metrics) -> None:
    epoch = (step - 1) // plan.steps_per_epoch
    first_step = epoch * plan.steps_per_epoch
    if sums.finite_steps < step - first_step:
        raise DivergedError(
            f"the loss is not finite in epoch {epoch + 1}, step "
            f"{first_step + int(sums.finite_steps) + 1:,}; a lower learning rate often helps"
        )


def _end_epoch(plan: Plan, loop: LoopState, hooks: Sequence[Hook]) -> tuple[LoopState, int]:
    """Evaluates the validation split and logs; returns whether the hooks continue as well."""
    epoch = loop.step // plan.steps_per_epoch
    common: dict[str, Any] = {"step": loop.step, "epoch": epoch}
    if plan.dataset.sample:
        common["sample"] = True
    train = common | {"split": "train"} | loop.metrics.means()
    train["images_per_second"] = round(len(plan.train_examples) / loop.epoch_seconds, 1)
    train["seconds"] = round(loop.epoch_seconds, 4)
    lines, val = [train], None
    variables = loop.state.variables
    val_images = plan.dataset.train_images[plan.val_examples]
    val_labels = plan.dataset.train_labels[plan.val_examples]
    if num_val := len(val_labels):
        metrics = evaluate(
            variables,
            val_images,
            val_labels,
            model=plan.model,
            loss=plan.unweighted_loss,
            on_call=evaluation_progress(hooks, "val", num_val),
            layout=plan.config.layout,
        )
        val = common | {"split": "val"} | metrics.means()
        if not math.isfinite(val["loss"]):
            raise DivergedError(
                f"the validation loss is not finite after epoch {epoch}, step {loop.step:,}; a "
                "lower learning rate often helps"
            )
        lines.append(val)

    def val_logits() -> np.ndarray:
        return np.asarray(predict(variables, val_images, model=plan.model))

    # Before the checkpoint: a killed run may repeat a line, and omits none.
    history = [*loop.history, *lines]
    log = EpochLog(
        epoch, loop.step, train, val, variables, val_images, val_labels, val_logits, history
    )
    stops: list[Stop] = [hook.epoch(log) for hook in hooks]  # each is called
    stop = _FINISH if "finish" in stops else _INTERRUPT if any(stops) else _CONTINUE
    return LoopState(loop.state, metrics_lib.zeros(plan.config.log_norms), 0.0, history), stop


def _agree(signals: list[int], stop: int, is_due: bool) -> tuple[int, int, bool]:
    """Makes all processes do the same: a signal to any stops all, the first decides the rest."""
    rows = processes.gather([signals[0] if signals else 0, stop, is_due])
    return int(rows[:, 0].max()), int(rows[0, 1]), bool(rows[0, 2])


@contextlib.contextmanager
def _exclusive(workdir: Path, settings: dict[str, Any]) -> Iterator[None]:
    """Creates and locks the folder and writes the settings."""
    with contextlib.ExitStack() as stack:
        with files.usable(workdir):
            files.make_folder(workdir)
            stack.enter_context(files.locked(workdir))
            _read_report(workdir, settings)  # another process may have written it meanwhile
            files.write_json(workdir / files.CONFIG, settings)
        yield


def _read_report(workdir: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Returns the report of this run, if it is finished.

    Raises:
      ConfigError: if the folder holds another run.
    """
    with files.usable(workdir):
        is_run = files.check_config(workdir, settings, "run")
        return files.read_json(workdir / files.REPORT) if is_run else None
