"""Settings are validated on construction."""

import dataclasses
from pathlib import Path

import chex
import jax
import numpy as np
import pytest

import fmnist_jax as fm
from fmnist_jax.errors import ConfigError
from fmnist_jax.recipes import CLAIMS

GOOD = fm.Recipe(arch="same_3x3", epochs=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs is 0; expected an integer of at least 1"),
        ({"epochs": 1.5}, "epochs is 1.5"),
        ({"epochs": True}, "epochs is True"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0; expected a finite number above 0"),
        ({"learning_rate": "0.1"}, "learning_rate is '0.1'; expected a finite number"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"optimizer": "lion"}, "optimizer is 'lion'; choose one of adam, rmsprop, sgd"),
        ({"dtype": "float16"}, "dtype is 'float16'; choose one of float32, bfloat16"),
        ({"schedule": "step"}, "schedule is 'step'; choose one of constant, cosine, one_cycle"),
        ({"augmentation": "mixup"}, "augmentation is 'mixup'; choose one of none, keras"),
        ({"image_size": 0}, "image_size is 0"),
        ({"shards": 2.0}, "shards is 2.0"),
        ({"microbatch_size": 0}, "microbatch_size is 0"),
        (
            {"microbatch_size": 125, "batch_size": 200},
            "microbatch_size is 125, but batch_size is 200",
        ),
        ({"val_fraction": 1.0}, "val_fraction is 1.0; expected a number in \\[0, 1\\)"),
        ({"val_fraction": -0.1}, "val_fraction is -0.1"),
        ({"val_fraction": float("nan")}, "val_fraction is nan"),
        ({"dropout": 1.0}, "dropout is 1.0; expected a number in \\[0, 1\\)"),
        ({"label_smoothing": -0.1}, "label_smoothing is -0.1"),
        ({"class_weights": "inverse"}, "class_weights is 'inverse'; choose one of none, balanced"),
        ({"class_weights": None}, "class_weights is None"),
        ({"weight_decay": float("inf")}, "weight_decay is inf; expected a finite number"),
        ({"weight_decay": "0.1"}, "weight_decay is '0.1'; expected a finite number"),
        ({"augmentation_strength": 0.5}, "but augmentation is 'none'"),
        ({"augmentation": "keras", "augmentation_strength": -1}, "augmentation_strength is -1"),
    ],
)
def test_invalid_recipes_are_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(GOOD, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**32}, "seed is 4294967296; expected an integer in \\[0, 2"),
        ({"seed": 0.5}, "seed is 0.5"),
        ({"train_examples": 0}, "train_examples is 0"),
        ({"exclude": [3, -1]}, "exclude has -1"),
        ({"exclude": [0.5]}, "exclude has 0.5"),
        ({"exclude": ["3"]}, "exclude has '3'"),
        ({"checkpoint_every": None}, "checkpoint_every is None"),
    ],
)
def test_invalid_runs_are_refused(change, message, tmp_path):
    run = fm.Run(recipe=GOOD, workdir=tmp_path)
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(run, **change)


def test_workdir_accepts_a_string():
    assert fm.Run(recipe=GOOD, workdir="runs/a").workdir == Path("runs/a")  # type: ignore[arg-type]


@pytest.mark.parametrize("seed", [-1, 2**32, np.int64(2**32)])
def test_seeds_of_more_than_32_bits_are_refused(seed):
    with pytest.raises(ConfigError, match="seed is"):
        fm.create_streams(seed)


def test_streams_are_those_of_threefry_whatever_the_default():
    expected = jax.random.key_data(fm.create_streams(1).dropout)
    with jax.default_prng_impl("rbg"):
        streams = fm.create_streams(np.int64(1))
    chex.assert_trees_all_equal(jax.random.key_data(streams.dropout), expected)


def test_every_network_has_a_recipe_and_every_project_a_claim():
    assert {recipe.arch for recipe in fm.RECIPES.values()} == set(fm.ARCHS)
    for name, claim in CLAIMS.items():
        assert fm.RECIPES[name].arch == name
        assert claim.source
        assert claim.text
        assert claim.open_choices
