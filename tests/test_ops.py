"""The fast operations against plain lax."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from fmnist_jax import ops


def plain_conv(images, kernel, padding):
    return lax.conv_general_dilated(
        images, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def plain_pool(images):
    return lax.reduce_window(images, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def draw(key, *shape):
    return jax.random.normal(key, shape)


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize(
    ("images_shape", "kernel_shape"),
    [
        ((2, 7, 6, 3), (3, 3, 3, 4)),
        ((1, 5, 5, 2), (2, 2, 2, 3)),
        ((3, 8, 9, 1), (3, 3, 1, 5)),
        ((1, 4, 7, 1), (2, 2, 1, 1)),
        ((2, 6, 6, 1), (1, 3, 1, 2)),
        ((2, 6, 5, 2), (3, 2, 2, 1)),
        ((2, 3, 3, 4), (3, 3, 4, 2)),
        ((2, 9, 9, 2), (5, 4, 2, 3)),
    ],
)
def test_conv2d_and_its_gradients_are_those_of_lax(images_shape, kernel_shape, padding, getkey):
    images, kernel = draw(getkey(), *images_shape), draw(getkey(), *kernel_shape)

    expected, expected_vjp = jax.vjp(lambda x, w: plain_conv(x, w, padding), images, kernel)
    result, vjp = jax.vjp(lambda x, w: ops.conv2d(x, w, padding), images, kernel)

    chex.assert_equal_shape([result, expected])
    chex.assert_trees_all_close(result, expected, rtol=1e-5, atol=1e-5)
    cotangent = draw(getkey(), *expected.shape)
    chex.assert_trees_all_close(vjp(cotangent), expected_vjp(cotangent), rtol=1e-5, atol=1e-4)


def test_conv2d_under_jit_vmap_and_grad(getkey):
    images, kernels = draw(getkey(), 2, 6, 6, 2), draw(getkey(), 4, 3, 3, 2, 3)

    def loss(conv, kernel):
        return jnp.sum(jnp.sin(conv(images, kernel, "VALID")))

    mapped = jax.jit(jax.vmap(jax.grad(lambda kernel: loss(ops.conv2d, kernel))))(kernels)
    expected = [jax.grad(lambda kernel: loss(plain_conv, kernel))(kernel) for kernel in kernels]
    chex.assert_trees_all_close(mapped, jnp.stack(expected), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(2, 6, 4, 3), (1, 7, 5, 2), (1, 2, 2, 1), (3, 3, 2, 1)])
def test_max_pool_and_its_gradient_are_those_of_lax(shape, getkey):
    images = draw(getkey(), *shape)
    expected, expected_vjp = jax.vjp(plain_pool, images)
    result, vjp = jax.vjp(ops.max_pool, images)
    chex.assert_trees_all_equal(result, expected)
    cotangent = draw(getkey(), *expected.shape)
    chex.assert_trees_all_equal(vjp(cotangent), expected_vjp(cotangent))


def test_max_pool_sends_the_gradient_of_a_tie_to_the_first(getkey):
    # Every pattern of three values in a window, with all the ties that there can be.
    windows = np.stack(np.meshgrid(*[[0.0, 1.0, 2.0]] * 4), -1).reshape(-1, 2, 2, 1)
    gradient = jax.grad(lambda x: jnp.sum(ops.max_pool(x)))(jnp.asarray(windows, jnp.float32))
    expected = np.zeros((len(windows), 4))
    expected[np.arange(len(windows)), windows.reshape(-1, 4).argmax(axis=1)] = 1
    np.testing.assert_array_equal(np.asarray(gradient).reshape(-1, 4), expected)
    chex.assert_trees_all_equal(
        gradient, jax.grad(lambda x: jnp.sum(plain_pool(x)))(jnp.asarray(windows, jnp.float32))
    )


@pytest.mark.parametrize(("platform", "plain"), [("cpu", False), ("cuda", True), ("tpu", True)])
def test_other_platforms_get_the_plain_operations(platform, plain):
    def loss(images, kernel):
        return jnp.sum(ops.max_pool(ops.conv2d(images, kernel, "VALID")))

    text = (
        jax.jit(jax.grad(loss, argnums=(0, 1)))
        .trace(jnp.zeros((2, 6, 6, 2)), jnp.zeros((3, 3, 2, 4)))
        .lower(lowering_platforms=(platform,))
        .as_text()
    )
    assert ("select_and_scatter" in text) == plain
    # JAX's own gradients are convolutions of batch and channels exchanged, and of any but NHWC.
    assert ("[f, 0, 1, b]" in text) == plain


@pytest.mark.parametrize(("rate", "actual"), [(0.2, 51 / 256), (0.3, 77 / 256), (0.5, 0.5), (0, 0)])
def test_dropout_drops_the_rounded_rate_and_keeps_the_mean(rate, actual, getkey):
    ones = jnp.ones((1000, 1001))
    result = np.asarray(ops.dropout(getkey(), ones, rate))
    kept = result > 0
    # Five standard errors of a million draws.
    assert abs(np.mean(~kept) - actual) <= 5 * np.sqrt(actual * (1 - actual) / ones.size)
    np.testing.assert_allclose(result[kept], 1 / (1 - actual), rtol=1e-6)
    # Neighbours, which share a random word, are independent.
    both = np.mean(~kept[:, :-1] & ~kept[:, 1:])
    assert abs(both - actual**2) <= 5 * np.sqrt(actual**2 / ones.size)


def test_dropout_depends_on_its_key_alone(getkey):
    key, other = getkey(), getkey()
    x = draw(getkey(), 3, 5, 7)
    first = ops.dropout(key, x, 0.5)
    chex.assert_equal_shape([first, x])
    chex.assert_trees_all_equal(first, jax.jit(ops.dropout, static_argnums=2)(key, x, 0.5))
    assert not np.array_equal(first, ops.dropout(other, x, 0.5))
    gradient = jax.grad(lambda x: jnp.sum(ops.dropout(key, x, 0.5)))(x)
    chex.assert_trees_all_equal(gradient, jnp.where(first != 0, 2.0, 0.0))
