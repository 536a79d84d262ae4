"""Scores of a classifier's predictions, by scikit-learn."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.special import logsumexp
from sklearn.metrics import accuracy_score, classification_report, confusion_matrix

from fmnist_jax.analysis import calibration


class Scores(NamedTuple):
    """How predictions compare with labels.

    Attributes:
      accuracy: fraction.
      loss: mean cross-entropy in nats.
      losses: float64[n], of each example.
      classes: for each class its name, precision, recall, f1 and support.
      confusion_matrix: rows are labels, columns predictions.
    """

    accuracy: float
    loss: float
    losses: np.ndarray
    classes: list[dict[str, Any]]
    confusion_matrix: list[list[int]]


def score(logits: np.ndarray, labels: np.ndarray, class_names: Sequence[str]) -> Scores:
    """Scores predictions.

    Args:
      logits: float[n, num_classes].
      labels: int[n], values in [0, num_classes).
      class_names: one a class.

    Example:
      >>> score(np.array([[2.0, 0.0], [1.0, 0.0]]), np.array([0, 1]), ["a", "b"]).accuracy
      0.5
    """
    logits = logits.astype(np.float64)
    predicted = logits.argmax(axis=1)
    losses = logsumexp(logits, axis=1) - logits[np.arange(len(labels)), labels]
    numbers = list(range(len(class_names)))
    by_class = classification_report(
        labels, predicted, labels=numbers, output_dict=True, zero_division=0
    )
    classes: list[dict[str, Any]] = [
        {
            "name": name,
            "precision": float(by_class[str(number)]["precision"]),
            "recall": float(by_class[str(number)]["recall"]),
            "f1": float(by_class[str(number)]["f1-score"]),
            "support": int(by_class[str(number)]["support"]),
        }
        for number, name in enumerate(class_names)
    ]
    return Scores(
        float(accuracy_score(labels, predicted)),
        float(losses.mean()),
        losses,
        classes,
        confusion_matrix(labels, predicted, labels=numbers).tolist(),
    )


def calibrate(predictions: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """How far the probabilities of a network can be trusted, ready for JSON.

    Args:
      predictions: `logits` and `labels` of the test images, and where there are any, `val_logits`
        and `val_labels` of the validation images.

    Returns:
      `ece`, the expected calibration error, with `ece_low` and `ece_high`, its 95% interval;
      `aurc`, the area under the risk-coverage curve; and, with one temperature fitted on the
      validation images, `temperature`, `ece_scaled` and `loss_scaled`, all three None without such
      images.

    Example:
      >>> logits = np.log([[0.5, 0.5], [0.5, 0.5]])
      >>> calibrate({"logits": logits, "labels": np.array([0, 1])})["ece"]
      0.0
    """
    logits, labels = predictions["logits"].astype(np.float64), predictions["labels"]
    low, high = calibration.calibration_interval(logits, labels)
    result: dict[str, Any] = {
        "ece": calibration.expected_calibration_error(logits, labels),
        "ece_low": float(low),
        "ece_high": float(high),
        "aurc": calibration.area_under_risk_coverage(logits, labels),
        "temperature": None,
        "ece_scaled": None,
        "loss_scaled": None,
    }
    if len(predictions.get("val_labels", ())):
        temperature = calibration.fit_temperature(
            predictions["val_logits"], predictions["val_labels"]
        )
        scaled = logits / temperature
        losses = logsumexp(scaled, axis=1) - scaled[np.arange(len(labels)), labels]
        result["temperature"] = temperature
        result["ece_scaled"] = calibration.expected_calibration_error(scaled, labels)
        result["loss_scaled"] = float(losses.mean())
    return result
