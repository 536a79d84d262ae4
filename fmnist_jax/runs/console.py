"""`ConsoleProgress`: the progress of runs in a terminal, a notebook or a log."""

import importlib.util
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fmnist_jax.train.hooks import EpochLog, Hook

# Seconds between two lines of progress where the output is not a terminal.
_LINE_SECONDS = 20.0

# An evaluation shows progress once it takes longer than this many seconds.
_SILENT_SECONDS = 3.0


class ConsoleProgress(Hook):
    """Shows a progress bar in a terminal, and plain lines elsewhere."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        self._bar: Progress | None = None
        self._started = (0.0, 0)
        self._line_time = self._evaluation_started = 0.0
        self._first_step = self._total_steps = 0
        self._series = (0, 1)

    def series(self, *, index: int, num_runs: int) -> None:
        self._series = (index, num_runs)

    def message(self, text: str) -> None:
        if self._console.is_jupyter:
            print(text)  # a block of HTML for each line takes three times the space
        else:
            self._console.print(text, highlight=False, markup=False, emoji=False, soft_wrap=True)

    def start(self, *, settings: Mapping[str, Any], step: int, total_steps: int) -> None:
        # A run of a series is shown as a part of all its steps.
        index, num_runs = self._series
        self._first_step, self._total_steps = index * total_steps, num_runs * total_steps
        step += self._first_step
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
                "training", total=self._total_steps, completed=step, epoch=1, speed=0.0, loss=0.0
            )
            self._bar.start()

    def update(self, *, step: int, epoch: int, images_per_second: float, loss: float) -> None:
        step += self._first_step
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
            self.message(
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
            self.message(
                f"  evaluating {split}: {num_done:,} of {num_images:,} images, "
                f"{_duration(seconds * (num_images / num_done - 1))} left"
            )

    def epoch(self, log: EpochLog) -> None:
        train, val = log.train, log.val
        validation = f"   val loss {val['loss']:.4f}  accuracy {val['accuracy']:.2%}" if val else ""
        self._line_time = time.monotonic()
        self.message(
            f"epoch {log.epoch:3d}   train loss {train['loss']:.4f}  accuracy "
            f"{train['accuracy']:.2%}{validation}   {train['images_per_second']:,.0f} images/s"
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
