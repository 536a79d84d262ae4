"""`fit`: the host side of a run. Epochs, progress, checkpoints, interrupts and files."""

import contextlib
import dataclasses
import hashlib
import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from fmnist_jax import config, environment, files
from fmnist_jax import metrics as metrics_lib
from fmnist_jax.checkpoint import CheckpointError, Checkpoints
from fmnist_jax.config import ConfigError, Run
from fmnist_jax.data import Dataset
from fmnist_jax.metrics import Metrics
from fmnist_jax.plan import Plan, create_plan
from fmnist_jax.progress import ConsoleProgress, Silence
from fmnist_jax.train import (
    TrainState,
    epoch_order,
    evaluate,
    example_keys,
    predict,
    train_steps,
)

# Training returns to Python about so often, to show progress and to see an interrupt. The length
# of a call changes no bit of the result.
_CALL_SECONDS = 0.5


class DivergedError(ArithmeticError):
    """The loss is not finite. The message names epoch and step."""


class Interrupted(Exception):  # noqa: N818 (it reports what was asked for, no error)
    """A signal stopped the run after its state was saved.

    Attributes:
      signal_number: the signal.
    """

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number


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

    Args:
      run: the settings. The same settings and folder go on, or return a finished run's result.
      dataset: the data.
      progress: who is told; None prints, `Silence()` does not.

    Returns:
      The last state and the report.

    Raises:
      ConfigError: if settings and data do not fit, or the folder holds another run.
      DivergedError: if the loss is not finite.
      Interrupted: if a signal came.
      CheckpointError: if a checkpoint cannot be written or read, or a complete run has none.
      DamagedFileError: if another file of the run cannot be read.

    Example:
      >>> import dataclasses, tempfile, fmnist_jax as fm
      >>> recipe = dataclasses.replace(fm.RECIPES["small_dropout"], epochs=1)
      >>> run = Run(recipe=recipe, workdir=Path(tempfile.mkdtemp()), train_examples=500)
      >>> result = fit(run, fm.load_fashion_mnist(sample=True), progress=Silence())
      >>> result.report["steps"]
      4
    """
    progress = progress or ConsoleProgress()
    plan = create_plan(run, dataset)
    settings = _settings(plan)
    _claim_workdir(run.workdir, settings)
    # Signals wait from here on: an exception in the middle of a save would do harm.
    with _signals() as received, Checkpoints(run.workdir / files.CHECKPOINTS) as checkpoints:
        report = files.read_json(run.workdir / files.REPORT)
        if report is not None and checkpoints.latest_step() is None:
            raise CheckpointError(
                f"the run in {run.workdir} is complete, but it has no checkpoint to take its state "
                "from; its results stay as they are, and another folder starts anew"
            )
        loop = _Loop(plan, checkpoints, progress)
        if report is None:
            _append_environment(run.workdir, dataset.sample)
            loop.train(received)
            report = _finish(plan, loop)
        else:
            progress.say(f"This run is complete; its results are in {run.workdir}.")
    return Result(loop.state, plan.model, report, loop.history)


class _Loop:
    """A run under way: its state on the device and its log on the disk."""

    def __init__(self, plan: Plan, checkpoints: Checkpoints, progress: Silence) -> None:
        self.plan = plan
        self.checkpoints = checkpoints
        self.progress = progress
        self.metrics_path = plan.run.workdir / files.METRICS
        self.compile_seconds = 0.0
        self.epoch_seconds = 0.0
        self.call_steps = 1
        step = checkpoints.latest_step()
        if step is None:
            self.state, self.metrics = plan.create_state(), metrics_lib.zeros()
        else:
            like = {"state": plan.abstract_state, "metrics": jax.eval_shape(metrics_lib.zeros)}
            tree, meta = checkpoints.restore(step, like)
            self.state, self.metrics = tree["state"], tree["metrics"]
            self.epoch_seconds = meta["epoch_seconds"]
        self.history = files.read_lines(self.metrics_path)

    @property
    def step(self) -> int:
        return int(self.state.step)

    def train(self, received: list[int]) -> None:
        """Every epoch that is left."""
        plan, recipe = self.plan, self.plan.run.recipe
        images = jnp.asarray(plan.dataset.train_images)
        labels = jnp.asarray(plan.dataset.train_labels)
        val_images, val_labels = images[plan.val_examples], labels[plan.val_examples]
        # What was logged after the checkpoint will be logged again.
        self.history = [line for line in self.history if line["step"] <= self.step]
        files.write_lines(self.metrics_path, self.history)
        if self.step:
            self.progress.say(f"Going on after step {self.step:,} of {plan.total_steps:,}.")
        self._compile(images, labels)
        self.progress.start(step=self.step, total_steps=plan.total_steps)
        try:
            for epoch in range(self.step // plan.steps_per_epoch, recipe.epochs):
                self._train_epoch(epoch, images, labels, received)
                self._end_epoch(epoch, val_images, val_labels)
                if received:
                    self._stop(received)
        finally:
            self.progress.stop()

    def _compile(self, images: jax.Array, labels: jax.Array) -> None:
        self.progress.say(
            f"Compiling the training loop of {self.plan.run.recipe.arch} for "
            f"{jax.devices()[0].device_kind} ..."
        )
        begun = time.perf_counter()
        order = jnp.asarray(self.plan.train_examples)
        # No steps: this only makes the program.
        self._run_steps(images, labels, order, 0)
        self.compile_seconds = time.perf_counter() - begun

    def _run_steps(
        self, images: jax.Array, labels: jax.Array, order: jax.Array, count: int
    ) -> Metrics:
        self.state, self.metrics = train_steps(
            self.state,
            images,
            labels,
            order,
            self.plan.streams,
            count,
            self.metrics,
            **self.plan.step_options,
        )
        return jax.device_get(self.metrics)

    def _train_epoch(
        self, epoch: int, images: jax.Array, labels: jax.Array, received: list[int]
    ) -> None:
        plan = self.plan
        first_step = epoch * plan.steps_per_epoch
        done = self.step - first_step
        order = epoch_order(plan.streams.shuffle, epoch, jnp.asarray(plan.train_examples))
        while done < plan.steps_per_epoch:
            count = min(self.call_steps, plan.steps_per_epoch - done)
            begun = time.perf_counter()
            metrics = self._run_steps(images, labels, order, count)
            seconds = time.perf_counter() - begun
            self.epoch_seconds += seconds
            done += count
            if metrics.finite_steps < done:
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
            if received and done < plan.steps_per_epoch:
                self._save()
                self._stop(received)
            self.call_steps = max(1, min(round(count * _CALL_SECONDS / seconds), 4 * count))

    def _end_epoch(self, epoch: int, val_images: jax.Array, val_labels: jax.Array) -> None:
        common: dict[str, Any] = {"step": self.step, "epoch": epoch + 1}
        if self.plan.dataset.sample:
            common["sample"] = True
        train = common | {"split": "train"} | self.metrics.means()
        train["images_per_second"] = round(len(self.plan.train_examples) / self.epoch_seconds, 1)
        train["seconds"] = round(self.epoch_seconds, 4)
        lines, val = [train], None
        if len(val_labels):
            result = evaluate(self.state.params, val_images, val_labels, model=self.plan.model)
            val = common | {"split": "val"} | result.means()
            lines.append(val)
            if not math.isfinite(val["loss"]):
                raise DivergedError(
                    f"the validation loss is not finite after epoch {epoch + 1}, step "
                    f"{self.step:,}; a lower learning rate often helps"
                )
        self.history += lines
        # The log first: a checkpoint promises that everything up to its step is logged.
        files.write_lines(self.metrics_path, self.history)
        self.metrics, self.epoch_seconds = metrics_lib.zeros(), 0.0
        self._save()
        self.progress.epoch(epoch=epoch + 1, train=train, val=val)

    def _stop(self, received: list[int]) -> NoReturn:
        raise Interrupted(
            f"Stopped after step {self.step:,} of {self.plan.total_steps:,}, saved; "
            "the same command goes on from there.",
            received[0],
        )

    def _save(self) -> None:
        self.checkpoints.save(
            self.step,
            {"state": self.state, "metrics": self.metrics},
            {"epoch_seconds": self.epoch_seconds},
        )


def _settings(plan: Plan) -> dict[str, Any]:
    """What config.json holds: all that decides a run's numbers."""
    dataset = plan.dataset
    return {
        **config.to_dict(plan.run),
        "classes": list(dataset.class_names),
        "data_sha256": dataset.sha256,
        "sample": dataset.sample,
    }


def _claim_workdir(workdir: Path, settings: dict[str, Any]) -> None:
    path = workdir / files.CONFIG
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        found = files.read_json(path)
        if found is None:
            files.write_json(path, settings)
            return
    except OSError as error:
        raise ConfigError(f"workdir {workdir} cannot be used: {error}") from error
    differences = _differences(found, settings)
    if differences:
        raise ConfigError(
            f"workdir {workdir} holds another run; name another folder. It differs in\n"
            + "\n".join(f"  {line}" for line in differences)
        )


def _differences(found: Any, wanted: Any, name: str = "") -> list[str]:
    if isinstance(found, dict) and isinstance(wanted, dict):
        return [
            line
            for key in {**found, **wanted}
            for line in _differences(found.get(key), wanted.get(key), f"{name}.{key}".lstrip("."))
        ]
    return [] if found == wanted else [f"{name}: {found} there, {wanted} asked for"]


def _append_environment(workdir: Path, sample: bool) -> None:
    """Adds this process to environment.json: one entry each time a run is started or goes on."""
    path = workdir / files.ENVIRONMENT
    entry = environment.describe() | ({"sample": True} if sample else {})
    files.write_json(path, [*(files.read_json(path) or []), entry])


def _finish(plan: Plan, loop: _Loop) -> dict[str, Any]:
    """Looks at the test images and writes what is known at the end of a run."""
    from fmnist_jax import scores  # imported here: scikit-learn takes a second, needed only now

    dataset, workdir, recipe = plan.dataset, plan.run.workdir, plan.run.recipe
    loop.progress.say(f"Evaluating on {len(dataset.test_labels):,} test images ...")
    logits = np.asarray(
        predict(loop.state.params, jnp.asarray(dataset.test_images), model=plan.model)
    )
    files.write_arrays(
        workdir / files.PREDICTIONS,
        logits=logits,
        labels=dataset.test_labels,
        indices=dataset.test_indices,
        sample=dataset.sample,
    )
    test = scores.score(logits, dataset.test_labels, dataset.class_names)
    files.write_arrays(workdir / files.EXAMPLES, **_examples(plan, test.losses))
    last = {line["split"]: line for line in loop.history}
    train_lines = [line for line in loop.history if line["split"] == "train"]
    report = {
        "sample": dataset.sample,
        "arch": recipe.arch,
        "recipe": dataclasses.asdict(recipe),
        "seed": plan.run.seed,
        "epochs": recipe.epochs,
        "steps": loop.step,
        "params": plan.num_params,
        "train_accuracy": last["train"]["accuracy"],
        "val_accuracy": last["val"]["accuracy"] if "val" in last else None,
        "test_accuracy": test.accuracy,
        "test_loss": test.loss,
        "classes": test.classes,
        "confusion_matrix": test.confusion_matrix,
        "compile_seconds": round(loop.compile_seconds, 3),
        "train_seconds": round(sum(line["seconds"] for line in train_lines), 3),
        "images_per_second": float(np.median([line["images_per_second"] for line in train_lines])),
        "data": {
            "source": dataset.source,
            "sha256": dataset.sha256,
            "train": len(plan.train_examples),
            "val": len(plan.val_examples),
            "test": len(dataset.test_labels),
            "classes": list(dataset.class_names),
        },
        "params_sha256": params_sha256(loop.state.params),
        "versions": environment.versions(),
        "device": jax.devices()[0].device_kind,
    }
    # Last, because it marks the run as complete.
    files.write_json(workdir / files.REPORT, report)
    return report


def params_sha256(params: Any) -> str:
    """SHA-256 over the names, dtypes, shapes and bytes of all parameters.

    Example:
      >>> params_sha256({"w": np.zeros(2)})[:8]
      '99024f1b'
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(params):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape};".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _examples(plan: Plan, test_losses: np.ndarray) -> dict[str, np.ndarray]:
    """The images that the report shows."""
    dataset = plan.dataset
    shown = np.concatenate(
        [
            plan.train_examples[dataset.train_labels[plan.train_examples] == label][:10]
            for label in range(len(dataset.class_names))
        ]
    )
    worst = np.argsort(-test_losses, kind="stable")[:20]
    assert dataset.test_indices is not None  # set by Dataset itself
    examples = {
        "sample_images": dataset.train_images[shown],
        "sample_labels": dataset.train_labels[shown],
        "worst_images": dataset.test_images[worst],
        "worst_indices": dataset.test_indices[worst],
        "sample": np.asarray(dataset.sample),
    }
    if plan.augment is not None:
        originals = plan.train_examples[:6]
        versions = []
        for epoch in range(5):
            keys = example_keys(plan.streams.augment, jnp.int32(epoch), jnp.asarray(originals))
            versions.append(plan.augment(keys, jnp.asarray(dataset.train_images[originals])))
        examples["originals"] = dataset.train_images[originals]
        # [example, epoch, side, side], the very images that the first epochs saw.
        examples["augmented"] = np.asarray(jnp.stack(versions, axis=1))[..., 0]
    return examples


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM; the second one acts as it did before."""
    received: list[int] = []
    previous: dict[int, Any] = {}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def note(number: int, frame: FrameType | None) -> None:
        del frame
        received.append(number)
        restore()

    with contextlib.suppress(ValueError):  # only the main thread may; elsewhere nothing changes
        for number in (signal.SIGINT, signal.SIGTERM):
            previous[number] = signal.signal(number, note)
    try:
        yield received
    finally:
        restore()
