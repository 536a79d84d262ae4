"""Dropout with one random byte per activation."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fmnist_jax.nn.dropout import dropout


@pytest.mark.parametrize(("rate", "actual"), [(0.2, 51 / 256), (0.3, 77 / 256), (0.5, 0.5), (0, 0)])
def test_dropout_drops_the_rounded_rate_and_keeps_the_mean(rate, actual, getkey):
    ones = jnp.ones((1000, 1001))
    result = np.asarray(dropout(getkey(), ones, rate))
    kept = result > 0
    # Five standard errors of a million draws.
    assert abs(np.mean(~kept) - actual) <= 5 * np.sqrt(actual * (1 - actual) / ones.size)
    np.testing.assert_allclose(result[kept], 1 / (1 - actual), rtol=1e-6)
    # Neighbors share a random word and are independent.
    both = np.mean(~kept[:, :-1] & ~kept[:, 1:])
    assert abs(both - actual**2) <= 5 * np.sqrt(actual**2 / ones.size)


def test_dropout_depends_on_its_key_alone(getkey):
    key, other = getkey(), getkey()
    x = jax.random.normal(getkey(), (3, 5, 7))
    first = dropout(key, x, 0.5)
    chex.assert_equal_shape([first, x])
    chex.assert_trees_all_equal(first, jax.jit(dropout, static_argnums=2)(key, x, 0.5))
    assert not np.array_equal(first, dropout(other, x, 0.5))
    gradient = jax.grad(lambda x: jnp.sum(dropout(key, x, 0.5)))(x)
    chex.assert_trees_all_equal(gradient, jnp.where(first != 0, 2.0, 0.0))


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.5, 0.999])
def test_the_rate_of_dropout_may_be_traced(rate, getkey):
    key, x = getkey(), jax.random.normal(getkey(), (3, 5, 7))
    traced = jax.jit(dropout)(key, x, rate)
    chex.assert_trees_all_equal(traced, dropout(key, x, rate))
    half = dropout(key, x.astype(jnp.bfloat16), rate)
    assert half.dtype == jnp.bfloat16
