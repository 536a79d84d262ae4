"""The augmentation against Keras, scipy and its own promises."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from keras.src.legacy.preprocessing.image import ImageDataGenerator

from fmnist_jax.data import augment
from fmnist_jax.data.augment import AUGMENTATIONS, Transform

IDENTITY = {
    "rotation": 0.0,
    "row_shift": 0.0,
    "column_shift": 0.0,
    "shear": 0.0,
    "row_zoom": 1.0,
    "column_zoom": 1.0,
    "flip": 0.0,
}


def transform(**changes):
    fields = IDENTITY | changes
    return Transform(*(jnp.full((1,), fields[name], jnp.float32) for name in Transform._fields))


def transformed(image, *, keras_shear=False, image_size=None, **changes):
    result = augment.apply(
        transform(**changes), image[None], keras_shear=keras_shear, image_size=image_size
    )
    return np.asarray(result)[0, ..., 0]


def test_keras_draws_give_what_keras_makes_of_them(sample):
    generator = ImageDataGenerator(
        rotation_range=40,
        width_shift_range=0.2,
        height_shift_range=0.2,
        shear_range=0.2,
        zoom_range=0.2,
        horizontal_flip=True,
    )
    flips = 0
    for seed in range(24):
        image = sample.train_images[seed]
        draw = generator.get_random_transform((28, 28, 1), seed=seed)
        expected = generator.apply_transform(image[..., None].astype(np.float32), draw)[..., 0]
        result = transformed(
            image,
            keras_shear=True,
            rotation=np.deg2rad(draw["theta"]),
            row_shift=draw["tx"] / 28,
            column_shift=draw["ty"] / 28,
            shear=np.deg2rad(draw["shear"]),
            row_zoom=draw["zx"],
            column_zoom=draw["zy"],
            flip=draw["flip_horizontal"],
        )
        flips += draw["flip_horizontal"]
        np.testing.assert_allclose(result * 255, expected, atol=1e-2)
    assert 0 < flips < 24


def test_geometric_shear_and_zoom_are_those_of_scipy(sample):
    image, slope, zoom = sample.train_images[0], 0.2, 1.15
    centre = np.array([13.5, 13.5])
    # In (row, column): the column's step moves the row by -slope, and the row's is the zoom.
    matrix = np.array([[1.0, 0.0], [-slope, zoom]])
    expected = scipy.ndimage.affine_transform(
        image.astype(np.float64), matrix, centre - matrix @ centre, order=1, mode="nearest"
    )
    result = transformed(image, shear=slope, row_zoom=zoom)
    np.testing.assert_allclose(result * 255, expected, atol=1e-2)


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_right_angles_are_exact(turns, sample):
    image = sample.train_images[1]
    result = transformed(image, rotation=turns * np.pi / 2)
    np.testing.assert_allclose(result * 255, np.rot90(image, turns), atol=1e-2)


def test_flip_and_identity_are_exact(sample):
    image = sample.train_images[2]
    np.testing.assert_allclose(transformed(image) * 255, image, atol=1e-3)
    np.testing.assert_allclose(transformed(image, flip=1.0) * 255, image[:, ::-1], atol=1e-3)


@pytest.mark.parametrize("side", [14, 28, 150])
def test_resize_alone_is_bilinear_with_pixel_centres(side, sample):
    image = sample.train_images[3]
    steps = (np.arange(side) + 0.5) * 28 / side - 0.5
    expected = scipy.ndimage.map_coordinates(
        image.astype(np.float64), np.meshgrid(steps, steps, indexing="ij"), order=1, mode="nearest"
    )
    np.testing.assert_allclose(transformed(image, image_size=side) * 255, expected, atol=1e-2)


def test_resize_of_training_is_the_resize_of_evaluation(sample):
    image = sample.train_images[4]
    expected = jax.image.resize(jnp.asarray(image / np.float32(255)), (150, 150), "bilinear")
    np.testing.assert_allclose(transformed(image, image_size=150), expected, atol=1e-5)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_draws_are_even_over_their_ranges(name, getkey):
    random_affine = AUGMENTATIONS[name]
    draws = jax.vmap(random_affine.draw)(jax.random.split(getkey(), 20_000))
    shear = np.deg2rad(0.2) if name == "keras" else 0.2
    ranges = {
        "rotation": (-np.deg2rad(40), np.deg2rad(40)),
        "row_shift": (-0.2, 0.2),
        "column_shift": (-0.2, 0.2),
        "shear": (-shear, shear),
        "row_zoom": (0.8, 1.2),
        "column_zoom": (0.8, 1.2),
    }
    for field, (low, high) in ranges.items():
        values = np.asarray(getattr(draws, field))
        assert low <= values.min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < values.max() <= high
        np.testing.assert_allclose(values.mean(), (low + high) / 2, atol=0.01 * (high - low))
    flips = np.asarray(draws.flip)
    assert set(np.unique(flips)) == {0.0, 1.0}
    np.testing.assert_allclose(flips.mean(), 0.5, atol=0.02)
    correlations = np.corrcoef(np.stack([np.asarray(field) for field in draws]))
    np.testing.assert_allclose(correlations, np.eye(7), atol=0.04)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_an_image_depends_on_its_own_key_alone(name, getkey, sample):
    random_affine = dataclasses.replace(AUGMENTATIONS[name], image_size=40)
    keys, images = jax.random.split(getkey(), 5), jnp.asarray(sample.train_images[:5])
    batch = jax.jit(random_affine)(keys, images)
    chex.assert_shape(batch, (5, 40, 40, 1))
    chex.assert_type(batch, jnp.float32)
    assert 0 <= batch.min() <= batch.max() <= 1
    alone = jax.jit(random_affine)(keys[3:4], images[3:4])
    chex.assert_trees_all_close(alone[0], batch[3], atol=1e-6)
    assert not np.allclose(random_affine(keys[:1], images[3:4])[0], batch[3], atol=1e-2)


def test_equal_settings_are_one_compiled_program(getkey, sample):
    keys, images = jax.random.split(getkey(), 2), jnp.asarray(sample.train_images[:2])

    @chex.assert_max_traces(n=1)
    def apply(keys, images, random_affine):
        return random_affine(keys, images)

    compiled = jax.jit(apply, static_argnums=2)
    for _ in range(3):
        compiled(keys, images, dataclasses.replace(AUGMENTATIONS["keras"]))


def test_the_strength_is_a_share_of_every_range(getkey):
    keys = jax.random.split(getkey(), 4000)
    ranges = AUGMENTATIONS["geometric"]
    full, half, none = (
        jax.vmap(lambda key, s=strength: ranges.draw(key, s))(keys) for strength in (1.0, 0.5, 0.0)
    )
    for name in Transform._fields[:-1]:
        middle = IDENTITY[name]
        np.testing.assert_allclose(
            getattr(half, name) - middle, (getattr(full, name) - middle) / 2, atol=1e-6
        )
        np.testing.assert_array_equal(getattr(none, name), middle)
    for result, share in ((full, 0.5), (half, 0.25), (none, 0.0)):
        assert abs(np.mean(result.flip) - share) < 5 * np.sqrt(0.25 / 4000)
    images = jax.random.bits(getkey(), (2, 28, 28), jnp.uint8)
    np.testing.assert_allclose(
        jax.jit(ranges)(keys[:2], images, 0.0)[..., 0], np.asarray(images) / 255, atol=1e-6
    )
