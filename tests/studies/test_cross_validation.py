"""Cross-validation: no network sees the images that it judges."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

import fmnist_jax as fm
from fmnist_jax.errors import ConfigError
from fmnist_jax.studies import cross_validation
from fmnist_jax.studies.cross_validation import cross_validate, train_network
from tests.small import Linear


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
    crossed = cross_validate(
        5, images, labels, images[:7], model=Memory(), folds=3, epochs=2, batch_size=8
    )
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

    def record(seed, images, labels, examples, **options):
        states: list[np.ndarray] = []
        folds.append((seed, examples, states))
        for state in train_network(seed, images, labels, examples, **options):
            states.append(np.asarray(fm.predict(state.variables, images, model=Linear())))
            yield state

    monkeypatch.setattr(cross_validation, "train_network", record)
    texts = []

    class Recorder(fm.Hook):
        def message(self, text):
            texts.append(text)

    crossed = cross_validate(
        2**32 - 1, tiny.train_images, tiny.train_labels, tiny.test_images, model=Linear(),
        folds=2, epochs=3, batch_size=16, hooks=[Recorder()],
    )  # fmt: skip
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
    def run(seed):
        return cross_validate(
            seed, tiny.train_images, tiny.train_labels % 2, tiny.test_images,
            model=Linear(num_classes=2), folds=2, epochs=1, batch_size=16,
        ).logits  # fmt: skip

    first = run(0)
    np.testing.assert_array_equal(first, run(0))
    assert not np.array_equal(first, run(1))


def test_each_epoch_takes_all_its_steps(tiny):
    images, labels = jnp.asarray(tiny.train_images), jnp.asarray(tiny.train_labels)
    examples = np.arange(40, dtype=np.int32)
    states = train_network(0, images, labels, examples, model=Linear(), epochs=2, batch_size=16)
    assert [int(state.step) for state in states] == [3, 6]


@pytest.mark.parametrize(("folds", "epochs"), [(1, 1), (31, 1), (2, 0)])
def test_invalid_settings_are_named(folds, epochs, tiny):
    labels = np.repeat([0, 1], 30).astype(np.int32)
    with pytest.raises(ConfigError, match=rf"folds is {folds}; .* 2 to 30|epochs is 0"):
        cross_validate(
            0,
            tiny.train_images,
            labels,
            tiny.test_images,
            model=Linear(),
            folds=folds,
            epochs=epochs,
        )
