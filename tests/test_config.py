"""Settings check themselves."""

import dataclasses
from pathlib import Path

import pytest

import fmnist_jax as fm

GOOD = fm.Recipe(arch="same_3x3", epochs=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs is 0; it must be a whole number of at least 1"),
        ({"epochs": 1.5}, "epochs is 1.5"),
        ({"epochs": True}, "epochs is True"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0; it must be a finite number above 0"),
        ({"learning_rate": "0.1"}, "learning_rate is '0.1'; it must be a number"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"optimizer": "lion"}, "optimizer is 'lion'; choose one of adam, rmsprop, sgd"),
        ({"dtype": "float16"}, "dtype is 'float16'; choose one of float32, bfloat16"),
        ({"schedule": "step"}, "schedule is 'step'; choose one of constant, cosine, one_cycle"),
        ({"augmentation": "mixup"}, "augmentation is 'mixup'; choose one of none, keras"),
        ({"image_size": 0}, "image_size is 0"),
        ({"val_fraction": 1.0}, "val_fraction is 1.0; it must be at least 0 and below 1"),
        ({"val_fraction": -0.1}, "val_fraction is -0.1"),
        ({"val_fraction": float("nan")}, "val_fraction is nan"),
        ({"dropout": 1.0}, "dropout is 1.0; it must be at least 0 and below 1"),
        ({"label_smoothing": -0.1}, "label_smoothing is -0.1"),
        ({"weight_decay": float("inf")}, "weight_decay is inf; it must be a finite number from 0"),
        ({"weight_decay": "0.1"}, "weight_decay is '0.1'; it must be a number"),
        ({"augmentation_strength": 0.5}, "there is no augmentation"),
        ({"augmentation": "keras", "augmentation_strength": -1}, "augmentation_strength is -1"),
    ],
)
def test_recipe(change, message):
    with pytest.raises(fm.ConfigError, match=message):
        dataclasses.replace(GOOD, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**32}, "seed is 4294967296; it must be a whole number from 0 to"),
        ({"seed": 0.5}, "seed is 0.5"),
        ({"train_examples": 0}, "train_examples is 0"),
        ({"stream_seeds": {"data": 1}}, "a stream is 'data'; choose one of init, split"),
        ({"stream_seeds": {"init": -1}}, "the seed of init is -1"),
        ({"exclude": [3, -1]}, "exclude has -1"),
        ({"exclude": [0.5]}, "exclude has 0.5"),
        ({"exclude": ["3"]}, "exclude has '3'"),
    ],
)
def test_run(change, message, tmp_path):
    run = fm.Run(recipe=GOOD, workdir=tmp_path)
    with pytest.raises(fm.ConfigError, match=message):
        dataclasses.replace(run, **change)


def test_a_workdir_may_be_text():
    assert fm.Run(recipe=GOOD, workdir="runs/a").workdir == Path("runs/a")  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_streams_refuse_seeds_that_jax_would_fold_together(seed):
    with pytest.raises(fm.ConfigError, match="seed is"):
        fm.create_streams(seed)


def test_there_is_a_recipe_for_every_network():
    assert list(fm.RECIPES) == list(fm.ARCHS)
    for name, recipe in fm.RECIPES.items():
        assert recipe.arch == name
        assert recipe.source
        assert recipe.claim
        assert recipe.open_choices
