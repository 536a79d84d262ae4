"""Accuracy, loss and per-class scores of predictions.

`logits` are float[n, num_classes] and `labels` int[n] with values in [0, num_classes). ValueError
is raised if shapes do not match, logits are not finite or labels are out of range.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import log_softmax
from sklearn.metrics import accuracy_score, confusion_matrix, precision_recall_fscore_support


class Scores(NamedTuple):
    """Scores of predictions.

    Attributes:
      accuracy: fraction.
      loss: mean cross-entropy in nats.
      losses: float64[n], cross-entropy of each example in nats.
      classes: name, precision, recall, f1 and support of each class; 0 where undefined.
      confusion_matrix: rows are labels, columns predictions.
    """

    accuracy: float
    loss: float
    losses: np.ndarray
    classes: list[dict[str, Any]]
    confusion_matrix: list[list[int]]


def score(logits: ArrayLike, labels: ArrayLike, class_names: Sequence[str]) -> Scores:
    """Scores predictions; class_names has one name per class.

    Example:
      >>> score([[2.0, 0.0], [1.0, 0.0]], [0, 1], ["a", "b"]).accuracy
      0.5
    """
    losses = log_losses(logits, labels)
    labels, predicted = np.asarray(labels), np.argmax(logits, axis=1)
    numbers = range(len(class_names))
    by_class = precision_recall_fscore_support(labels, predicted, labels=numbers, zero_division=0)
    classes = [
        {"name": name, "precision": float(precision), "recall": float(recall), "f1": float(f1)}
        | {"support": int(support)}
        for name, precision, recall, f1, support in zip(class_names, *by_class, strict=True)
    ]
    matrix = confusion_matrix(labels, predicted, labels=numbers).tolist()
    accuracy = accuracy_score(labels, predicted)
    return Scores(accuracy, float(losses.mean()), losses, classes, matrix)


def log_losses(logits: ArrayLike, labels: ArrayLike) -> np.ndarray:
    """Cross-entropy of each example, float64[n], in nats.

    Example:
      >>> log_losses(np.log([[0.25, 0.75]]), [1]).round(4).tolist()
      [0.2877]
    """
    logits, labels = check_predictions(logits, labels)
    return -log_softmax(logits, axis=1)[np.arange(len(labels)), labels]


def check_predictions(logits: ArrayLike, labels: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Checks predictions and returns the logits as float64 and the labels as an array.

    Example:
      >>> check_predictions([[1.0, 0.0]], [2])
      Traceback (most recent call last):
      ValueError: labels contain 2; they must be from 0 to 1
    """
    logits, labels = np.asarray(logits, np.float64), np.asarray(labels)
    if logits.ndim != 2 or logits.size == 0 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"logits have shape {logits.shape} and labels {labels.shape}; they must be "
            "[n, num_classes] and [n], and not empty"
        )
    if not np.isfinite(logits).all():
        raise ValueError(f"logits contain {logits[~np.isfinite(logits)][0]}; all must be finite")
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"labels are {labels.dtype}; they must be integers")
    invalid = (labels < 0) | (labels >= logits.shape[1])
    if invalid.any():
        raise ValueError(
            f"labels contain {labels[invalid][0]}; they must be from 0 to {logits.shape[1] - 1}"
        )
    return logits, labels
