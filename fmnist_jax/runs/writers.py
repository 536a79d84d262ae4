"""Progress and logs of a run: the interfaces, and the console."""

import importlib.util
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

# Seconds between two lines of progress where the output is not a terminal.
_LINE_SECONDS = 20.0

# An evaluation shows progress once it takes longer than this many seconds.
_SILENT_SECONDS = 3.0


class EpochLog(NamedTuple):
    """What a writer receives after each epoch.

    Attributes:
      epoch: number of epochs trained.
      step: number of steps taken.
      train: the epoch's training line of metrics.jsonl.
      val: its validation line; None without validation images.
      variables: the model's variables.
      val_images: uint8[n, height, width], the validation images.
      val_labels: int32[n].
      val_logits: computes float32[n, num_classes]; it takes as long as the evaluation did.
    """

    epoch: int
    step: int
    train: dict[str, Any]
    val: dict[str, Any] | None
    variables: Any
    val_images: np.ndarray
    val_labels: np.ndarray
    val_logits: Callable[[], np.ndarray]


class Writer:
    """Receives the log of a run, beside metrics.jsonl. Subclass it to log elsewhere.

    An error that it raises ends the run, which can be resumed.
    """

    def start(self, *, settings: Mapping[str, Any], step: int) -> None:
        """Training starts or resumes after `step` steps; what came after them will come again.

        Args:
          settings: the content of config.json.
          step: 0 for a new run.
        """

    def epoch(self, log: EpochLog) -> None:
        """An epoch was trained and evaluated; it is saved after this call."""

    def finish(self, *, report: Mapping[str, Any]) -> None:
        """The run is finished; `report` is the content of report.json."""


class NullProgress:
    """Ignores progress. Subclass it to report progress elsewhere."""

    def say(self, text: str) -> None:
        """Receives a message."""

    def start(self, *, step: int, total_steps: int) -> None:
        """Training starts or resumes after `step` of `total_steps` steps."""

    def update(self, *, step: int, epoch: int, images_per_second: float, loss: float) -> None:
        """Training has reached a step; `loss` is the mean over the epoch so far."""

    def evaluate(self, *, split: str, num_done: int, num_images: int) -> None:
        """Evaluation of a split has reached an image; it starts with `num_done=0`."""

    def epoch(self, *, epoch: int, train: dict[str, Any], val: dict[str, Any] | None) -> None:
        """An epoch was trained and evaluated; these are its lines of metrics.jsonl."""

    def stop(self) -> None:
        """Training has ended, for whatever reason."""


class ConsoleProgress(NullProgress):
    """Shows a progress bar in a terminal, and plain lines elsewhere."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        self._bar: Progress | None = None
        self._started = (0.0, 0)
        self._line_time = self._evaluation_started = 0.0
        self._total_steps = 0

    def say(self, text: str) -> None:
        if self._console.is_jupyter:
            print(text)  # a block of HTML for each line takes three times the space
        else:
            self._console.print(text, highlight=False, markup=False, emoji=False, soft_wrap=True)

    def start(self, *, step: int, total_steps: int) -> None:
        self._total_steps = total_steps
        self._started = (time.monotonic(), step)
        self._line_time = time.monotonic()
        # In a notebook, rich draws the bar as a widget.
        is_notebook = self._console.is_jupyter
        has_widgets = importlib.util.find_spec("ipywidgets") is not None
        if self._console.is_terminal or (is_notebook and has_widgets):
            self._bar = Progress(
                TextColumn("epoch {task.fields[epoch]}"),
                BarColumn(6 if is_notebook else 40),  # a notebook cuts off long lines
                TextColumn(
                    "{task.completed}/{task.total} steps  {task.fields[speed]:,.0f} images/s  "
                    "loss {task.fields[loss]:.4f}"
                ),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
                redirect_stdout=not is_notebook,
                speed_estimate_period=120,
            )
            self._bar.add_task(
                "training", total=total_steps, completed=step, epoch=1, speed=0.0, loss=0.0
            )
            self._bar.start()

    def update(self, *, step: int, epoch: int, images_per_second: float, loss: float) -> None:
        if self._bar is not None:
            self._bar.update(
                self._bar.task_ids[0],
                completed=step,
                epoch=epoch,
                speed=images_per_second,
                loss=loss,
            )
        elif self._is_line_due():
            started, first_step = self._started
            pace = (time.monotonic() - started) / max(step - first_step, 1)
            self.say(
                f"  epoch {epoch}, step {step:,}/{self._total_steps:,}: "
                f"{images_per_second:,.0f} images/s, loss {loss:.4f}, "
                f"{_duration(pace * (self._total_steps - step))} left"
            )

    def evaluate(self, *, split: str, num_done: int, num_images: int) -> None:
        now = time.monotonic()
        if num_done == 0:
            self._evaluation_started = now
            self._line_time = now - _LINE_SECONDS
        seconds = now - self._evaluation_started
        if 0 < num_done < num_images and seconds > _SILENT_SECONDS and self._is_line_due():
            self.say(
                f"  evaluating {split}: {num_done:,} of {num_images:,} images, "
                f"{_duration(seconds * (num_images / num_done - 1))} left"
            )

    def epoch(self, *, epoch: int, train: dict[str, Any], val: dict[str, Any] | None) -> None:
        validation = f"   val loss {val['loss']:.4f}  accuracy {val['accuracy']:.2%}" if val else ""
        self._line_time = time.monotonic()
        self.say(
            f"epoch {epoch:3d}   train loss {train['loss']:.4f}  accuracy {train['accuracy']:.2%}"
            f"{validation}   {train['images_per_second']:,.0f} images/s"
        )

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _is_line_due(self) -> bool:
        now = time.monotonic()
        if now - self._line_time < _LINE_SECONDS:
            return False
        self._line_time = now
        return True


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
