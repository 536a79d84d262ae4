"""Cross-validation: no network sees the images that it judges."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

import fmnist_jax as fm
from fmnist_jax.errors import ConfigError
from fmnist_jax.studies import cross_validation
from fmnist_jax.studies.cross_validation import cross_validate, train_without
from tests.small import LINEAR, Linear


def make_run(arch, seed=0, epochs=1, batch_size=16):
    recipe = fm.Recipe(arch=arch, epochs=epochs, batch_size=batch_size, schedule="cosine")
    return fm.Run(recipe=recipe, workdir=Path(), seed=seed)


@dataclasses.dataclass(frozen=True)
class Memory:
    """Learns the logits of each image separately, by its first pixel."""

    def init(self, key, images, train):
        return {"params": {"table": np.zeros((60, 2), np.float32)}}

    def apply(self, variables, images, *, train, rngs=None):
        row = (images[:, 0, 0, 0] * 255).round().astype(int)
        return variables["params"]["table"][row]


def test_no_network_is_trained_on_its_own_fold(tiny):
    images = tiny.train_images.copy()
    images[:, 0, 0] = np.arange(60)
    labels = np.random.default_rng(3).permutation(np.repeat([0, 1], 30)).astype(np.int32)
    data = fm.Dataset(images, labels, images[:7], labels[:7], ("a", "b"))
    crossed = cross_validate(make_run(f"{__name__}:Memory", 5, epochs=2, batch_size=8), data, 3)
    # Untouched rows of the table, for every image.
    np.testing.assert_array_equal(crossed.logits, 0)
    assert crossed.logits.shape == (60, 2)
    assert crossed.test_logits.shape == (3, 7, 2)
    # Each of the seven was seen by two of the three networks, which know its label.
    seen = np.any(crossed.test_logits != 0, axis=2)
    assert seen.sum(axis=0).tolist() == [2] * 7
    correct = crossed.test_logits.argmax(axis=2) == labels[:7]
    assert correct[seen].all()
    assert crossed.learned.all()
    assert not crossed.forgotten.any()


def test_results_are_those_of_networks_trained_fold_by_fold(tiny, monkeypatch):
    """The order of out-of-fold logits, and counts of forgetting, by a direct computation."""
    folds = []

    def record(run, dataset, excluded):
        states: list[np.ndarray] = []
        folds.append((run.seed, np.setdiff1d(np.arange(60), excluded), states))
        for state in train_without(run, dataset, excluded):
            logits = fm.predict(state.variables, dataset.train_images, model=Linear())
            states.append(np.asarray(logits))
            yield state

    monkeypatch.setattr(cross_validation, "train_without", record)
    texts = []

    class Recorder(fm.Hook):
        def message(self, text):
            texts.append(text)

    run = make_run(LINEAR, 2**32 - 1, epochs=3)
    crossed = cross_validate(run, tiny, 2, hooks=[Recorder()])
    assert [seed for seed, _, _ in folds] == [2**32 - 1, 0]
    assert sorted(np.concatenate([examples for _, examples, _ in folds])) == list(range(60))
    forgotten, learned = np.zeros(60, int), np.zeros(60, bool)
    for _, examples, states in folds:
        outside = np.setdiff1d(np.arange(60), examples)
        np.testing.assert_array_equal(crossed.logits[outside], states[-1][outside])
        correct = np.array([logits.argmax(axis=1) == tiny.train_labels for logits in states])
        for example in examples:
            history = correct[:, example]
            forgotten[example] += sum(history[:-1] & ~history[1:])
            learned[example] |= history.any()
        # Stratified: each class has half of its images in each fold, up to one.
        classes = np.bincount(tiny.train_labels, minlength=10)
        inside = np.bincount(tiny.train_labels[examples], minlength=10)
        assert (np.abs(inside - classes / 2) <= 1).all()
    np.testing.assert_array_equal(crossed.forgotten, forgotten)
    np.testing.assert_array_equal(crossed.learned, learned)
    assert len(texts) == 6
    assert texts[4].startswith("fold 2 of 2, epoch 2 of 3: accuracy ")


def test_results_are_reproduced_from_their_seed(tiny):
    first = cross_validate(make_run(LINEAR, 0), tiny, 2).logits
    np.testing.assert_array_equal(first, cross_validate(make_run(LINEAR, 0), tiny, 2).logits)
    assert not np.array_equal(first, cross_validate(make_run(LINEAR, 1), tiny, 2).logits)


def test_each_epoch_takes_all_its_steps_on_the_images_left(tiny):
    run = make_run(LINEAR, epochs=2)
    states = train_without(run, tiny, np.arange(40, 60))
    assert [int(state.step) for state in states] == [3, 6]


@pytest.mark.parametrize("folds", [1, 31])
def test_invalid_numbers_of_folds_are_named(folds, tiny):
    data = dataclasses.replace(tiny, train_labels=np.repeat([0, 1], 30))
    with pytest.raises(ConfigError, match=rf"folds is {folds}; .* 2 to 30"):
        cross_validate(make_run(LINEAR), data, folds)
