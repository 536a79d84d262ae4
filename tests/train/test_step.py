"""The step: gradients, masks, microbatches, dtypes and batch statistics."""

import dataclasses
import functools
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fmnist_jax as fm
from fmnist_jax.data.batches import scale
from fmnist_jax.errors import ConfigError
from fmnist_jax.train.metrics import cross_entropy, merge
from fmnist_jax.train.step import WeightedLoss, compute_grads
from tests.conftest import train_step
from tests.small import Linear, Small

PLAIN = fm.StepConfig(model=Small(), tx=optax.sgd(0.1, momentum=0.9))
NO_DROPOUT = fm.Hyperparams(dropout=0.0)


def make_batch(dataset, num_examples, mask=None):
    mask = jnp.ones(num_examples, bool) if mask is None else mask
    images = scale(jnp.asarray(dataset.train_images[:num_examples]))
    return fm.Batch(images, jnp.asarray(dataset.train_labels[:num_examples]), mask)


def test_every_parameter_changes(getkey, tiny):
    before = fm.create_train_state(getkey(), PLAIN)
    after, _ = train_step(before, make_batch(tiny, 16), getkey(), config=PLAIN)
    assert int(after.step) == 1
    for old, new in zip(jax.tree.leaves(before.params), jax.tree.leaves(after.params), strict=True):
        chex.assert_equal_shape([old, new])
        assert not np.array_equal(old, new)
    chex.assert_tree_all_finite(after.params)


def test_masked_examples_have_no_influence(getkey, tiny):
    state, key = fm.create_train_state(getkey(), PLAIN), getkey()
    batch = make_batch(tiny, 5)
    rows = jnp.array([0, 1, 2, 3, 4, 0, 0])
    padded = fm.Batch(batch.images[rows], batch.labels[rows], jnp.arange(7) < 5)
    expected, expected_metrics = train_step(state, batch, key, NO_DROPOUT, config=PLAIN)
    result, metrics = train_step(state, padded, key, NO_DROPOUT, config=PLAIN)
    chex.assert_trees_all_close(result.params, expected.params, rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(metrics, expected_metrics, rtol=1e-6)


@pytest.mark.parametrize("microbatch_size", [None, 1, 3, 4, 10])
def test_gradients_are_those_of_the_mean_loss(microbatch_size, getkey, tiny):
    state = fm.create_train_state(getkey(), PLAIN)
    batch = make_batch(tiny, 10, mask=jnp.arange(10) != 4)
    config = dataclasses.replace(PLAIN, microbatch_size=microbatch_size)
    grads, _, metrics, losses = jax.jit(functools.partial(compute_grads, config=config))(
        state, batch, getkey(), NO_DROPOUT
    )

    @jax.jit
    @jax.value_and_grad
    def expected(params):
        logits: Any = Small().apply({"params": params}, batch.images, train=False)
        return jnp.sum(batch.mask * cross_entropy(logits, batch.labels)) / 9

    loss, expected_grads = expected(state.params)
    chex.assert_trees_all_close(grads, expected_grads, rtol=1e-4, atol=1e-6)
    chex.assert_shape(losses, (10,))
    np.testing.assert_allclose(jnp.sum(batch.mask * losses) / 9, loss, rtol=1e-5)
    logits: Any = Small().apply({"params": state.params}, batch.images, train=False)
    np.testing.assert_allclose(cross_entropy(logits, batch.labels), losses, rtol=1e-4)
    assert metrics.correct == jnp.sum(batch.mask & (logits.argmax(axis=1) == batch.labels))


WEIGHTS = (0.5, 3.0, 0.0, 1.0, 0.25, 2.0, 1.0, 7.0, 1.5, 0.125)


@pytest.mark.parametrize("smoothing", [None, 0.2])
@pytest.mark.parametrize(
    "change",
    [
        {},
        {"microbatch_size": 3},
        {"layout": fm.Shards(4)},
        {"layout": fm.Shards(4), "microbatch_size": 2},
    ],
)
def test_a_step_with_class_weights_follows_plain_numpy(change, smoothing, getkey, tiny):
    """The gradient of a linear network, written out."""
    config = fm.StepConfig(
        model=Linear(), tx=optax.sgd(0.1), batch_size=16, loss=WeightedLoss(cross_entropy, WEIGHTS),
        **change,
    )  # fmt: skip
    state = fm.create_train_state(getkey(), config)
    batch = make_batch(tiny, 16, mask=jnp.arange(16) < 13)
    hyperparams = fm.Hyperparams(label_smoothing=smoothing)
    after, metrics = train_step(state, batch, getkey(), hyperparams, config=config)

    images = np.asarray(batch.images, np.float64).reshape(16, -1)[:13]
    labels = np.asarray(batch.labels)[:13]
    kernel, bias = (np.asarray(state.params["Dense_0"][name], float) for name in ("kernel", "bias"))
    logits = images @ kernel + bias
    predicted = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    targets = np.eye(10)[labels] * (1 - (smoothing or 0)) + (smoothing or 0) / 10
    weights = np.array(WEIGHTS)[labels]
    errors = weights[:, None] * (predicted - targets) / 13
    moved = jax.tree.map(lambda a, b: (a - b) / 0.1, state.params, after.params)["Dense_0"]
    np.testing.assert_allclose(moved["kernel"], images.T @ errors, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(moved["bias"], errors.sum(axis=0), rtol=1e-3, atol=1e-5)
    losses = -np.sum(targets * np.log(predicted), axis=1)
    np.testing.assert_allclose(metrics.loss, np.sum(weights * losses), rtol=1e-5)
    assert metrics.correct == np.sum(predicted.argmax(axis=1) == labels)


def test_class_weights_are_mapped_over_seeds(tiny):
    config = fm.StepConfig(
        model=Linear(), tx=optax.sgd(0.1), loss=WeightedLoss(cross_entropy, WEIGHTS)
    )
    batch = make_batch(tiny, 12)

    def train(seed):
        state = fm.create_train_state(jax.random.key(seed), config)
        order = jax.random.permutation(jax.random.key(seed), 12)
        drawn = jax.tree.map(lambda leaf: leaf[order[:5]], batch)
        return fm.train_step(state, drawn, jax.random.key(seed), config=config)[0].params

    together = jax.jit(jax.vmap(train))(jnp.arange(2))
    for seed in (0, 1):
        alone = jax.tree.map(lambda leaf, i=seed: leaf[i], together)
        chex.assert_trees_all_close(alone, train(seed), rtol=1e-4, atol=1e-6)


def test_class_weights_name_what_does_not_fit(getkey, tiny):
    def step(loss, smoothing=None):
        config = dataclasses.replace(PLAIN, loss=loss)
        state = fm.create_train_state(getkey(), config)
        hyperparams = fm.Hyperparams(label_smoothing=smoothing)
        fm.train_step(state, make_batch(tiny, 4), getkey(), hyperparams, config=config)

    with pytest.raises(ValueError, match="there are 3 weights for 10 classes"):
        step(WeightedLoss(cross_entropy, (1.0, 2.0, 3.0)))
    with pytest.raises(ConfigError, match="a third for label_smoothing, which is given"):
        step(WeightedLoss(lambda logits, labels: logits[:, 0], WEIGHTS), smoothing=0.1)
    with pytest.raises(ValueError, match=r"the loss has shape \(\); expected one value"):
        step(WeightedLoss(lambda logits, labels: logits.mean(), WEIGHTS))


def test_each_microbatch_has_its_own_dropout(getkey, sample):
    config = dataclasses.replace(PLAIN, microbatch_size=1)
    # The same image twice: the microbatches differ by their dropout alone.
    batch = fm.Batch(
        scale(jnp.asarray(sample.train_images[[0, 0]])), jnp.zeros(2, int), jnp.ones(2, bool)
    )
    state = fm.create_train_state(getkey(), config)
    *_, losses = compute_grads(state, batch, getkey(), config=config)
    assert losses[0] != losses[1]


class Normalized(nn.Module):
    """A network with batch statistics, in plain Flax."""

    @nn.compact
    def __call__(self, images, *, train):
        x = nn.Conv(4, (3, 3), strides=2, use_bias=False)(images)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
        return nn.Dense(10)(x.reshape(len(x), -1))


def test_batch_statistics_follow_a_plain_flax_loop(tiny):
    config = fm.StepConfig(model=Normalized(), tx=optax.sgd(0.05, momentum=0.9), batch_size=15)
    streams = fm.create_streams(0)
    images, labels = jnp.asarray(tiny.train_images), jnp.asarray(tiny.train_labels)
    variables = Normalized().init(streams.init, jnp.zeros((1, 28, 28, 1)), train=False)
    opt_state = config.tx.init(variables["params"])

    @jax.jit
    def flax_step(variables, opt_state, images, labels):
        def loss(params):
            logits, updated = Normalized().apply(
                {"params": params, "batch_stats": variables["batch_stats"]},
                images, train=True, mutable=["batch_stats"],
            )  # fmt: skip
            losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
            return losses.mean(), updated["batch_stats"]

        grads, batch_stats = jax.grad(loss, has_aux=True)(variables["params"])
        updates, opt_state = config.tx.update(grads, opt_state, variables["params"])
        params = optax.apply_updates(variables["params"], updates)
        return {"params": params, "batch_stats": batch_stats}, opt_state

    state = fm.create_train_state(streams.init, config)
    for epoch in range(2):
        order = fm.epoch_order(streams.shuffle, epoch, jnp.arange(60))
        for examples in order.reshape(4, 15):
            pixels = images[examples][..., None] / 255
            variables, opt_state = flax_step(variables, opt_state, pixels, labels[examples])
        inputs = fm.TrainInputs(images, labels, streams, examples=order)
        state, _ = fm.train_steps(state, inputs, 4, config=config)
    chex.assert_trees_all_close(state.variables, dict(variables), rtol=1e-4, atol=1e-5)
    logits = Normalized().apply(variables, images[..., None] / 255, train=False)
    chex.assert_trees_all_close(
        fm.predict(state.variables, images, model=Normalized()), logits, rtol=1e-3, atol=1e-4
    )


def test_batch_statistics_pass_from_microbatch_to_microbatch(getkey, tiny):
    config = fm.StepConfig(model=Normalized(), tx=optax.sgd(0.1), microbatch_size=4)
    state, batch = fm.create_train_state(getkey(), config), make_batch(tiny, 12)
    result, _ = train_step(state, batch, getkey(), config=config)

    @jax.jit
    @functools.partial(jax.grad, has_aux=True)
    def flax_grad(params, batch_stats, images, labels):
        logits, updated = Normalized().apply(
            {"params": params, "batch_stats": batch_stats},
            images, train=True, mutable=["batch_stats"],
        )  # fmt: skip
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), updated["batch_stats"]

    batch_stats, grads = state.model_state["batch_stats"], []
    for start in (0, 4, 8):
        images, labels = batch.images[start : start + 4], batch.labels[start : start + 4]
        grad, batch_stats = flax_grad(state.params, batch_stats, images, labels)
        grads.append(grad)
    params = jax.tree.map(lambda p, a, b, c: p - 0.1 * (a + b + c) / 3, state.params, *grads)
    chex.assert_trees_all_close(result.params, params, rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(
        result.model_state["batch_stats"], dict(batch_stats), rtol=1e-5, atol=1e-6
    )


def test_batch_statistics_do_not_see_the_padding_of_a_microbatch(getkey, tiny):
    config = fm.StepConfig(model=Normalized(), tx=optax.sgd(0.1), microbatch_size=3)
    state = fm.create_train_state(getkey(), config)
    with pytest.raises(
        ValueError, match="microbatch_size is 3 for batches of 8, but the model has"
    ):
        fm.train_step(state, make_batch(tiny, 8), getkey(), config=config)


# Dropout, and batch normalization with tiles.
@pytest.mark.parametrize("name", ["valid_2x2", pytest.param("sprint", marks=pytest.mark.slow)])
def test_bfloat16_is_for_the_network_alone(name, getkey, sample):
    config = fm.StepConfig(model=fm.create_model(name), tx=optax.sgd(0.1))
    batch, key = make_batch(sample, 8), getkey()
    state = fm.create_train_state(getkey(), config)

    def step(dtype, **changes):
        changed = dataclasses.replace(config, dtype=dtype, **changes)
        # A function of its own, because the compared step has the same arguments.
        return jax.jit(lambda *arguments: fm.train_step(*arguments, config=changed))(
            state, batch, key
        )

    exact, exact_metrics = step(jnp.float32)
    half, half_metrics = step(jnp.bfloat16)
    chex.assert_trees_all_equal_dtypes((half, half_metrics), (exact, exact_metrics))
    # Eight bits of mantissa: not the same numbers, but the same to about a hundredth.
    assert float(half_metrics.loss) != float(exact_metrics.loss)
    np.testing.assert_allclose(half_metrics.loss, exact_metrics.loss, rtol=0.03)
    # As near to float32 as XLA's plain operations are in bfloat16.
    plain, _ = step(jnp.bfloat16, optimize=False)
    error, plain_error = (
        float(optax.tree.norm(jax.tree.map(jnp.subtract, exact.params, other.params)))
        for other in (half, plain)
    )
    assert error < 1.5 * plain_error


def test_invalid_batches_and_sizes_are_refused(getkey, tiny):
    config = fm.StepConfig(model=Linear(), tx=optax.sgd(0.1))
    state = fm.create_train_state(getkey(), config)
    batch = make_batch(tiny, 2)._replace(images=jnp.zeros((2, 28, 28, 1), jnp.uint8))
    with pytest.raises(TypeError, match="images are uint8; expected float"):
        fm.train_step(state, batch, getkey(), config=config)
    for name in ("batch_size", "microbatch_size"):
        with pytest.raises(ValueError, match=f"{name} is 0; expected at least 1"):
            dataclasses.replace(config, **{name: 0})  # type: ignore[arg-type]


def test_norms_are_those_of_numpy(tiny, getkey):
    config = fm.StepConfig(
        model=Small(), tx=fm.create_optimizer("sgd"), batch_size=20, log_norms=True
    )
    state = fm.create_train_state(getkey(), config)
    batch = make_batch(tiny, 20)
    before = jax.tree.map(np.array, state.params)
    key = getkey()
    plain = dataclasses.replace(config, log_norms=False)
    grads = compute_grads(state, batch, key, fm.Hyperparams(0.1), config=plain).grads
    after, metrics = train_step(state, batch, key, fm.Hyperparams(0.1), config=config)

    def norm(tree):
        leaves = [np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)]
        return np.linalg.norm(np.concatenate(leaves))

    means = metrics.means()
    assert means["grad_norm"] == pytest.approx(norm(grads), rel=1e-5)
    assert means["param_norm"] == pytest.approx(norm(before), rel=1e-5)
    updates = jax.tree.map(np.subtract, after.params, before)
    assert means["update_norm"] == pytest.approx(norm(updates), rel=1e-4)
    # The mean over steps.
    assert merge(metrics, metrics).means()["grad_norm"] == pytest.approx(means["grad_norm"])
