"""The report's numbers against their definitions."""

import numpy as np

from fmnist_jax.analysis.scores import score


def test_scores():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(200, 5)).astype(np.float32)
    logits[:, 2] -= 20
    # Class 2 is neither a label nor predicted, class 4 is no label.
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
