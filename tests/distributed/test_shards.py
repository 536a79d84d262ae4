"""Shards of a batch: what they compute on one device. `test_mesh.py` has several."""

import dataclasses
import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fmnist_jax as fm
from fmnist_jax.data.batches import scale
from fmnist_jax.errors import ConfigError
from fmnist_jax.train.layout import Layout
from fmnist_jax.train.loop import read_step
from fmnist_jax.train.metrics import cross_entropy
from fmnist_jax.train.step import compute_grads
from tests.conftest import train_step
from tests.small import Linear, Small
from tests.train.test_step import Normalized, make_batch

CONFIG = fm.StepConfig(model=Small(), tx=optax.sgd(0.1), batch_size=16, layout=fm.Shards(4))
NO_DROPOUT = fm.Hyperparams(dropout=0.0)


@pytest.mark.parametrize("microbatch_size", [None, 2])
def test_gradients_are_those_of_the_mean_loss(microbatch_size, getkey, tiny):
    state = fm.create_train_state(getkey(), CONFIG)
    # The last shard has one example, so a mean of the shards' means would be wrong.
    batch = make_batch(tiny, 16, mask=jnp.arange(16) < 13)
    config = dataclasses.replace(CONFIG, microbatch_size=microbatch_size)
    found = jax.jit(functools.partial(compute_grads, config=config))(
        state, batch, getkey(), NO_DROPOUT
    )

    @jax.jit
    @jax.value_and_grad
    def expected(params):
        logits: Any = Small().apply({"params": params}, batch.images, train=False)
        return jnp.sum(batch.mask * cross_entropy(logits, batch.labels)) / 13

    loss, grads = expected(state.params)
    chex.assert_trees_all_close(found.grads, grads, rtol=1e-4, atol=1e-6)
    chex.assert_shape(found.losses, (16,))
    np.testing.assert_allclose(found.metrics.loss, 13 * loss, rtol=1e-5)
    logits: Any = Small().apply({"params": state.params}, batch.images, train=False)
    assert found.metrics.correct == np.sum((logits.argmax(axis=1) == batch.labels)[:13])
    assert (found.metrics.num_examples, found.metrics.finite_steps) == (13, 1)


def test_each_shard_has_its_own_dropout(getkey, sample):
    config = dataclasses.replace(CONFIG, batch_size=2, layout=fm.Shards(2))
    batch = fm.Batch(
        scale(jnp.asarray(sample.train_images[[0, 0]])), jnp.zeros(2, int), jnp.ones(2, bool)
    )
    state = fm.create_train_state(getkey(), config)
    losses = compute_grads(state, batch, getkey(), config=config).losses
    assert losses[0] != losses[1]


def test_batch_statistics_are_averaged_over_shards(getkey, tiny):
    config = dataclasses.replace(CONFIG, model=Normalized())
    state, batch = fm.create_train_state(getkey(), config), make_batch(tiny, 16)
    result, _ = train_step(state, batch, getkey(), config=config)
    updated = [
        Normalized().apply(
            state.variables, batch.images[start : start + 4], train=True, mutable=["batch_stats"]
        )[1]
        for start in (0, 4, 8, 12)
    ]
    expected = jax.tree.map(lambda *leaves: np.mean(leaves, axis=0), *updated)
    chex.assert_trees_all_close(result.model_state, expected, rtol=1e-5, atol=1e-6)


def test_a_loss_that_is_not_finite_is_counted_as_such(getkey, tiny):
    state = fm.create_train_state(getkey(), CONFIG)
    batch = make_batch(tiny, 16)
    broken = batch._replace(images=batch.images.at[5].set(jnp.nan))
    for images, finite in ((batch, 1), (broken, 0)):
        _, metrics = train_step(state, images, getkey(), config=CONFIG)
        assert metrics.finite_steps == finite


def test_shards_read_the_batch(tiny):
    inputs = fm.TrainInputs(
        jnp.asarray(tiny.train_images), jnp.asarray(tiny.train_labels), fm.create_streams(0),
        examples=jnp.arange(60)[::-1],
    )  # fmt: skip
    config = dataclasses.replace(CONFIG, augment=fm.AUGMENTATIONS["keras"])
    found, expected = (
        read_step(inputs, jnp.int32(7), config=dataclasses.replace(config, layout=layout))
        for layout in (fm.Shards(4), Layout())
    )
    chex.assert_trees_all_equal(found.examples, expected.examples)
    chex.assert_trees_all_close(found.batch, expected.batch, atol=1e-6)


def test_numbers_that_do_not_divide_are_refused(getkey, tiny):
    for shards in (3, 32, 0):
        with pytest.raises(ConfigError, match=f"shards is {shards}, .* one of 1, 2, 4, 8, 16"):
            dataclasses.replace(CONFIG, layout=fm.Shards(shards))
    with pytest.raises(ConfigError, match="microbatch_size is 8, but the size of a shard is 12"):
        fm.Recipe(arch="small_dropout", epochs=1, batch_size=24, shards=2, microbatch_size=8)
    config = dataclasses.replace(CONFIG, model=Linear())
    state = fm.create_train_state(getkey(), config)
    with pytest.raises(ValueError, match="the batch has 6 examples; expected a multiple of the 4"):
        fm.train_step(state, make_batch(tiny, 6), getkey(), config=config)
