"""Planted label errors are found; the definitions match plain loops."""

import numpy as np
import pytest
from scipy.special import softmax

from fmnist_jax.analysis.label_issues import find_label_issues, forgetting_events


def problem(seed, num_wrong, confidence=7.0):
    """Logits of a good but imperfect classifier, and labels of which some were replaced."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 5, 2000)
    logits = rng.normal(size=(2000, 5)).astype(np.float32)
    logits[np.arange(2000), truth] += confidence
    wrong = rng.choice(2000, num_wrong, replace=False)
    labels = truth.copy()
    labels[wrong] = (truth[wrong] + rng.integers(1, 5, num_wrong)) % 5
    return logits, labels, wrong, truth


def test_planted_label_errors_come_first():
    logits, labels, wrong, truth = problem(0, 100)
    found = find_label_issues(logits, labels)
    assert len(set(found.indices[:100]) & set(wrong)) >= 90
    assert len(found.indices) < 200
    planted = np.isin(found.indices, wrong)
    assert np.mean(found.other[planted] == truth[found.indices[planted]]) > 0.95
    assert len(find_label_issues(*problem(0, 0, confidence=20.0)[:2]).indices) == 0


def test_label_issues_match_their_definition():
    logits, labels, _, _ = problem(1, 300, confidence=2.0)
    labels[labels == 3] = 2  # class 3 has no images, so it has no threshold
    found = find_label_issues(logits, labels)
    p = softmax(logits.astype(np.float64), axis=1)
    thresholds = {c: p[labels == c, c].mean() for c in (0, 1, 2, 4)}
    expected = []
    for i, label in enumerate(labels):
        others = [(p[i, c], c) for c in thresholds if c != label and p[i, c] >= thresholds[c]]
        if p[i, label] < thresholds[label] and others:
            highest, other = max(others)
            expected.append((p[i, label] - highest, i, label, other))
    expected.sort()
    assert len(expected) > 100
    assert [row[1:] for row in expected] == list(
        zip(found.indices, found.given, found.other, strict=True)
    )
    np.testing.assert_allclose(
        found.given_probability - found.other_probability, [row[0] for row in expected]
    )


def test_invalid_labels_are_named():
    with pytest.raises(ValueError, match="labels contain 3; they must be from 0 to 2"):
        find_label_issues(np.zeros((2, 3)), np.array([0, 3]))


def test_forgetting_events_are_counted():
    history = np.random.default_rng(2).random((7, 200)) < 0.6
    expected = [
        "".join("1" if correct else "0" for correct in column).count("10") for column in history.T
    ]
    np.testing.assert_array_equal(forgetting_events(history), expected)
    assert forgetting_events(history[:1]).tolist() == [0] * 200
