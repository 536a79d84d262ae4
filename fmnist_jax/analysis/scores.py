"""Accuracy, loss, per-class scores of predictions and their means over classes.

`logits` are float[n, num_classes] and `labels` int[n] with values in [0, num_classes). ValueError
is raised if shapes do not match, logits are not finite or labels are out of range.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import expit, log_softmax, logit, softmax
from scipy.stats import binomtest, norm, rankdata
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


class MacroScore(NamedTuple):
    """A score in which every class counts the same, whatever its size.

    Attributes:
      value: in [0, 1], the mean over the classes that have examples; None if it is undefined.
      low: lower end of the 95% interval over images; None if it is undefined.
      high: upper end of the interval.
    """

    value: float | None
    low: float | None
    high: float | None


def macro_scores(logits: ArrayLike, labels: ArrayLike) -> dict[str, MacroScore]:
    """Scores for classes of different sizes, with intervals over other images of the same sizes.

    Classes without examples are left out of the means:

    - `balanced_accuracy`: mean recall. The interval combines Wilson's intervals of the recalls (Zou
      et al. 2009). In simulations with 10 to 1,000 images of a class, 93% to 96% of the 95%
      intervals contained the true value.
    - `macro_f1`: mean F1. The interval is that of the delta method, symmetric in log odds: 94% to
      96%. It is undefined if the value is 0 or 1, a class has a single image, or the network treats
      all images of a class alike.
    - `auc`: mean area under the ROC curves of the probability of each class against the rest, None
      for a single class. The interval is that of DeLong et al. (1988), symmetric in log odds: 85%
      with 10 images in a class, and 89% to 95% with more. It is undefined as that of the F1.

    Example:
      >>> probabilities = [[0.8, 0.2], [0.6, 0.4], [0.7, 0.3], [0.1, 0.9]]
      >>> found = macro_scores(np.log(probabilities), [0, 0, 1, 1])
      >>> [f"{name} {score.value:.3f}" for name, score in found.items()]
      ['balanced_accuracy 0.750', 'macro_f1 0.733', 'auc 0.750']
    """
    logits, labels = check_predictions(logits, labels)
    classes, class_of, counts = np.unique(labels, return_inverse=True, return_counts=True)
    is_label, is_predicted = labels[:, None] == classes, logits.argmax(axis=1)[:, None] == classes
    hits, both = is_label & is_predicted, is_label.astype(int) + is_predicted
    sizes = both.sum(axis=0)
    f1 = 2 * hits.sum(axis=0) / sizes
    found = {
        "balanced_accuracy": _mean_recall(hits.sum(axis=0), counts),
        "macro_f1": _mean_score(f1, (2 * hits - f1 * both) / sizes, class_of),
        "auc": MacroScore(None, None, None),
    }
    if len(classes) > 1:
        scores = softmax(logits, axis=1)
        placements = np.array([_placements(scores[:, c], labels == c) for c in classes]).T
        areas = np.sum(placements * is_label, axis=0) / counts
        sizes = np.where(is_label, counts, len(labels) - counts)
        found["auc"] = _mean_score(areas, (placements - areas) / sizes, class_of)
    return found


def _mean_recall(hits: np.ndarray, counts: np.ndarray) -> MacroScore:
    """The mean of independent fractions, with the interval of Zou et al. (2009)."""
    recalls, mean = hits / counts, np.mean(hits / counts)
    ends = np.array(
        [
            binomtest(int(hit), int(count)).proportion_ci(method="wilson")
            for hit, count in zip(hits, counts, strict=True)
        ]
    )
    below, above = np.linalg.norm(ends - recalls[:, None], axis=0) / len(counts)
    return MacroScore(float(mean), float(mean - below), float(mean + above))


def _mean_score(values: np.ndarray, effects: np.ndarray, class_of: np.ndarray) -> MacroScore:
    """The mean of the scores of the classes, with the interval of the delta method.

    Args:
      values: float[classes].
      effects: float[n, classes], the first-order effect of each image on each score.
      class_of: int[n], positions of the images' classes.
    """
    mean, effect, counts = float(values.mean()), effects.mean(axis=1), np.bincount(class_of)
    if not 0 < mean < 1 or counts.min() == 1:
        return MacroScore(mean, None, None)
    # The sizes of the classes are fixed, so only the spread within a class counts.
    spread = effect - (np.bincount(class_of, effect) / counts)[class_of]
    variance = np.sum(np.bincount(class_of, spread**2) * counts / (counts - 1))
    if variance < 1e-20:  # 0, except for rounding
        return MacroScore(mean, None, None)
    half = norm.ppf(0.975) * np.sqrt(variance) / (mean * (1 - mean))
    return MacroScore(mean, float(expit(logit(mean) - half)), float(expit(logit(mean) + half)))


def _placements(scores: np.ndarray, is_positive: np.ndarray) -> np.ndarray:
    """Returns float[n], the fraction of the other side that each image is on the right side of.

    Equal scores count half. The mean over either side is the area under the ROC curve.
    """
    ranks, below = rankdata(scores), np.empty(len(scores))
    for side in (is_positive, ~is_positive):
        below[side] = (ranks[side] - rankdata(scores[side])) / np.sum(~side)
    return np.where(is_positive, below, 1 - below)


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
