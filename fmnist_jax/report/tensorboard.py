"""`TensorBoardHook`: the log of a run as event files, without TensorFlow."""

import io
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from fmnist_jax.analysis import plots
from fmnist_jax.analysis.scores import score
from fmnist_jax.errors import ConfigError, EnvironmentWarning, import_optional
from fmnist_jax.train.hooks import EpochLog, Hook

_NUM_SHOWN = 20  # misclassified images per epoch


class TensorBoardHook(Hook):
    """Writes scalars, histograms of the parameters, a confusion matrix and misclassified images.

    The last two are of the validation images. TensorBoard's HParams page shows recipe and final
    accuracies. When a run resumes, TensorBoard drops the points after the checkpoint. Needs
    tensorboardX (`pip install 'fmnist_jax[tensorboard]'`).

    Args:
      folder: of the event files, for `tensorboard --logdir`.

    Raises:
      ConfigError: if tensorboardX is not installed.

    Example:
      >>> import tempfile
      >>> hook = TensorBoardHook(Path(tempfile.mkdtemp()))
      >>> hook.start(settings={"classes": ["Bag", "Trouser"]}, step=0, total_steps=10)
    """

    def __init__(self, folder: Path) -> None:
        self._package = import_optional("tensorboardX", "tensorboard")
        self._folder = folder
        self._events: Any = None
        self._class_names: list[str] = []

    def start(self, *, settings: Mapping[str, Any], step: int, total_steps: int) -> None:
        self._class_names = settings["classes"]
        self._events = self._package.SummaryWriter(str(self._folder), purge_step=step + 1)

    def epoch(self, log: EpochLog) -> None:
        for split, line in (("train", log.train), ("val", log.val)):
            for name, value in (line or {}).items():
                if name not in ("step", "epoch", "split", "sample", "seconds"):
                    self._events.add_scalar(f"{name}/{split}", value, log.step)
        for path, leaf in jax.tree.leaves_with_path(log.variables):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            self._events.add_histogram(name, np.asarray(leaf), log.step)
        if log.val is not None:
            logits = log.val_logits()
            matrix = score(logits, log.val_labels, self._class_names).confusion_matrix
            images, labels, names = log.val_images, log.val_labels, self._class_names
            try:
                self._add_figure("confusion", plots.confusion_matrix(matrix, names), log)
                figure = plots.misclassified(images, labels, logits, names, _NUM_SHOWN)
                self._add_figure("misclassified", figure, log)
            except ConfigError as error:  # a figure is not worth the training
                warnings.warn(str(error), EnvironmentWarning, stacklevel=2)
        self._events.flush()

    def finish(self, *, report: Mapping[str, Any]) -> None:
        hparams = {
            name: value if isinstance(value, bool | int | float | str) else str(value)
            for name, value in {**report["recipe"], "seed": report["seed"]}.items()
        }
        names = [name for name in ("test_accuracy", "val_accuracy") if report[name] is not None]
        metrics = {f"hparam/{name}": report[name] for name in names}
        self._events.add_hparams(hparams, metrics, name="hparams")
        self._events.close()

    def _add_figure(self, name: str, figure: Figure, log: EpochLog) -> None:
        with Image.open(io.BytesIO(plots.encode(figure, sample="sample" in log.train))) as picture:
            pixels = np.asarray(picture.convert("RGB"))
        self._events.add_image(f"{name}/val", pixels, log.step, dataformats="HWC")
