"""The operations against plain lax."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from fmnist_jax.nn import ops


def plain_conv(images, kernel, padding):
    return lax.conv_general_dilated(
        images, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def plain_conv_pool(images, kernel, padding):
    outputs = plain_conv(images, kernel, padding)
    return lax.reduce_window(outputs, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


def draw(key, *shape):
    return jax.random.normal(key, shape)


# Tiles that fit and tiles that exceed the edge, one channel, batches of one, maps too small for
# tiles, maps large enough for 4x4 tiles, non-square kernels.
SHAPES = [
    ((2, 7, 6, 3), (3, 3, 3, 4)),
    ((1, 5, 5, 2), (2, 2, 2, 3)),
    ((3, 8, 9, 1), (3, 3, 1, 5)),
    ((1, 4, 7, 1), (2, 2, 1, 1)),
    ((2, 6, 6, 1), (1, 3, 1, 2)),
    ((2, 6, 5, 2), (3, 2, 2, 1)),
    ((2, 3, 4, 4), (2, 2, 4, 2)),
    ((2, 5, 5, 4), (3, 3, 4, 2)),
    ((1, 12, 15, 2), (3, 3, 2, 3)),
    ((1, 11, 10, 2), (2, 2, 2, 3)),
    ((2, 9, 9, 2), (5, 4, 2, 3)),
    ((2, 24, 22, 2), (3, 3, 2, 3)),
    ((1, 23, 27, 3), (3, 3, 3, 2)),
]


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize(
    ("images_shape", "kernel_shape"),
    [pytest.param(*shapes, marks=[pytest.mark.slow] * (n % 2)) for n, shapes in enumerate(SHAPES)],
)
@pytest.mark.parametrize(
    ("fast", "plain"),
    [(ops.conv2d, plain_conv), (ops.conv2d_max_pool, plain_conv_pool)],
    ids=["conv2d", "conv2d_max_pool"],
)
def test_convolution_and_its_gradients_equal_those_of_lax(
    fast, plain, images_shape, kernel_shape, padding, getkey
):
    images, kernel = draw(getkey(), *images_shape), draw(getkey(), *kernel_shape)

    shape = jax.eval_shape(lambda: plain(images, kernel, padding)).shape
    cotangent = draw(getkey(), *shape)

    def value_and_gradients(conv):
        result, vjp = jax.vjp(lambda x, w: conv(x, w, padding), images, kernel)
        return conv(images, kernel, padding), result, vjp(cotangent)

    result, expected = (jax.jit(value_and_gradients, static_argnums=0)(f) for f in (fast, plain))
    chex.assert_trees_all_equal_shapes(result, expected)
    # 4x4 tiles have rounding errors up to 2e-6 of the largest value.
    large = min(images_shape[1:3]) >= 22
    atol = 2e-6 * float(jnp.max(jnp.abs(expected[0]))) if large else 1e-5
    chex.assert_trees_all_close(result[:2], expected[:2], rtol=1e-5, atol=atol)
    chex.assert_trees_all_close(result[2], expected[2], rtol=1e-5, atol=1e-4)


@pytest.mark.slow
# One channel, 2x2 tiles with both kernels, no tiles, 4x4 tiles.
@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize(
    ("images_shape", "kernel_shape"), [SHAPES[index] for index in (0, 1, 2, 6, 11)]
)
@pytest.mark.parametrize("conv", [ops.conv2d, ops.conv2d_max_pool])
def test_gradients_equal_finite_differences_in_float64(conv, images_shape, kernel_shape, padding):
    with jax.enable_x64(True):
        generator = np.random.default_rng(0)
        images, kernel = (
            jnp.asarray(generator.standard_normal(shape)) for shape in (images_shape, kernel_shape)
        )
        function = jax.jit(lambda x, w: jnp.sum(jnp.sin(conv(x, w, padding))))
        gradients = jax.jit(jax.grad(function, argnums=(0, 1)))(images, kernel)
        directions = [generator.standard_normal(x.shape) for x in (images, kernel)]
        ahead, behind = (
            function(images + step * directions[0], kernel + step * directions[1])
            for step in (1e-6, -1e-6)
        )
        slope = sum(jnp.vdot(g, d) for g, d in zip(gradients, directions, strict=True))
        np.testing.assert_allclose(slope, (ahead - behind) / 2e-6, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("side", "limit"), [(12, 1e-6), (26, 3e-6)], ids=["2x2", "4x4"])
def test_rounding_error_of_tiles_is_bounded(side, limit, getkey):
    images, kernel = draw(getkey(), 4, side, side, 64), draw(getkey(), 3, 3, 64, 64)
    cotangent = draw(getkey(), 4, side - 2, side - 2, 64)

    def outputs_and_gradients(conv, *arrays):
        *arguments, cotangent = arrays
        outputs, vjp = jax.vjp(lambda x, w: conv(x, w, "VALID"), *arguments)
        return outputs, *vjp(cotangent)

    computed = jax.jit(outputs_and_gradients, static_argnums=0)
    result = computed(ops.conv2d, images, kernel, cotangent)
    with jax.enable_x64(True):
        exact = computed(plain_conv, *(jnp.float64(x) for x in (images, kernel, cotangent)))
        errors = [
            float(jnp.max(jnp.abs(r - e)) / jnp.max(jnp.abs(e)))
            for r, e in zip(result, exact, strict=True)
        ]
    assert max(errors) <= limit


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
def test_outputs_that_read_only_zeros_are_zero(padding, getkey):
    # As in the background of an image; a ReLU would pass positive rounding errors.
    images = draw(getkey(), 2, 25, 30, 3).at[:, 6:15, 6:17].set(0).at[:, 20, :, 1].set(0)
    kernel = draw(getkey(), 3, 3, 3, 4)
    outputs = jax.jit(ops.conv2d, static_argnums=2)(images, kernel, padding)
    expected = plain_conv(images, kernel, padding)
    assert np.count_nonzero(expected == 0) >= 2 * 7 * 9 * 4
    np.testing.assert_array_equal(outputs == 0, expected == 0)

    def gradient(conv_pool):
        # Of zero pixels, most of whose windows tie.
        loss = jax.jit(jax.grad(lambda x: jnp.sum(conv_pool(x, kernel, padding))))
        return loss(images)[:, 6:15, 6:17]

    chex.assert_trees_all_close(
        gradient(ops.conv2d_max_pool), gradient(plain_conv_pool), rtol=1e-5, atol=1e-5
    )


def test_tiles_reduce_the_operations_of_a_convolution():
    shape = jax.ShapeDtypeStruct
    arguments = shape((8, 26, 26, 64), jnp.float32), shape((3, 3, 64, 64), jnp.float32)

    def flops(function):
        cost: Any = jax.jit(function).lower(*arguments).compile().cost_analysis()
        return cost["flops"]

    def outputs(conv):
        return flops(lambda x, w: conv(x, w, "VALID"))

    def both(conv):
        def loss(x, w):
            return jnp.sum(conv(x, w, "VALID") ** 2)

        return flops(jax.grad(loss, argnums=(0, 1)))

    # 36 multiplications instead of 144, plus the additions.
    assert outputs(ops.conv2d) < 0.30 * outputs(plain_conv)
    assert both(ops.conv2d) < 0.29 * both(plain_conv)


def test_conv2d_under_jit_vmap_and_grad(getkey):
    images, kernels = draw(getkey(), 2, 6, 6, 2), draw(getkey(), 4, 3, 3, 2, 3)

    def loss(conv, kernel):
        return jnp.sum(jnp.sin(conv(images, kernel, "VALID")))

    mapped = jax.jit(jax.vmap(jax.grad(lambda kernel: loss(ops.conv2d, kernel))))(kernels)
    expected = [jax.grad(lambda kernel: loss(plain_conv, kernel))(kernel) for kernel in kernels]
    chex.assert_trees_all_close(mapped, jnp.stack(expected), rtol=1e-4, atol=1e-4)


def test_pool_sends_the_gradient_of_a_tie_to_the_first():
    # Every window of three values, and so every tie, with and without tiles. A kernel that selects
    # one pixel makes the outputs equal to the images.
    windows = np.stack(np.meshgrid(*[[0.0, 1.0, 2.0]] * 4), -1).reshape(-1, 2, 2, 1)
    for kernel_size, channels in ((1, 1), (2, 2)):
        images = np.zeros((len(windows), 2 + kernel_size - 1, 2 + kernel_size - 1, channels))
        images[:, :2, :2, :1] = windows
        kernel = np.zeros((kernel_size, kernel_size, channels, 1))
        kernel[0, 0, 0, 0] = 1

        gradient, plain = (
            np.asarray(
                jax.grad(lambda x, w, f=conv_pool: jnp.sum(f(x, w, "VALID")))(
                    jnp.asarray(images, jnp.float32), jnp.asarray(kernel, jnp.float32)
                )
            )
            for conv_pool in (ops.conv2d_max_pool, plain_conv_pool)
        )
        expected = np.zeros((len(windows), 4))
        expected[np.arange(len(windows)), windows.reshape(-1, 4).argmax(axis=1)] = 1
        np.testing.assert_array_equal(gradient[:, :2, :2, 0].reshape(-1, 4), expected)
        np.testing.assert_array_equal(gradient, plain)


def test_global_max_pool_sends_the_gradient_of_a_tie_to_the_first(getkey):
    x = jnp.round(2 * draw(getkey(), 5, 3, 4, 6))  # with many ties
    cotangent = draw(getkey(), 5, 6)
    outputs, pullback = jax.vjp(ops.global_max_pool, x)
    (gradient,) = pullback(cotangent)
    pixels = np.asarray(x).reshape(5, 12, 6)
    np.testing.assert_array_equal(outputs, pixels.max(1))
    expected = np.zeros_like(pixels)
    np.put_along_axis(expected, pixels.argmax(1)[:, None], np.asarray(cotangent)[:, None], 1)
    np.testing.assert_array_equal(gradient, expected.reshape(x.shape))


def test_dense_layer_and_its_gradients_equal_those_of_numpy(getkey):
    inputs, kernel, bias = draw(getkey(), 5, 3), draw(getkey(), 3, 4), draw(getkey(), 4)
    result, vjp = jax.vjp(lambda x, w, b: ops.add_bias(ops.matmul(x, w), b), inputs, kernel, bias)
    arrays = (inputs, kernel, bias, draw(getkey(), 5, 4))
    x, w, b, g = (np.asarray(array, np.float64) for array in arrays)
    np.testing.assert_allclose(result, x @ w + b, rtol=1e-6, atol=1e-6)
    expected = g @ w.T, x.T @ g, g.sum(axis=0)
    chex.assert_trees_all_close(vjp(jnp.float32(g)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 3), (4, 5, 6, 3)])
def test_bias_gradient_is_the_sum_over_all_but_the_features(shape, getkey):
    cotangent = draw(getkey(), *shape)
    _, vjp = jax.vjp(lambda b: ops.add_bias(jnp.zeros(shape), b), jnp.zeros(shape[-1]))
    expected = np.float64(cotangent).reshape(-1, shape[-1]).sum(axis=0)
    np.testing.assert_allclose(vjp(cotangent)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(7, 3), (3, 4, 5, 2)])
def test_batch_norm_and_its_gradient_equal_those_of_autodiff(shape, getkey):
    arrays = [2 + 3 * draw(getkey(), *shape), *(draw(getkey(), shape[-1]) for _ in range(2))]
    cotangent = draw(getkey(), *shape)
    axes = tuple(range(len(shape) - 1))

    def plain(x, scale, bias):
        mean, var = x.mean(axes, keepdims=True), x.var(axes, keepdims=True)
        with jax.numpy_rank_promotion("allow"):
            return (x - mean) / jnp.sqrt(var + 1e-5) * scale + bias

    with jax.enable_x64(True):
        *exact, exact_cotangent = (
            jnp.asarray(np.asarray(array), jnp.float64) for array in (*arrays, cotangent)
        )
        expected, pullback = jax.vjp(plain, *exact)
        expected_gradients = pullback(exact_cotangent)
    (outputs, mean, var), pullback = jax.vjp(ops.batch_norm, *arrays)
    gradients = pullback((cotangent, jnp.zeros_like(mean), jnp.zeros_like(var)))
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-5)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(mean, np.asarray(exact[0]).mean(axes), rtol=1e-5)
    np.testing.assert_allclose(var, np.asarray(exact[0]).var(axes), rtol=1e-5)
    inputs = (arrays[0], mean, var, *arrays[1:])
    np.testing.assert_allclose(ops.normalize(*inputs), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("platform", "plain"), [("cpu", False), ("cuda", True), ("tpu", True)])
def test_other_platforms_get_the_plain_operations(platform, plain):
    def loss(images, kernel):
        return jnp.sum(ops.conv2d_max_pool(images, kernel, "VALID"))

    text = (
        jax.jit(jax.grad(loss, argnums=(0, 1)))
        .trace(jnp.zeros((2, 6, 6, 2)), jnp.zeros((3, 3, 2, 4)))
        .lower(lowering_platforms=(platform,))
        .as_text()
    )
    assert ("select_and_scatter" in text) == plain
    # JAX's own gradients swap batch and channels, which is not NHWC.
    assert ("[f, 0, 1, b]" in text) == plain
    assert ("inlineable" in text) != plain


@pytest.mark.parametrize(("rate", "actual"), [(0.2, 51 / 256), (0.3, 77 / 256), (0.5, 0.5), (0, 0)])
def test_dropout_drops_the_rounded_rate_and_keeps_the_mean(rate, actual, getkey):
    ones = jnp.ones((1000, 1001))
    result = np.asarray(ops.dropout(getkey(), ones, rate))
    kept = result > 0
    # Five standard errors of a million draws.
    assert abs(np.mean(~kept) - actual) <= 5 * np.sqrt(actual * (1 - actual) / ones.size)
    np.testing.assert_allclose(result[kept], 1 / (1 - actual), rtol=1e-6)
    # Neighbors share a random word and are independent.
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


@pytest.mark.parametrize("rate", [0.0, 0.2, 0.5, 0.999])
def test_the_rate_of_dropout_may_be_traced(rate, getkey):
    key, x = getkey(), draw(getkey(), 3, 5, 7)
    traced = jax.jit(ops.dropout)(key, x, rate)
    chex.assert_trees_all_equal(traced, ops.dropout(key, x, rate))
    half = ops.dropout(key, x.astype(jnp.bfloat16), rate)
    assert half.dtype == jnp.bfloat16
