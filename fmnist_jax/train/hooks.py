"""`Hook`: receives what happens in a training."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

# What `Hook.epoch` returns to end a run: True leaves it unfinished, "finish" writes its results.
Stop = bool | Literal["finish"] | None


class EpochLog(NamedTuple):
    """What a hook receives after each epoch.

    Attributes:
      epoch: number of epochs trained.
      step: number of steps taken.
      train: the epoch's training line of metrics.jsonl.
      val: its validation line; None without validation images.
      variables: the model's variables.
      val_images: uint8[n, height, width], the validation images.
      val_labels: int32[n].
      val_logits: computes float32[n, num_classes]; it takes as long as the evaluation did.
      history: all lines of metrics.jsonl so far, also those of before an interruption.
    """

    epoch: int
    step: int
    train: dict[str, Any]
    val: dict[str, Any] | None
    variables: Any
    val_images: np.ndarray
    val_labels: np.ndarray
    val_logits: Callable[[], np.ndarray]
    history: list[dict[str, Any]]


class Hook:
    """Receives the events of a run, for progress, logs or early stopping. Subclass it.

    The methods of this class do nothing. An error that a hook raises ends the run, which can be
    resumed.

    Attributes:
      in_every_process: whether every process of a distributed run calls it, or the first alone.

    Example:
      >>> class StopAt(Hook):
      ...     def epoch(self, log):
      ...         return log.val["accuracy"] > 0.92
    """

    in_every_process = False

    def message(self, text: str) -> None:
        """Receives a message for the user."""

    def series(self, *, index: int, num_runs: int) -> None:
        """Announces run number `index`, counted from 0, of `num_runs` equally long ones."""

    def start(self, *, settings: Mapping[str, Any], step: int, total_steps: int) -> None:
        """Training starts or resumes after `step` of `total_steps` steps.

        Args:
          settings: the content of config.json.
          step: 0 for a new run. Epochs after it are logged again.
          total_steps: steps of the whole run.
        """

    def update(self, *, step: int, epoch: int, images_per_second: float, loss: float) -> None:
        """Training has reached a step; `loss` is the mean over the epoch so far."""

    def evaluate(self, *, split: str, num_done: int, num_images: int) -> None:
        """Evaluation of a split has reached an image; it starts with `num_done=0`."""

    def epoch(self, log: EpochLog) -> Stop:
        """An epoch was trained and evaluated, and is not saved yet.

        Returns:
          True to stop the run when it is saved: `fit` raises `Interrupted`, and the same call
          resumes. "finish" to end the training: `fit` writes the results, and the checkpoint
          records that the run is finished.
        """

    def stop(self) -> None:
        """Training has ended, for whatever reason."""

    def finish(self, *, report: Mapping[str, Any]) -> None:
        """The run is finished; `report` is the content of report.json."""


class EarlyStopping(Hook):
    """Finishes a run after some epochs without a better validation accuracy; `Recipe.patience`.

    It decides by the history, which checkpoints hold, so that a resumed run ends at the same epoch.

    Args:
      patience: number of these epochs.
    """

    def __init__(self, patience: int) -> None:
        self._patience = patience

    def epoch(self, log: EpochLog) -> Stop:  # noqa: D102
        accuracies = [line["accuracy"] for line in log.history if line["split"] == "val"]
        return "finish" if epochs_without_gain(accuracies) >= self._patience else None


def epochs_without_gain(accuracies: Sequence[float]) -> int:
    """Returns how many epochs there are after the first one with the best accuracy.

    Example:
      >>> epochs_without_gain([0.5, 0.7, 0.6, 0.7])
      2
    """
    return len(accuracies) - 1 - accuracies.index(max(accuracies)) if accuracies else 0


def say(hooks: Sequence[Hook], text: str) -> None:
    """Sends a message to every hook."""
    for hook in hooks:
        hook.message(text)


@contextlib.contextmanager
def started(
    hooks: Sequence[Hook], settings: Mapping[str, Any], step: int, total_steps: int
) -> Iterator[None]:
    """Reports the start of a training, and its end however it ends, for a `with` statement."""
    for hook in hooks:
        hook.start(settings=settings, step=step, total_steps=total_steps)
    try:
        yield
    finally:
        for hook in hooks:
            hook.stop()


def evaluation_progress(
    hooks: Sequence[Hook], split: str, num_images: int
) -> Callable[[int], None]:
    """Reports the start of an evaluation; returns what reports how many images are done."""

    def report(num_done: int) -> None:
        for hook in hooks:
            hook.evaluate(split=split, num_done=num_done, num_images=num_images)

    report(0)
    return report
