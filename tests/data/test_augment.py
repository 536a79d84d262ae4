"""The augmentation against Keras and SciPy, and its distributions."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
import scipy.stats
from keras.src.legacy.preprocessing.image import ImageDataGenerator

from fmnist_jax.data import augment
from fmnist_jax.data.augment import (
    AUGMENTATIONS,
    RandomAffine,
    RandomShift,
    Transform,
)

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


def test_transforms_drawn_by_keras_give_the_images_of_keras(sample):
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


def test_geometric_shear_and_zoom_equal_those_of_scipy(sample):
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


@pytest.mark.parametrize("name", ["keras", "geometric"])
def test_draws_are_even_over_their_ranges(name, getkey):
    random_affine = AUGMENTATIONS[name]
    assert isinstance(random_affine, RandomAffine)
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
def test_an_image_depends_on_its_index_and_the_epoch_only(name, getkey, sample):
    augmentation, side = AUGMENTATIONS[name], 28
    if isinstance(augmentation, RandomAffine):
        augmentation, side = dataclasses.replace(augmentation, image_size=40), 40
    key, examples = getkey(), jnp.array([7, 2, 9, 1, 3])
    images = jnp.asarray(sample.train_images[examples])
    compiled = jax.jit(augmentation)
    batch = compiled(key, jnp.int32(4), examples, images)
    chex.assert_shape(batch, (5, side, side, 1))
    chex.assert_type(batch, jnp.float32)
    assert 0 <= batch.min() <= batch.max() <= 1
    alone = compiled(key, jnp.int32(4), examples[3:4], images[3:4])
    chex.assert_trees_all_close(alone[0], batch[3], atol=1e-6)
    # Some of the others may draw the same shift, which has few values.
    others = [
        compiled(key, jnp.int32(epoch), examples[number : number + 1], images[3:4])
        for epoch, number in ((5, 3), (6, 3), (8, 3), (4, 0), (4, 1), (4, 2))
    ]
    assert sum(not np.allclose(other[0], batch[3], atol=1e-2) for other in others) >= 3


def test_equal_settings_share_one_compiled_program(getkey, sample):
    images = jnp.asarray(sample.train_images[:2])

    @chex.assert_max_traces(n=1)
    def apply(key, images, augmentation):
        return augmentation(key, jnp.int32(0), jnp.arange(2), images)

    compiled = jax.jit(apply, static_argnums=2)
    for _ in range(3):
        compiled(getkey(), images, dataclasses.replace(AUGMENTATIONS["keras"]))


def test_strength_scales_every_range(getkey):
    keys = jax.random.split(getkey(), 4000)
    ranges = AUGMENTATIONS["geometric"]
    assert isinstance(ranges, RandomAffine)
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


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_zero_strength_changes_nothing(name, getkey):
    images = jax.random.bits(getkey(), (8, 28, 28), jnp.uint8)
    result = jax.jit(AUGMENTATIONS[name])(getkey(), jnp.int32(0), jnp.arange(8), images, 0.0)
    np.testing.assert_allclose(result[..., 0], np.asarray(images) / 255, atol=1e-6)


def shifted(image, rows, columns):
    """The image shifted down and right, on a black background."""
    padded = np.pad(image, 4)
    return np.roll(padded, (rows, columns), (0, 1))[4:-4, 4:-4]


def test_shifts_are_even_and_flips_alternate(getkey):
    image = np.asarray(jax.random.bits(getkey(), (28, 28), jnp.uint8))
    candidates = {
        (rows, columns, flip): shifted(image[:, ::-1] if flip else image, rows, columns)
        for rows in range(-2, 3)
        for columns in range(-2, 3)
        for flip in (False, True)
    }
    places = {value.tobytes(): place for place, value in candidates.items()}
    key, examples = getkey(), jnp.arange(2000)
    images = jnp.broadcast_to(jnp.asarray(image), (2000, 28, 28))
    augmented = jax.jit(RandomShift(shift=2))
    draws = []
    for epoch in range(2):
        pixels = augmented(key, jnp.int32(epoch), examples, images)[..., 0]
        pixels = np.asarray(jnp.round(255 * pixels).astype(jnp.uint8))
        draws.append(np.array([places[value.tobytes()] for value in pixels]))
    first, second = draws
    np.testing.assert_array_equal(first[:, 2], 1 - second[:, 2])
    assert abs(first[:, 2].mean() - 0.5) < 4 * np.sqrt(0.25 / 2000)
    for draw in draws:
        counts = np.array([
            np.sum((draw[:, 0] == rows) & (draw[:, 1] == columns))
            for rows in range(-2, 3)
            for columns in range(-2, 3)
        ])  # fmt: skip
        assert scipy.stats.chisquare(counts).pvalue > 1e-4
    assert abs(np.corrcoef(first[:, 0], second[:, 0])[0, 1]) < 0.1


def test_erased_rectangles_have_the_areas_and_ratios_of_the_paper(getkey):
    augmentation = RandomShift(shift=0, flip=False, erase=0.5)
    images = jnp.full((4000, 100, 100), 255, jnp.uint8)
    pixels = jax.jit(augmentation)(getkey(), jnp.int32(0), jnp.arange(4000), images)[..., 0]
    erased = np.asarray(pixels) < 1
    assert abs(erased.any((1, 2)).mean() - 0.5) < 4 * np.sqrt(0.25 / 4000)
    np.testing.assert_allclose(np.asarray(pixels)[erased], 0.286, rtol=1e-6)
    heights, widths = erased.any(2).sum(1), erased.any(1).sum(1)
    np.testing.assert_array_equal(heights * widths, erased.sum((1, 2)))  # rectangles
    some = heights > 0
    # Sides are rounded to whole pixels, with errors of up to one.
    areas = erased.sum((1, 2))[some] / 1e4
    assert 0.015 < areas.min() < 0.03
    assert 0.37 < areas.max() < 0.42
    np.testing.assert_allclose(areas.mean(), 0.21, atol=0.01)
    ratios = np.log(heights[some] / widths[some])
    assert np.abs(ratios).max() < np.log(1 / 0.3) + 0.15
    np.testing.assert_allclose(ratios.mean(), 0, atol=0.05)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_colours_are_augmented_alike(name, getkey):
    augmentation, key = AUGMENTATIONS[name], getkey()
    if isinstance(augmentation, RandomShift):
        augmentation = dataclasses.replace(augmentation, erase_value=(0.25, 0.25, 0.25))
    images = jax.random.bits(getkey(), (20, 10, 10, 3), jnp.uint8)
    examples = jnp.arange(20)
    augmented = augmentation(key, jnp.int32(3), examples, images)
    chex.assert_shape(augmented, images.shape)
    for channel in range(3):
        grey = augmentation(key, jnp.int32(3), examples, images[..., channel])
        np.testing.assert_allclose(augmented[..., channel], grey[..., 0], atol=1e-6)


def test_erased_rectangles_have_the_colour_that_is_given(getkey):
    colour = (0.1, 0.5, 0.9)
    augmentation = RandomShift(shift=0, flip=False, erase=1.0, erase_value=colour)
    images = jnp.zeros((50, 12, 16, 3), jnp.uint8)
    pixels = np.asarray(augmentation(getkey(), jnp.int32(0), jnp.arange(50), images))
    erased = np.any(pixels > 0, axis=-1)
    assert np.any(erased, axis=(1, 2)).mean() > 0.9
    np.testing.assert_allclose(pixels[erased], np.tile(colour, (erased.sum(), 1)), rtol=1e-6)
