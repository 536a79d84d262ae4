"""Scores equal their definitions; invalid predictions are named by every function."""

import json
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import balanced_accuracy_score, f1_score, roc_auc_score
from statsmodels.stats.proportion import proportion_confint

from fmnist_jax.analysis import calibration
from fmnist_jax.analysis.scores import log_losses, macro_scores, score


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


def draw(sizes, distinct=None):
    """Logits and labels of classes of these sizes, with few distinct logits or without ties."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    logits = rng.normal(size=(len(labels), len(sizes)))
    logits[np.arange(len(labels)), labels] += 1.5
    if distinct is not None:
        logits = logits[rng.integers(distinct, size=len(labels))]
    return logits.astype(np.float32), labels


def probabilities(logits):
    exponentials = np.exp(logits.astype(np.float64))
    return exponentials / exponentials.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("distinct", [None, 9])
@pytest.mark.parametrize("sizes", [(200, 60, 7, 1), (90, 12), (50, 50, 50)])
def test_macro_scores_are_those_of_sklearn(sizes, distinct):
    logits, labels = draw(sizes, distinct)
    predicted, ours = logits.argmax(axis=1), macro_scores(logits, labels)
    one_sided = probabilities(logits)[:, 1] if len(sizes) == 2 else probabilities(logits)
    expected = {
        "balanced_accuracy": balanced_accuracy_score(labels, predicted),
        "macro_f1": f1_score(labels, predicted, average="macro"),
        "auc": roc_auc_score(labels, one_sided, multi_class="ovr", average="macro"),
    }
    assert {name: one.value for name, one in ours.items()} == pytest.approx(expected, rel=1e-12)
    json.dumps(ours)


def test_classes_without_examples_are_left_out_of_means():
    logits, labels = draw((60, 30, 9, 40))
    kept = np.isin(labels, (0, 2))
    logits, labels = logits[kept], labels[kept]
    predicted, ours = logits.argmax(axis=1), macro_scores(logits, labels)
    assert {1, 3} & set(predicted)
    recalls = [np.mean(predicted[labels == c] == c) for c in (0, 2)]
    assert ours["balanced_accuracy"].value == pytest.approx(np.mean(recalls))
    f1 = f1_score(labels, predicted, labels=[0, 2], average="macro")
    assert ours["macro_f1"].value == pytest.approx(f1)
    areas = []
    for c in (0, 2):
        values = probabilities(logits)[:, c]
        areas.append(np.mean(values[labels == c][:, None] > values[labels != c][None]))
    assert ours["auc"].value == pytest.approx(np.mean(areas))


def test_intervals_are_those_of_wilson_and_the_bootstrap():
    logits, labels = draw((400, 150, 60))
    found: dict[str, Any] = macro_scores(logits, labels)
    rng = np.random.default_rng(1)
    members = [np.flatnonzero(labels == c) for c in range(3)]
    drawn = [
        np.concatenate([rng.choice(positions, len(positions)) for positions in members])
        for _ in range(400)
    ]
    samples: list[Any] = [macro_scores(logits[rows], labels[rows]) for rows in drawn]
    for name in ("macro_f1", "auc"):
        value, low, high = found[name]
        odds = np.log([low / (1 - low), value / (1 - value), high / (1 - high)])
        np.testing.assert_allclose(odds[1] - odds[0], odds[2] - odds[1])
        error = (odds[2] - odds[1]) / 1.959964 * value * (1 - value)
        std = np.std([one[name].value for one in samples], ddof=1)
        assert error == pytest.approx(std, rel=0.1)

    value, low, high = found["balanced_accuracy"]
    hits = np.array([np.sum(logits[rows].argmax(axis=1) == c) for c, rows in enumerate(members)])
    counts = np.array([400, 150, 60])
    lows, highs = proportion_confint(hits, counts, method="wilson")
    half = np.sqrt(np.sum((hits / counts - lows) ** 2)) / 3
    np.testing.assert_allclose(low, value - half)
    half = np.sqrt(np.sum((highs - hits / counts) ** 2)) / 3
    np.testing.assert_allclose(high, value + half)


@pytest.mark.parametrize(
    ("logits", "labels", "values"),
    [
        ([[1.0, 0.0]] * 3, [0, 0, 0], (1.0, 1.0, None)),  # a single class
        ([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]], [0, 0, 1, 1], (1.0, 1.0, 1.0)),
        ([[1.0, 0.0]] * 4, [0, 0, 0, 1], (0.5, 3 / 7, 0.5)),  # one image of a class
        ([[1.0, 0.0]] * 4, [0, 0, 1, 1], (0.5, 1 / 3, 0.5)),  # all treated alike
    ],
)
def test_undefined_intervals_are_none(logits, labels, values):
    accuracy: Any
    accuracy, f1, auc = macro_scores(logits, labels).values()
    assert (accuracy.value, f1.value, auc.value) == pytest.approx(values)
    assert accuracy.low < accuracy.value <= accuracy.high <= 1
    assert f1[1:] == auc[1:] == (None, None)


VALID = np.zeros((2, 3))


@pytest.mark.parametrize(
    "function",
    [
        log_losses,
        macro_scores,
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
