"""Products in bfloat16 against NumPy, which multiplies the same rounded factors in float64."""

import collections
import dataclasses
import re
from unittest import mock

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from jax import lax

import fmnist_jax as fm
from fmnist_jax.fast.rewrite import optimize_for_cpu
from fmnist_jax.train.step import compute_grads


def make_batch(dataset, num_examples):
    images = jnp.float32(dataset.train_images[:num_examples, :, :, None]) / 255
    labels = jnp.int32(dataset.train_labels[:num_examples])
    return fm.Batch(images, labels, jnp.ones(num_examples, bool))


def rounded(array):
    return np.asarray(array).astype(ml_dtypes.bfloat16).astype(np.float64)


def in_bfloat16(function):
    """Returns an optimized function; its gradients are taken elsewhere."""

    def call(*arrays):
        with jax.default_matmul_precision("bfloat16"):
            return optimize_for_cpu(function)(*arrays)

    return call


def convolve(images, kernel, stride=1, padding="VALID"):
    return lax.conv_general_dilated(
        images, kernel, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@pytest.mark.parametrize("staged", [False, True])
def test_factors_are_rounded_and_sums_are_not(staged, getkey):
    left = jax.random.normal(getkey(), (40, 300))
    right = jax.random.normal(getkey(), (300, 20))
    cotangent = jax.random.normal(getkey(), (40, 20))
    multiply = in_bfloat16(jnp.matmul)
    result, vjp = jax.vjp(jax.jit(multiply) if staged else multiply, left, right)
    expected = (
        rounded(left) @ rounded(right),
        rounded(cotangent) @ rounded(right).T,
        rounded(left).T @ rounded(cotangent),
    )
    chex.assert_trees_all_close((result, *vjp(cotangent)), expected, rtol=1e-5, atol=1e-4)
    chex.assert_type((result, *vjp(cotangent)), jnp.float32)
    assert np.abs(expected[0] - np.asarray(left, np.float64) @ np.asarray(right)).max() > 0.01
    # Forward mode is exact in the tangents.
    tangent = jax.jvp(multiply, (left, right), (left, right))[1]
    exact = np.asarray(left, np.float64) @ rounded(right) + rounded(left) @ np.asarray(right)
    np.testing.assert_allclose(tangent, exact, rtol=1e-4, atol=1e-4)


def test_convolutions_that_are_products_are_rounded(getkey):
    def windows(images):
        """Returns the pixels below a kernel of 3x3, [positions, kernel positions]."""
        views = np.lib.stride_tricks.sliding_window_view(images, (3, 3), axis=(1, 2))
        return views.reshape(-1, 9)

    images = jax.random.normal(getkey(), (2, 9, 8, 1))
    kernel = jax.random.normal(getkey(), (3, 3, 1, 4))
    result, vjp = jax.vjp(in_bfloat16(convolve), images, kernel)
    pixels = windows(rounded(images))
    expected = pixels @ rounded(kernel).reshape(9, 4)
    np.testing.assert_allclose(result.reshape(-1, 4), expected, rtol=1e-5, atol=1e-5)
    cotangent = jax.random.normal(getkey(), result.shape)
    expected = pixels.T @ rounded(cotangent).reshape(-1, 4)
    np.testing.assert_allclose(vjp(cotangent)[1].reshape(9, 4), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("shape", "kernel_shape", "stride", "bound"),
    [
        # Measured for 1x1, 2x2 and 4x4 tiles: 0.0023, 0.0039 to 0.0046, 0.012. Each factor is
        # rounded by 0.0017 in the root mean square; the transforms of large tiles amplify that.
        ((4, 10, 10, 32), (1, 1, 32, 16), 1, 0.003),
        ((4, 14, 14, 16), (3, 3, 16, 32), 1, 0.005),
        ((4, 14, 14, 16), (2, 2, 16, 32), 1, 0.005),
        ((4, 24, 24, 16), (3, 3, 16, 32), 1, 0.014),
        ((4, 12, 12, 16), (3, 3, 16, 8), 2, 0.003),
    ],
)
def test_rounding_errors_of_convolutions_are_bounded(shape, kernel_shape, stride, bound, getkey):
    images = jax.random.normal(getkey(), shape)
    kernel = jax.random.normal(getkey(), kernel_shape)

    def convolved(images, kernel):
        return convolve(images, kernel, stride)

    expected, vjp = jax.vjp(convolved, images, kernel)
    cotangent = jax.random.normal(getkey(), expected.shape)
    result, half_vjp = jax.vjp(in_bfloat16(convolved), images, kernel)
    pairs = zip((result, *half_vjp(cotangent)), (expected, *vjp(cotangent)), strict=True)
    errors = [float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b)) for a, b in pairs]
    assert max(errors) < bound
    assert max(errors) > 0.001  # they are rounded


def test_float64_is_not_rounded():
    with jax.enable_x64(True):
        left, right = jnp.ones((4, 3)) / 3, jnp.ones((3, 2)) / 7
        with jax.default_matmul_precision("bfloat16"):
            result = optimize_for_cpu(jnp.matmul)(left, right)
        np.testing.assert_allclose(result, np.asarray(left) @ np.asarray(right), rtol=1e-15)


def test_every_large_product_of_a_step_is_in_bfloat16(tiny, getkey):
    """Only the transforms of kernels and sums over rows stay in float32."""
    config = fm.StepConfig(
        model=fm.create_model("small_dropout"), tx=optax.sgd(0.1), matmul_precision="bfloat16"
    )
    state = fm.create_train_state(getkey(), config)
    batch = make_batch(tiny, 60)
    step = jax.jit(lambda *arguments: fm.train_step(*arguments, config=config))
    text = step.lower(state, batch, getkey()).as_text()
    kinds: collections.Counter[tuple[str, bool]] = collections.Counter()
    for line in re.findall(r"stablehlo.dot_general .*", text):
        factors = re.search(r": \(tensor<(\S+)>, tensor<(\S+)>\) -> tensor<(\S+)>", line)
        assert factors is not None
        *sides, result = (factor.rsplit("x", 1) for factor in factors.groups())
        dtypes = [side[1] for side in sides]
        assert dtypes[0] == dtypes[1]
        assert result[1] == "f32"
        # The largest of float32 have at most six rows: the transforms of a kernel.
        is_small = min(int(n) for n in sides[0][0].split("x")) <= 6 or "x" not in sides[0][0]
        kinds[dtypes[0], is_small] += 1
    assert kinds["f32", False] == 0
    # Three products of 4x4 tiles at 36 positions, or of 2x2 tiles at 16, for each convolution but
    # the first; two for the first, three for each dense layer.
    assert kinds["bf16", False] >= 3 * 16


class OwnProducts:
    """Calls a product and a convolution, in a loop and under `jax.checkpoint`."""

    def init(self, key, images, *, train):
        return {"params": {"kernel": jnp.ones((3, 3, 1, 4)), "dense": jnp.ones((4, 10)) / 3}}

    def apply(self, variables, images, *, train, rngs=None):
        kernel, dense = variables["params"]["kernel"], variables["params"]["dense"]
        features = jax.checkpoint(convolve)(images, kernel).mean((1, 2))
        return lax.scan(lambda carry, _: (carry, carry @ dense), features, None, length=1)[1][0]


def test_on_a_gpu_all_products_and_convolutions_are_rounded(tiny, getkey):
    config = fm.StepConfig(model=OwnProducts(), tx=optax.sgd(0.1))
    state, batch, key = fm.create_train_state(getkey(), config), make_batch(tiny, 20), getkey()

    def grads(precision):
        changed = dataclasses.replace(config, matmul_precision=precision)
        function = jax.jit(lambda *arguments: compute_grads(*arguments, config=changed).grads)
        text = function.lower(state, batch, key).as_text()
        operations = re.findall(r"stablehlo.(?:convolution|dot_general).*", text)
        return function(state, batch, key), {"bf16" in line for line in operations}, text

    with mock.patch("jax.default_backend", return_value="gpu"):
        exact, is_rounded, text = grads("float32")
        assert is_rounded == {False}
        half, is_rounded, _ = grads("bfloat16")
        assert is_rounded == {True}
    plain = dataclasses.replace(config, optimize=False)
    unchanged = jax.jit(lambda *arguments: compute_grads(*arguments, config=plain).grads)
    assert text == unchanged.lower(state, batch, key).as_text()
    chex.assert_trees_all_equal_dtypes(half, exact)
    chex.assert_trees_all_close(half, exact, rtol=0.05, atol=0.05)
    assert float(optax.tree.norm(optax.tree.sub(half, exact))) > 0


class Normalized(nn.Module):
    @nn.compact
    def __call__(self, images, *, train):
        x = nn.Conv(8, (3, 3), strides=3)(images)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        return nn.Dense(10)(x.reshape(len(x), -1))


@pytest.mark.slow
def test_networks_of_another_dtype_and_batch_statistics(tiny, getkey):
    batch, key = make_batch(tiny, 20), getkey()

    def losses(**changes):
        config = fm.StepConfig(model=Normalized(), tx=optax.sgd(0.1), **changes)
        state = fm.create_train_state(jax.random.key(0), config)
        states = jax.jit(lambda *arguments: fm.train_step(*arguments, config=config))(
            state, batch, key
        )
        chex.assert_trees_all_equal_dtypes(states[0], state)
        return float(states[1].loss)

    exact = losses()
    for dtype in (jnp.float32, jnp.bfloat16):
        half = losses(matmul_precision="bfloat16", dtype=dtype)
        assert half != exact
        np.testing.assert_allclose(half, exact, rtol=0.02)


def test_settings_without_effect_are_refused():
    config = fm.StepConfig(model=OwnProducts(), tx=optax.sgd(0.1))
    with pytest.raises(ValueError, match="matmul_precision is 'half'; expected float32 or"):
        dataclasses.replace(config, matmul_precision="half")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="which needs optimize=True"):
        dataclasses.replace(config, matmul_precision="bfloat16", optimize=False)
