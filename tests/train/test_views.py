"""Test-time augmentation against scipy's shifts."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.ndimage

import fmnist_jax as fm


def test_views_are_mirrored_and_shifted(getkey, sample):
    model = fm.create_model("valid_2x2")
    params = fm.create_train_state(getkey(), model, optax.sgd(0.1)).params
    images = sample.test_images[:7]

    def probabilities(view):
        pixels = jnp.asarray(view[..., None], jnp.float32) / 255
        logits: Any = model.apply({"params": params}, pixels, train=False)
        return jax.nn.softmax(logits)

    expected = np.zeros((7, 10))
    for shift, weight in (((0, 0), 0.25), ((1, 1), 0.125), ((-1, -1), 0.125)):
        shifted = scipy.ndimage.shift(images, (0, *shift), order=0)
        expected += weight * (probabilities(shifted) + probabilities(np.flip(shifted, axis=2)))
    sure = jax.tree.map(lambda leaf: 1e4 * leaf, params)
    assert np.isfinite(fm.predict_views(sure, jnp.asarray(images), model=model)).all()
    result = fm.predict_views(params, jnp.asarray(images), model=model)
    np.testing.assert_allclose(np.exp(result), expected, rtol=1e-4, atol=1e-6)
