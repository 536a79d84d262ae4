"""Batch normalization against Keras, and the layers of the sprint network."""

import functools
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest

from fmnist_jax.fast.rewrite import optimize_for_cpu
from fmnist_jax.nn.sprint import WhitenedConv, dirac, whitening_patterns


@pytest.mark.parametrize("shape", [(6, 5), (3, 4, 5, 2)])
def test_batch_norm_follows_keras(shape, getkey):
    reference = keras.layers.BatchNormalization(momentum=0.95, epsilon=1e-5)
    layer, options = nn.BatchNorm(momentum=0.95), dict[str, Any](mutable=["batch_stats"])
    apply = jax.jit(
        optimize_for_cpu(functools.partial(layer.apply, use_running_average=False, **options))
    )
    evaluate = jax.jit(optimize_for_cpu(functools.partial(layer.apply, use_running_average=True)))
    reference.build(shape)
    scale, bias = (jax.random.normal(getkey(), shape[-1:]) for _ in range(2))
    reference.gamma.assign(scale)
    reference.beta.assign(bias)
    zeros, ones = jnp.zeros(shape[-1]), jnp.ones(shape[-1])
    variables = {
        "params": {"scale": scale, "bias": bias},
        "batch_stats": {"mean": zeros, "var": ones},
    }
    for _ in range(3):
        x = 3 + 2 * jax.random.normal(getkey(), shape)
        outputs, updated = apply(variables, x)
        with jax.numpy_rank_promotion("allow"):
            expected = reference(x, training=True)
        chex.assert_trees_all_close(outputs, expected, rtol=1e-5, atol=1e-5)
        variables |= updated
    stats = variables["batch_stats"]
    np.testing.assert_allclose(stats["mean"], reference.moving_mean, rtol=1e-5)
    np.testing.assert_allclose(stats["var"], reference.moving_variance, rtol=1e-5)
    with jax.numpy_rank_promotion("allow"):
        expected = reference(x, training=False)
    outputs = evaluate(variables, x)
    chex.assert_trees_all_close(outputs, expected, rtol=1e-5, atol=1e-5)


def test_patterns_whiten_the_training_images(sample):
    images = sample.train_images[:2000] / 255
    patches = np.lib.stride_tricks.sliding_window_view(images, (5, 5), (1, 2))
    outputs = np.einsum("nhwij,ijf->fnhw", patches, whitening_patterns()).reshape(25, -1)
    covariance = np.cov(outputs)
    np.testing.assert_allclose(np.diag(covariance), 1, atol=0.15)
    correlations = np.corrcoef(outputs) - np.eye(25)
    assert np.abs(correlations).max() < 0.3
    # Unwhitened neighboring pixels correlate.
    assert np.corrcoef(patches[..., 2, 2].ravel(), patches[..., 2, 3].ravel())[0, 1] > 0.8


def test_the_first_convolution_mixes_whitened_patches(getkey):
    images = jax.random.uniform(getkey(), (2, 12, 12, 1))
    layer = WhitenedConv(6)
    variables = layer.init(getkey(), images)
    chex.assert_shape(variables["params"]["kernel"], (1, 1, 25, 6))
    patches = np.lib.stride_tricks.sliding_window_view(np.asarray(images)[..., 0], (5, 5), (1, 2))
    whitened = np.einsum("nhwij,ijf->nhwf", patches, whitening_patterns())
    mixed = whitened @ np.asarray(variables["params"]["kernel"], np.float64)[0, 0]
    pooled = mixed.reshape(2, 4, 2, 4, 2, 6).max((2, 4))
    outputs: Any = layer.apply(variables, images)
    outputs = outputs.reshape(2, 4, 2, 4, 2, 6).max((2, 4))
    np.testing.assert_allclose(outputs, pooled, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("features", [3, 5, 8])
def test_first_filters_start_as_the_identity(features, getkey):
    images = jax.random.normal(getkey(), (2, 6, 6, 5))
    layer = nn.Conv(features, (3, 3), use_bias=False, kernel_init=dirac)
    outputs, variables = layer.init_with_output(getkey(), images)
    passed = min(features, 5)
    np.testing.assert_allclose(outputs[..., :passed], images[..., :passed], atol=1e-5)
    others = np.asarray(variables["params"]["kernel"])[..., passed:]
    assert others.size == 0 or 0 < np.abs(others).max() <= 1 / np.sqrt(9 * 5)
