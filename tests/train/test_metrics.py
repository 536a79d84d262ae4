"""Loss and counts against NumPy in float64."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmnist_jax.train import metrics


@pytest.fixture
def predictions():
    rng = np.random.default_rng(0)
    logits = (5 * rng.normal(size=(50, 10))).astype(np.float32)
    return logits, rng.integers(0, 10, 50).astype(np.int32)


def reference_losses(logits, labels):
    exponentials = np.exp(logits.astype(np.float64))
    shares = exponentials / exponentials.sum(axis=1, keepdims=True)
    return -np.log(shares[np.arange(len(labels)), labels])


def test_cross_entropy_and_its_gradient(predictions):
    logits, labels = predictions
    expected = reference_losses(logits, labels)
    np.testing.assert_allclose(metrics.cross_entropy(logits, labels), expected, rtol=1e-5)
    gradient = jax.grad(lambda x: jnp.sum(metrics.cross_entropy(x, labels)))(jnp.asarray(logits))
    exponentials = np.exp(logits.astype(np.float64))
    shares = exponentials / exponentials.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(gradient, shares - np.eye(10)[labels], atol=1e-6)


def test_cross_entropy_of_huge_logits_is_finite():
    losses = metrics.cross_entropy(jnp.array([[1e4, 0.0], [1e4, 0.0]]), jnp.array([0, 1]))
    np.testing.assert_allclose(losses, [0, 1e4])


def test_masked_metrics_are_those_of_the_rest(predictions):
    logits, labels = predictions
    mask = np.arange(50) % 3 != 0
    losses = metrics.cross_entropy(logits, labels)
    result = metrics.measure(losses, jnp.asarray(logits), jnp.asarray(labels), jnp.asarray(mask))
    expected = reference_losses(logits[mask], labels[mask])
    assert int(result.num_examples) == mask.sum()
    values = result.means()
    np.testing.assert_allclose(values["loss"], expected.mean(), rtol=1e-6)
    assert values["accuracy"] == (logits.argmax(axis=1) == labels)[mask].mean()
    chex.assert_trees_all_equal_dtypes(result, metrics.zeros())


def test_merge_adds_up_and_zeros_are_neutral(predictions):
    logits, labels = predictions
    losses = metrics.cross_entropy(logits, labels)

    def part(where):
        return metrics.measure(
            losses[where], jnp.asarray(logits[where]), jnp.asarray(labels[where]),
            jnp.ones(len(labels[where]), bool),
        )  # fmt: skip

    a, b, c = part(slice(0, 20)), part(slice(20, 21)), part(slice(21, 50))
    chex.assert_trees_all_equal(metrics.merge(metrics.zeros(), a), a)
    left = metrics.merge(metrics.merge(a, b), c)
    right = metrics.merge(a, metrics.merge(b, c))
    chex.assert_trees_all_close(left, right, rtol=1e-6)
    np.testing.assert_allclose(left.loss, reference_losses(logits, labels).sum(), rtol=1e-6)
    assert int(left.num_examples) == 50


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("position", [0, 2])
def test_finite_steps_end_before_the_first_bad_loss(bad, position):
    total = metrics.zeros()
    for step in range(4):
        loss = jnp.array([bad if step == position else 1.0])
        batch = metrics.measure(loss, jnp.zeros((1, 2)), jnp.array([0]), jnp.array([True]))
        total = metrics.merge(total, batch)
    assert int(total.finite_steps) == position


def test_a_label_that_is_no_class_has_no_loss():
    losses = metrics.cross_entropy(jnp.zeros((3, 2)), jnp.array([1, 2, -1]))
    np.testing.assert_array_equal(np.isnan(losses), [False, True, True])


def test_means_of_norms_before_the_first_finite_step():
    sums = metrics.zeros(log_norms=True)._replace(num_examples=jnp.int32(4))
    assert sums.means()["grad_norm"] == 0


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.7])
def test_smoothed_labels(label_smoothing, predictions):
    logits, labels = predictions
    targets = np.eye(10)[labels] * (1 - label_smoothing) + label_smoothing / 10
    exact = logits.astype(np.float64)
    log_shares = exact - np.log(np.exp(exact).sum(axis=1, keepdims=True))
    smoothed = jax.jit(metrics.cross_entropy)(logits, labels, label_smoothing)
    np.testing.assert_allclose(smoothed, -(targets * log_shares).sum(axis=1), rtol=1e-5)
