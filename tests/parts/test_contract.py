"""Parts that do not do what they must are refused before anything is compiled."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest

import fmnist_jax as fm
from fmnist_jax.errors import ConfigError
from fmnist_jax.runs.fit import fit_plan
from fmnist_jax.runs.plan import create_plan
from tests.small import Small


class Net(nn.Module):
    """The base of networks with one fault each."""

    num_classes: int = 10

    @nn.compact
    def __call__(self, images, *, train):
        return nn.Dense(self.num_classes)(self.change(images.reshape(len(images), -1)))

    def change(self, x):
        return x


class NoTrain(nn.Module):
    @nn.compact
    def __call__(self, images):
        return nn.Dense(10)(images.reshape(len(images), -1))


class NoParameters(nn.Module):
    def __call__(self, images, *, train):
        return images.reshape(len(images), -1)[:, :10]


class Noise(Net):
    def change(self, x):
        return x + jax.random.normal(self.make_rng("noise"), x.shape)


class AlwaysDropout(Net):
    def change(self, x):
        return nn.Dropout(0.5, deterministic=False)(x)


class Whole(nn.Module):
    @nn.compact
    def __call__(self, images, *, train):
        table = self.param("table", lambda key: jnp.zeros((1, 10), jnp.int32))
        return images.mean(axis=(1, 2)) + table


class FiveOutputs(nn.Module):
    @nn.compact
    def __call__(self, images, *, train):
        return nn.Dense(5)(images.reshape(len(images), -1))


class Fails(Net):
    def change(self, x):
        return x @ jnp.zeros((3, 3))


class Words(Net):
    """Its output is a tuple."""

    @nn.compact
    def __call__(self, images, *, train):
        return super().__call__(images, train=train), 0


class Identity:
    def init(self, key, images, *, train):
        return {"params": {"w": jnp.zeros((10,))}}

    def apply(self, variables, images, *, train, rngs=None):
        return images.mean(axis=(1, 2)) + variables["params"]["w"]


@dataclasses.dataclass
class Unhashable(Identity):
    width: int = 1


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (NoTrain(), r"NoTrain in init fails .*unexpected keyword argument 'train'"),
        (NoParameters(), "NoParameters has no parameters"),
        (Noise(), "Noise with train=True draws from a random stream that it is not given"),
        (AlwaysDropout(), "AlwaysDropout with train=False draws from a random stream"),
        (Whole(), "parameter table of Whole is int32; expected float"),
        (
            FiveOutputs(),
            r"maps float32\[2, 28, 28, 1\] to float32\[2, 5\]; expected float32\[2, 10",
        ),
        (Fails(), r"Fails in init fails for .*float32\[1, 28, 28, 1\]: TypeError"),
        (Words(), "to tuple; expected"),
        (Identity(), "Identity compares by identity, .*frozen dataclass"),
        (Unhashable(), "Unhashable does not hash .*frozen dataclass"),
    ],
)
def test_networks_are_checked_in_the_plan(model, message, tiny, tmp_path):
    recipe = fm.Recipe(arch="small_dropout", epochs=1, batch_size=16)
    run = fm.Run(recipe=recipe, workdir=tmp_path / "run")
    with pytest.raises(ConfigError, match=message) as caught:
        fm.fit(run, tiny, hooks=(), model=model)
    assert "\n" not in str(caught.value)
    assert not run.workdir.exists()


def two_arguments(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def with_gamma(logits, labels, gamma=2.0):
    return gamma * two_arguments(logits, labels)


def with_an_if(progress):
    return progress if progress > 0.5 else 1.0


def mean_loss(logits, labels):
    return two_arguments(logits, labels).mean()


def crop(key, epoch, examples, images, strength):
    return images[:, 2:, 2:, None] / 255


@pytest.mark.parametrize(
    ("parts", "settings", "message"),
    [
        ({"loss": two_arguments}, {"label_smoothing": 0.1}, "a third for label_smoothing"),
        ({"loss": with_gamma}, {"label_smoothing": 0.1}, "its third is gamma"),
        ({"schedule": with_an_if}, {}, "with_an_if fails for float32.*TracerBoolConversionError"),
        ({"schedule": lambda progress: progress[None]}, {}, "expected float32"),
        ({}, {"learning_rate": None, "optimizer": "optax:lion"}, "adamw|lion has no learning rate"),
        ({"loss": mean_loss}, {}, "expected one value per example"),
        ({"augment": crop}, {}, "with train=True fails for|expected float32"),
        ({"augment": lambda *_: 0}, {}, "maps .* to int32.*; expected float32.2, 28, 28, 1"),
        ({"augment": lambda key: key}, {}, "fails for"),
        ({"tx": optax.adam(1e-3)}, {}, "learning_rate has no effect .* set it to None"),
        ({}, {"dropout": 0.1}, "he_stack has no dropout"),
        ({}, {"learning_rate": None, "schedule": "cosine"}, "learning_rate is None; a schedule"),
    ],
)
def test_other_parts_are_checked_in_the_plan(parts, settings, message, tiny, tmp_path):
    recipe = fm.Recipe(arch="he_stack", epochs=1, batch_size=16, **settings)
    with pytest.raises((ConfigError, ValueError), match=message) as caught:
        create_plan(fm.Run(recipe=recipe, workdir=tmp_path), tiny, **parts)
    assert "\n" not in str(caught.value)


def test_a_plan_whose_model_was_replaced_is_refused(tiny, tmp_path):
    """Its folder would name another network."""
    recipe = fm.Recipe(arch="small_dropout", epochs=1, batch_size=16)
    plan = create_plan(fm.Run(recipe=recipe, workdir=tmp_path / "run"), tiny)
    config = dataclasses.replace(plan.config, model=Small())
    with pytest.raises(ConfigError, match="the model of the plan is not small_dropout"):
        fit_plan(dataclasses.replace(plan, config=config), hooks=())
    assert not (tmp_path / "run").exists()


def test_an_optimizer_with_its_own_rate_trains(tiny, tmp_path):
    recipe = fm.Recipe(arch="small_dropout", epochs=1, batch_size=16, learning_rate=None)
    run = fm.Run(recipe=recipe, workdir=tmp_path)
    result = fm.fit(run, tiny, hooks=(), model=Small(), tx=optax.adam(1e-3))
    assert result.report["steps"] == 4
    assert result.report["recipe"]["learning_rate"] is None
