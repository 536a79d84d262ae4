"""Planted label errors are found; the definitions against plain loops."""

import dataclasses

import numpy as np
import pytest
from scipy.special import softmax

import fmnist_jax as fm
from fmnist_jax.studies import label_issues as suspects
from tests.small import Linear


def problem(seed, num_wrong, sure=7.0):
    """Logits of a good but not perfect classifier, and labels of which some were exchanged."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 5, 2000)
    logits = rng.normal(size=(2000, 5)).astype(np.float32)
    logits[np.arange(2000), truth] += sure
    wrong = rng.choice(2000, num_wrong, replace=False)
    labels = truth.copy()
    labels[wrong] = (truth[wrong] + rng.integers(1, 5, num_wrong)) % 5
    return logits, labels, wrong, truth


def test_planted_label_errors_are_at_the_top():
    logits, labels, wrong, truth = problem(0, 100)
    found = suspects.find_suspects(logits, labels)
    top = found.indices[:100]
    assert len(set(top) & set(wrong)) >= 90
    assert len(found.indices) < 200
    at = np.isin(found.indices, wrong)
    assert np.mean(found.other[at] == truth[found.indices[at]]) > 0.95
    assert len(suspects.find_suspects(*problem(0, 0, sure=20.0)[:2]).indices) == 0


def test_suspects_are_those_of_the_definition():
    logits, labels, _, _ = problem(1, 300, sure=2.0)
    labels[labels == 3] = 2  # class 3 has no image, so it has no threshold
    found = suspects.find_suspects(logits, labels)
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


@pytest.mark.parametrize("shapes", [((4, 3), (5,)), ((4,), (4,)), ((0, 3), (0,))])
def test_shapes_that_do_not_fit(shapes):
    with pytest.raises(ValueError, match="logits of shape"):
        suspects.find_suspects(np.zeros(shapes[0]), np.zeros(shapes[1], int))


def test_forgetting_events_are_counted():
    history = np.random.default_rng(2).random((7, 200)) < 0.6
    expected = [
        "".join("1" if right else "0" for right in column).count("10") for column in history.T
    ]
    np.testing.assert_array_equal(suspects.forgetting_events(history), expected)
    assert suspects.forgetting_events(history[:1]).tolist() == [0] * 200


def test_cross_validation_never_sees_the_image_it_judges(tiny):
    """With random labels a network knows what it was trained on, and guesses the rest."""

    @dataclasses.dataclass(frozen=True)
    class Memory:
        """Learns one logit of its own for each image, by the image's first pixel."""

        def init(self, key, images, train):
            return {"params": {"table": np.zeros((60, 2), np.float32)}}

        def apply(self, variables, images, *, train, rngs=None):
            row = (images[:, 0, 0, 0] * 255).round().astype(int)
            return variables["params"]["table"][row]

    images = tiny.train_images.copy()
    images[:, 0, 0] = np.arange(60)
    labels = np.random.default_rng(3).permutation(np.repeat([0, 1], 30)).astype(np.int32)
    crossed = suspects.cross_validate(
        5, images, labels, images[:7], model=Memory(), folds=3, epochs=2, batch_size=8
    )
    # Untouched rows of the table: nobody was trained on the images that it judged.
    np.testing.assert_array_equal(crossed.logits, 0)
    assert crossed.test_logits.shape == (3, 7, 2)
    # Each of the seven was seen by two of the three networks, which know its label.
    seen = np.any(crossed.test_logits != 0, axis=2)
    assert seen.sum(axis=0).tolist() == [2] * 7
    right = crossed.test_logits.argmax(axis=2) == labels[:7]
    assert right[seen].all()
    assert crossed.learned.all()
    assert not crossed.forgotten.any()


def test_a_seed_is_reproduced_and_matters(tiny):
    def run(seed):
        return suspects.cross_validate(
            seed, tiny.train_images, tiny.train_labels % 2, tiny.test_images,
            model=Linear(num_classes=2), folds=2, epochs=1, batch_size=16,
        ).logits  # fmt: skip

    first = run(0)
    np.testing.assert_array_equal(first, run(0))
    assert not np.array_equal(first, run(1))


@pytest.mark.parametrize(("folds", "epochs"), [(1, 1), (31, 1), (2, 0)])
def test_settings_that_cannot_be(folds, epochs, tiny):
    labels = np.repeat([0, 1], 30).astype(np.int32)
    with pytest.raises(fm.ConfigError, match=r"folds is|epochs is 0"):
        suspects.cross_validate(
            0, tiny.train_images, labels, tiny.test_images, model=None, folds=folds, epochs=epochs
        )
