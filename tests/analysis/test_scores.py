"""Scores equal their definitions; invalid predictions are named by every function."""

import json

import numpy as np
import pytest

from fmnist_jax.analysis import calibration
from fmnist_jax.analysis.scores import log_losses, score


def test_scores_equal_their_definitions():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(200, 5)).astype(np.float32)
    logits[:, 2] -= 20
    # Class 2 is neither a label nor predicted, class 4 is not a label.
    labels = rng.choice([0, 1, 3], 200)
    result = score(logits, labels, list("abcde"))

    predicted = logits.argmax(axis=1)
    matrix = np.zeros((5, 5), int)
    np.add.at(matrix, (labels, predicted), 1)
    np.testing.assert_array_equal(result.confusion_matrix, matrix)
    assert result.accuracy == np.mean(labels == predicted)

    exponentials = np.exp(logits.astype(np.float64))
    losses = -np.log((exponentials / exponentials.sum(1, keepdims=True))[np.arange(200), labels])
    np.testing.assert_allclose(result.losses, losses)
    np.testing.assert_allclose(result.loss, losses.mean())

    for label, row in enumerate(result.classes):
        hits = matrix[label, label]
        recall = hits / max(matrix[label].sum(), 1)
        precision = hits / max(matrix[:, label].sum(), 1)
        np.testing.assert_allclose([row["precision"], row["recall"]], [precision, recall])
        f1 = 2 * precision * recall / (precision + recall) if hits else 0
        np.testing.assert_allclose(row["f1"], f1)
        assert row["support"] == matrix[label].sum()
        assert row["name"] == "abcde"[label]
    json.dumps([result.accuracy, result.loss, result.classes, result.confusion_matrix])


def test_cross_entropy_of_large_logits_is_finite():
    np.testing.assert_array_equal(log_losses([[1e4, 0.0], [1e4, 0.0]], [0, 1]), [0, 1e4])


VALID = np.zeros((2, 3))


@pytest.mark.parametrize(
    "function",
    [
        log_losses,
        lambda logits, labels: score(logits, labels, "abc"),
        calibration.expected_calibration_error,
        calibration.calibration_interval,
        calibration.reliability,
        calibration.fit_temperature,
        calibration.risk_coverage,
        calibration.area_under_risk_coverage,
    ],
)
@pytest.mark.parametrize(
    ("logits", "labels", "message"),
    [
        (np.zeros(3), [0, 1, 2], r"logits have shape \(3,\) and labels \(3,\)"),
        (VALID, [0], r"labels \(1,\)"),
        (np.zeros((0, 3)), np.zeros(0, int), "not empty"),
        (VALID * np.nan, [0, 1], "logits contain nan"),
        (VALID, [0.0, 1.0], "labels are float64"),
        (VALID, [0, 3], "labels contain 3; they must be from 0 to 2"),
        (VALID, [-1, 0], "labels contain -1"),
    ],
)
def test_invalid_predictions_are_named(function, logits, labels, message):
    with pytest.raises(ValueError, match=message):
        function(logits, labels)
