"""The learning rate range test."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fmnist_jax as fm
from fmnist_jax.data.batches import read_batch
from fmnist_jax.errors import ConfigError
from fmnist_jax.train import rate_finder
from tests.conftest import train_step
from tests.small import Small


@pytest.fixture
def arguments(tiny):
    streams = fm.create_streams(0)
    config = fm.StepConfig(model=Small(), tx=fm.create_optimizer("adam"), batch_size=20)
    state = fm.create_train_state(streams.init, config)
    images, labels = jnp.asarray(tiny.train_images), jnp.asarray(tiny.train_labels)
    return state, fm.TrainInputs(images, labels, streams), config


def test_losses_are_those_of_a_plain_loop_and_the_state_is_untouched(arguments):
    state, inputs, config = arguments
    images, labels, streams, *_ = inputs
    before = jax.tree.map(np.array, state)
    curve = fm.find_learning_rate(state, inputs, config=config, low=1e-3, high=1e-1, num_steps=10)
    chex.assert_trees_all_equal(state, before)

    order = fm.epoch_order(streams.shuffle, 0, jnp.arange(60))
    losses = []
    for rate in np.geomspace(1e-3, 1e-1, 10).astype(np.float32):
        _, batch = read_batch(images, labels, order, state.step, streams, batch_size=20)
        key = jax.random.fold_in(streams.dropout, state.step)
        state, metrics = train_step(state, batch, key, fm.Hyperparams(rate), config=config)
        losses.append(metrics.means()["loss"])
    np.testing.assert_allclose(curve.losses, losses, rtol=1e-5)
    np.testing.assert_allclose(curve.rates, np.geomspace(1e-3, 1e-1, 10), rtol=1e-6)


def test_the_suggestion_is_where_the_loss_falls_fastest(arguments, monkeypatch):
    exponents = np.linspace(-5, 1, 100)
    losses = 2.3 - 1.5 / (1 + np.exp(-8 * (exponents + 2.5))) + 100 * np.maximum(exponents, 0)
    losses[-3:] = np.nan
    monkeypatch.setattr(rate_finder, "_losses", lambda *_, **__: losses.astype(np.float32))
    curve = fm.find_learning_rate(*arguments[:2], config=arguments[2])
    # The average over ten steps lags behind by up to half a decade.
    assert -2.5 < np.log10(curve.suggestion) < -2.0
    assert curve.rates[-1] < 1.5
    assert np.isfinite(curve.smoothed).all()
    monkeypatch.setattr(rate_finder, "_losses", lambda *_, **__: np.linspace(2.3, 3, 100))
    with pytest.raises(ConfigError, match="the loss does not fall at any rate from"):
        fm.find_learning_rate(*arguments[:2], config=arguments[2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"low": 0.0}, "expected 0 < low < high"),
        ({"low": 1.0, "high": 0.1}, "expected 0 < low < high"),
        ({"num_steps": 5}, "num_steps is 5"),
        ({"low": 1e10, "high": 1e12}, "the loss diverged after"),
    ],
)
def test_bad_input_is_refused(options, message, arguments):
    with pytest.raises(ConfigError, match=message):
        fm.find_learning_rate(*arguments[:2], config=arguments[2], **options)


def test_other_images_and_labels_are_refused(arguments):
    state, inputs, config = arguments
    for change, error, message in (
        ({"images": inputs.images / 255}, TypeError, "images are float32"),
        ({"labels": inputs.labels[1:]}, ValueError, "one label per image"),
    ):
        with pytest.raises(error, match=message):
            fm.find_learning_rate(state, inputs._replace(**change), config=config)


def test_an_optimizer_with_its_own_rate_is_refused(arguments):
    state, inputs, config = arguments
    config = dataclasses.replace(config, tx=optax.adam(1e-3))
    state = state._replace(opt_state=config.tx.init(state.params))
    with pytest.raises(ConfigError, match="learning_rate has no effect on this optimizer"):
        fm.find_learning_rate(state, inputs, config=config)
