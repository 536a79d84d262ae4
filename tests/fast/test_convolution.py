"""Convolutions, sums and products in their faster forms against plain lax."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from fmnist_jax.fast.rewrite import explain_for_cpu, optimize_for_cpu
from tests.fast import comparison


def plain_conv(images, kernel, padding):
    return lax.conv_general_dilated(
        images, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def plain_conv_pool(images, kernel, padding):
    outputs = plain_conv(images, kernel, padding)
    return lax.reduce_window(outputs, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")


fast_conv, fast_conv_pool = optimize_for_cpu(plain_conv), optimize_for_cpu(plain_conv_pool)


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
    ((2, 15, 14, 3), (5, 5, 3, 4)),
]


@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize(
    ("images_shape", "kernel_shape"),
    [pytest.param(*shapes, marks=[pytest.mark.slow] * (n % 2)) for n, shapes in enumerate(SHAPES)],
)
@pytest.mark.parametrize(
    ("fast", "plain"),
    [(fast_conv, plain_conv), (fast_conv_pool, plain_conv_pool)],
    ids=["conv", "conv_pool"],
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


# Options of lax.conv_general_dilated, channels of the images, features.
KINDS: dict[str, tuple[dict[str, Any], int, int]] = {
    "strides": ({"window_strides": (2, 2)}, 8, 3),
    "uneven strides": ({"window_strides": (3, 2)}, 9, 2),
    "strides of few channels": ({"window_strides": (2, 3)}, 2, 3),
    "one stride": ({"window_strides": (1, 2)}, 8, 3),
    "transposed": ({"lhs_dilation": (2, 2)}, 3, 2),
    "uneven transposed": ({"lhs_dilation": (3, 2)}, 2, 3),
    "dilated": ({"rhs_dilation": (2, 2)}, 3, 2),
    "uneven dilated": ({"rhs_dilation": (1, 3)}, 2, 2),
    "groups": ({"feature_group_count": 2}, 4, 6),
    "strided groups": ({"feature_group_count": 2, "window_strides": (2, 2)}, 4, 6),
    "depthwise": ({"feature_group_count": 4}, 4, 4),
    "several features per channel": ({"feature_group_count": 3}, 3, 6),
    "strided depthwise": ({"feature_group_count": 3, "window_strides": (2, 1)}, 3, 3),
}
# Padding and the sides of the kernel.
EDGES = [
    (((1, 1), (1, 1)), (3, 3)),
    (((0, 0), (0, 0)), (3, 2)),
    (((2, 1), (0, 3)), (4, 3)),
    (((-1, 0), (1, -1)), (1, 1)),
    (((0, 2), (2, 0)), (2, 5)),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("pads", "sides"),
    [pytest.param(*EDGES[0]), *(pytest.param(*e, marks=pytest.mark.slow) for e in EDGES[1:])],
)
def test_every_kind_of_convolution(kind, pads, sides):
    options, channels, features = KINDS[kind]
    options = {"window_strides": (1, 1)} | options
    groups = options.get("feature_group_count", 1)

    def convolution(images, kernel):
        dimensions = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            images, kernel, padding=pads, dimension_numbers=dimensions, **options
        )

    with jax.enable_x64(True):
        images, kernel = (
            comparison.draw(2, 9, 11, channels),
            comparison.draw(*sides, channels // groups, features),
        )
        comparison.compare(convolution, images, kernel)
        assert [op.replaced for op in explain_for_cpu(convolution, images, kernel)] == [True]


@pytest.mark.slow
# One channel, 2x2 tiles with both kernels, no tiles, 4x4 tiles.
@pytest.mark.parametrize("padding", ["SAME", "VALID"])
@pytest.mark.parametrize(
    ("images_shape", "kernel_shape"), [SHAPES[index] for index in (0, 1, 2, 6, 11)]
)
@pytest.mark.parametrize("conv", [fast_conv, fast_conv_pool])
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
    result = computed(fast_conv, images, kernel, cotangent)
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
    outputs = jax.jit(fast_conv, static_argnums=2)(images, kernel, padding)
    expected = plain_conv(images, kernel, padding)
    assert np.count_nonzero(expected == 0) >= 2 * 7 * 9 * 4
    np.testing.assert_array_equal(outputs == 0, expected == 0)

    def gradient(conv_pool):
        # Of zero pixels, most of whose windows tie.
        loss = jax.jit(jax.grad(lambda x: jnp.sum(conv_pool(x, kernel, padding))))
        return loss(images)[:, 6:15, 6:17]

    chex.assert_trees_all_close(
        gradient(fast_conv_pool), gradient(plain_conv_pool), rtol=1e-5, atol=1e-5
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
    assert outputs(fast_conv) < 0.30 * outputs(plain_conv)
    assert both(fast_conv) < 0.29 * both(plain_conv)


def test_conv2d_under_jit_vmap_and_grad(getkey):
    images, kernels = draw(getkey(), 2, 6, 6, 2), draw(getkey(), 4, 3, 3, 2, 3)

    def loss(conv, kernel):
        return jnp.sum(jnp.sin(conv(images, kernel, "VALID")))

    mapped = jax.jit(jax.vmap(jax.grad(lambda kernel: loss(fast_conv, kernel))))(kernels)
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
            for conv_pool in (fast_conv_pool, plain_conv_pool)
        )
        expected = np.zeros((len(windows), 4))
        expected[np.arange(len(windows)), windows.reshape(-1, 4).argmax(axis=1)] = 1
        np.testing.assert_array_equal(gradient[:, :2, :2, 0].reshape(-1, 4), expected)
        np.testing.assert_array_equal(gradient, plain)


def test_the_gradient_of_a_global_maximum_is_that_of_jax(getkey):
    x = jnp.round(2 * draw(getkey(), 5, 3, 4, 6))  # with many ties

    def gradient(function):
        return jax.jit(jax.grad(lambda x: jnp.sum(jnp.sin(function(jnp.tanh(x))))))(x)

    chex.assert_trees_all_close(
        gradient(optimize_for_cpu(lambda x: x.max((1, 2)))), gradient(lambda x: x.max((1, 2))),
        rtol=1e-6,
    )  # fmt: skip


def test_dense_layer_and_its_gradients_equal_those_of_numpy(getkey):
    inputs, kernel, bias = draw(getkey(), 5, 3), draw(getkey(), 3, 4), draw(getkey(), 4)
    dense = optimize_for_cpu(lambda x, w, b: x @ w + b.reshape(1, -1))
    result, vjp = jax.vjp(dense, inputs, kernel, bias)
    arrays = (inputs, kernel, bias, draw(getkey(), 5, 4))
    x, w, b, g = (np.asarray(array, np.float64) for array in arrays)
    np.testing.assert_allclose(result, x @ w + b, rtol=1e-6, atol=1e-6)
    expected = g @ w.T, x.T @ g, g.sum(axis=0)
    chex.assert_trees_all_close(vjp(jnp.float32(g)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 3), (4, 5, 6, 3)])
def test_bias_gradient_is_the_sum_over_all_but_the_features(shape, getkey):
    cotangent = draw(getkey(), *shape)
    wide = (1,) * (len(shape) - 1) + shape[-1:]
    add = optimize_for_cpu(lambda bias: jnp.zeros(shape) + bias.reshape(wide))
    _, vjp = jax.vjp(add, jnp.zeros(shape[-1]))
    expected = np.float64(cotangent).reshape(-1, shape[-1]).sum(axis=0)
    np.testing.assert_allclose(vjp(cotangent)[0], expected, rtol=1e-5, atol=1e-5)
