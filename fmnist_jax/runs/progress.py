"""What a person sees while a run goes on."""

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

# Where the output is no terminal, a line of progress so often.
_LINE_SECONDS = 20.0


class Silence:
    """Says nothing. Derive from it to send progress elsewhere."""

    def say(self, text: str) -> None:
        """A sentence about what happens next."""

    def start(self, *, step: int, total_steps: int) -> None:
        """Training starts, or goes on after `step` of `total_steps` updates."""

    def update(self, *, step: int, epoch: int, images_per_second: float, loss: float) -> None:
        """Some updates are done; `loss` is the mean over the epoch so far."""

    def epoch(self, *, epoch: int, train: dict[str, Any], val: dict[str, Any] | None) -> None:
        """An epoch is over and evaluated; these are its lines of metrics.jsonl."""

    def stop(self) -> None:
        """Training is over, for whatever reason."""


class ConsoleProgress(Silence):
    """A progress bar with images/s, loss and time left in a terminal, plain lines elsewhere."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        self._bar: Progress | None = None
        self._begun = self._said = (0.0, 0)
        self._total_steps = 0

    def say(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True)

    def start(self, *, step: int, total_steps: int) -> None:
        self._total_steps = total_steps
        self._begun = self._said = (time.monotonic(), step)
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("epoch {task.fields[epoch]}"),
                BarColumn(),
                TextColumn(
                    "{task.completed}/{task.total} steps  {task.fields[speed]:,.0f} images/s  "
                    "loss {task.fields[loss]:.4f}"
                ),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
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
        elif time.monotonic() - self._said[0] >= _LINE_SECONDS:
            begun, first_step = self._begun
            pace = (time.monotonic() - begun) / max(step - first_step, 1)
            self._said = (time.monotonic(), step)
            self.say(
                f"  epoch {epoch}, step {step:,}/{self._total_steps:,}: "
                f"{images_per_second:,.0f} images/s, loss {loss:.4f}, "
                f"{_duration(pace * (self._total_steps - step))} left"
            )

    def epoch(self, *, epoch: int, train: dict[str, Any], val: dict[str, Any] | None) -> None:
        validation = f"   val loss {val['loss']:.4f}  accuracy {val['accuracy']:.2%}" if val else ""
        self._said = (time.monotonic(), 0)
        self.say(
            f"epoch {epoch:3d}   train loss {train['loss']:.4f}  accuracy {train['accuracy']:.2%}"
            f"{validation}   {train['images_per_second']:,.0f} images/s"
        )

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
