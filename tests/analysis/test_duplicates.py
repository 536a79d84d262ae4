"""Planted duplicates are found and nothing else; distances equal int64 arithmetic and scipy."""

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from fmnist_jax.analysis import duplicates


def noise(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_exact_duplicates_are_grouped_by_bytes():
    images = noise(0, 50, 6, 5)
    images[[17, 40]] = images[3]
    images[49] = images[0]
    images[8] = images[7]
    images[8, 5, 4] ^= 1  # a near-duplicate
    assert duplicates.exact_duplicates(images) == [[0, 49], [3, 17, 40]]
    assert duplicates.exact_duplicates(images[:3]) == []
    assert duplicates.exact_duplicates(images[:, ::2, ::-1]) == [[0, 49], [3, 17, 40], [7, 8]]


@pytest.mark.parametrize("block", [7, 23, 1024])
def test_nearest_equals_brute_force(block, monkeypatch):
    monkeypatch.setattr(duplicates, "_BLOCK", block)
    images = noise(1, 60, 9, 4)
    # White images that differ in one pixel, a black image, and duplicates: ties must be exact.
    images[:3], images[3] = 255, 0
    images[1, 0, 0], images[2, 0, 0] = 254, 253
    images[50] = images[40]
    others = np.concatenate([noise(2, 23, 9, 4), images[::-2]])
    positions, distances = duplicates.nearest(images, others)
    flat, other_flat = images.reshape(60, -1) / 255.0, others.reshape(len(others), -1) / 255.0
    squares = cdist(np.round(flat * 255), np.round(other_flat * 255), "sqeuclidean")
    expected = squares.argmin(axis=1)
    np.testing.assert_array_equal(positions, expected)
    far = cdist(flat, other_flat)
    np.testing.assert_allclose(distances, far[np.arange(60), expected], atol=1e-12)


@pytest.mark.parametrize(
    ("images", "others", "least"),
    [
        (noise(5, 40, 32, 32) // 250, 255 - noise(6, 40, 32, 32) // 250, 66_000_000),
        (noise(5, 40, 32, 32) // 250, noise(6, 40, 32, 32) // 250, 0),
        (noise(5, 40, 32, 32) // 128 * 255, noise(6, 40, 32, 32) // 128 * 255, 29_000_000),
    ],
    ids=["black and white", "black", "both"],
)
def test_float32_products_equal_int64_arithmetic(images, others, least):
    """At the largest number of pixels and the largest values, where rounding would show first."""
    positions, distances = duplicates.nearest(images, others)
    a, b = images.reshape(40, 1, -1).astype(np.int64), others.reshape(1, 40, -1).astype(np.int64)
    squares = ((a - b) ** 2).sum(axis=2)
    assert squares.min() > least
    np.testing.assert_array_equal(positions, squares.argmin(axis=1))
    np.testing.assert_array_equal(distances, np.sqrt(squares.min(axis=1)) / 255)


@pytest.mark.parametrize("shape", [(33, 31, 3), (224, 224, 3)])
def test_products_of_many_values_are_exact(shape):
    """White against black, where 32 bits overflow, and noise."""
    images = np.concatenate([np.full((1, *shape), 255, np.uint8), noise(5, 2, *shape)])
    others = np.concatenate([np.zeros((1, *shape), np.uint8), noise(6, 2, *shape)])
    for first, second in ((images, others), (images[:1], others[:1]), (others[:1], images[:1])):
        a, b = first.reshape(len(first), 1, -1), second.reshape(1, len(second), -1)
        squares = np.array([[((x.astype(int) - y) ** 2).sum() for y in b[0]] for x in a[:, 0]])
        positions, distances = duplicates.nearest(first, second)
        np.testing.assert_array_equal(positions, squares.argmin(axis=1))
        np.testing.assert_array_equal(distances, np.sqrt(squares.min(axis=1)) / 255)


def test_a_mirrored_image_in_colour_keeps_its_channels():
    images, others = noise(7, 3, 6, 5, 3), noise(8, 4, 6, 5, 3)
    others[2], others[3] = images[1][:, ::-1], images[0][..., ::-1]
    matches = duplicates.match(images, others)
    assert (matches.distances < duplicates.NEAR).tolist() == [False, True, False]
    assert (matches.others[1], matches.mirrored[1], matches.distances[1]) == (2, True, 0)
    norms = np.sqrt((images.astype(float) ** 2).sum(axis=(1, 2, 3)))
    both = [
        cdist(x.reshape(3, -1), others.reshape(4, -1) * 1.0) for x in (images, images[:, :, ::-1])
    ]
    np.testing.assert_allclose(matches.distances, np.min(both, axis=(0, 2)) / norms)
    assert duplicates.exact_duplicates(np.concatenate([others, images[1:2, :, ::-1]])) == [[2, 4]]


def test_progress_covers_all_blocks(monkeypatch):
    monkeypatch.setattr(duplicates, "_BLOCK", 4)
    seen = []

    def track(blocks):
        for block in blocks:
            seen.append(block)
            yield block

    duplicates.nearest(noise(3, 3, 2, 2), noise(4, 10, 2, 2), track=track)
    assert seen == [0, 4, 8]


@pytest.mark.parametrize(
    ("images", "others", "message"),
    [
        (noise(0, 3, 4, 4) / 255, noise(0, 3, 4, 4), r"images are float64\[3, 4, 4\]"),
        (noise(0, 3, 4, 4), noise(0, 3, 16), r"others are uint8\[3, 16\]"),
        (noise(0, 3, 4, 4), noise(0, 3, 4, 5), r"others \(3, 4, 5\); both must"),
        (noise(0, 3, 4, 4, 3), noise(0, 3, 4, 4), r"others \(3, 4, 4\); both must"),
        (noise(0, 1, 4, 4), noise(0, 0, 4, 4), r"others \(0, 4, 4\).*at least one"),
    ],
)
def test_invalid_input_is_named(images, others, message):
    with pytest.raises(ValueError, match=message):
        duplicates.nearest(images, others)


def test_planted_near_and_mirrored_duplicates_are_found(tiny):
    train, test = tiny.train_images.copy(), tiny.test_images.copy()
    rng = np.random.default_rng(4)
    noisy = np.clip(test[5] + rng.integers(-3, 4, test[5].shape), 0, 255).astype(np.uint8)
    train[11], train[22], train[33] = test[2], noisy, test[9][:, ::-1]
    train[44], test[13] = 0, 0  # two black images
    matches = duplicates.match(test, train)
    near = np.flatnonzero(matches.distances < duplicates.NEAR)
    assert near.tolist() == [2, 5, 9, 13]
    assert matches.others[near].tolist() == [11, 22, 33, 44]
    assert matches.mirrored[near].tolist() == [False, False, True, False]
    a = test.reshape(20, -1).astype(np.float64)
    b = train[matches.others].astype(np.float64)
    b[matches.mirrored] = b[matches.mirrored, :, ::-1]
    difference = np.linalg.norm(a - b.reshape(20, -1), axis=1)
    norms = np.where(a.any(axis=1), np.linalg.norm(a, axis=1), 1)
    np.testing.assert_allclose(matches.distances, difference / norms, atol=1e-12)


def test_black_image_is_near_black_images_only(tiny):
    matches = duplicates.match(np.zeros((1, 28, 28), np.uint8), tiny.train_images)
    assert matches.distances.tolist() == [np.inf]
