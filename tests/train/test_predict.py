"""Prediction and evaluation against the plain model, and test-time augmentation against scipy."""

from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.ndimage

import fmnist_jax as fm
from fmnist_jax.train import metrics
from fmnist_jax.train import predict as predict_lib
from fmnist_jax.train.predict import predict_tta
from tests.small import Linear, Small


@pytest.fixture(scope="module")
def variables():
    config = fm.StepConfig(model=Small(), tx=optax.sgd(0.1))
    return fm.create_train_state(jax.random.key(0), config).variables


def test_every_image_counts_once(variables, sample):
    images, labels = sample.test_images[:53], sample.test_labels[:53]
    pixels = images[..., None].astype(np.float32) / 255
    expected: Any = Small().apply(variables, pixels, train=False)
    for batch_size in (10, 53, 60):
        logits = fm.predict(variables, images, model=Small(), batch_size=batch_size)
        chex.assert_shape(logits, (53, 10))
        chex.assert_trees_all_close(logits, expected, rtol=1e-5, atol=1e-5)
    result = fm.evaluate(variables, images, labels, model=Small(), batch_size=10)
    assert int(result.num_examples) == 53
    values = result.means()
    assert values["accuracy"] == np.mean(np.asarray(expected).argmax(axis=1) == labels)
    exact = np.asarray(expected, np.float64)
    losses = np.log(np.exp(exact).sum(axis=1)) - exact[np.arange(53), labels]
    np.testing.assert_allclose(values["loss"], losses.mean(), rtol=1e-5)


def test_one_program_serves_any_number_of_images(variables, sample, monkeypatch):
    monkeypatch.setattr(predict_lib, "_CALL_SIZE", 20)
    traces: list[None] = []

    class Counted(Small):
        def apply(self, *args, **kwargs):
            traces.append(None)
            return super().apply(*args, **kwargs)

    model = Counted()
    done: list[int] = []
    for num_images in (45, 20, 31):
        logits = fm.predict(
            variables, sample.test_images[:num_images], model=model, batch_size=10,
            on_call=done.append,
        )  # fmt: skip
        chex.assert_shape(logits, (num_images, 10))
    assert done == [20, 40, 45, 20, 20, 31]
    assert len(traces) == 1


def test_images_may_have_a_channel_be_on_the_device_traced_or_missing(variables, sample):
    images = sample.test_images[:7]
    expected = fm.predict(variables, images, model=Small())
    for same in (images[..., None], jnp.asarray(images)):
        chex.assert_trees_all_equal(fm.predict(variables, same, model=Small()), expected)
    traced = jax.jit(lambda x: fm.predict(variables, x, model=Small()))(images)
    chex.assert_trees_all_close(traced, expected, rtol=1e-5, atol=1e-5)
    for function in (fm.predict, predict_tta):
        chex.assert_shape(function(variables, images[:0], model=Small()), (0, 10))
    with pytest.raises(ValueError, match="batch_size is 0"):
        fm.predict(variables, images, model=Small(), batch_size=0)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (np.zeros((2, 28, 28), np.float32), TypeError, "images are float32; expected uint8"),
        (np.zeros((28, 28), np.uint8), ValueError, r"images have shape \(28, 28\)"),
        (np.zeros((2, 28, 28, 4), np.uint8), ValueError, r"expected \[n, height, width\]"),
    ],
)
def test_other_images_are_refused(images, error, message, variables):
    with pytest.raises(error, match=message):
        fm.predict(variables, images, model=Small())


def test_other_labels_are_refused(variables, sample):
    images, labels = sample.test_images[:2], sample.test_labels[:2]
    for wrong in (labels[:1], labels[:, None]):
        with pytest.raises(ValueError, match="expected one label per image"):
            fm.evaluate(variables, images, wrong, model=Small())
    with pytest.raises(ValueError, match="at least one image"):
        fm.evaluate(variables, images[:0], labels[:0], model=Small())


def test_sums_are_float32_whatever_the_dtype_of_the_model(tiny):
    class Half(nn.Module):
        @nn.compact
        def __call__(self, images, *, train):
            del train
            return nn.Dense(10, dtype=jnp.bfloat16)(images.reshape(len(images), -1))

    config = fm.StepConfig(model=Half(), tx=optax.sgd(0.1))
    state = fm.create_train_state(jax.random.key(0), config)
    result = fm.evaluate(state.variables, tiny.test_images, tiny.test_labels, model=Half())
    chex.assert_trees_all_equal_dtypes(result, metrics.zeros())


@pytest.mark.parametrize("shape", [(28, 28), (12, 20, 3)])
def test_tta_averages_the_probabilities_of_shifted_and_mirrored_images(shape):
    config = fm.StepConfig(model=Linear(), tx=optax.sgd(0.1))
    variables = fm.create_train_state(jax.random.key(1), config, image_shape=shape).variables
    images = np.random.default_rng(0).integers(0, 256, (7, *shape), np.uint8)

    def probabilities(view):
        pixels = view.reshape(*view.shape[:3], -1) / np.float32(255)
        logits: Any = Linear().apply(variables, pixels, train=False)
        return jax.nn.softmax(logits)

    expected = np.zeros((7, 10))
    for shift, weight in (((0, 0), 0.25), ((1, 1), 0.125), ((-1, -1), 0.125)):
        shifted = scipy.ndimage.shift(images, (0, *shift, 0)[: images.ndim], order=0)
        expected += weight * (probabilities(shifted) + probabilities(np.flip(shifted, axis=2)))
    result = predict_tta(variables, images, model=Linear())
    np.testing.assert_allclose(np.exp(result), expected, rtol=1e-4, atol=1e-6)
    confident = jax.tree.map(lambda leaf: 1e4 * leaf, variables)
    assert np.isfinite(predict_tta(confident, images, model=Linear())).all()
