"""Duplicates that were planted are found, and nothing else; distances against scipy."""

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from fmnist_jax.analysis import duplicates


def noise(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_exact_duplicates():
    images = noise(0, 50, 6, 5)
    images[[17, 40]] = images[3]
    images[49] = images[0]
    images[8] = images[7]
    images[8, 5, 4] ^= 1  # nearly does not count
    assert duplicates.exact_duplicates(images) == [[0, 49], [3, 17, 40]]
    assert duplicates.exact_duplicates(images[:3]) == []
    assert duplicates.exact_duplicates(images[:, ::2, ::-1]) == [[0, 49], [3, 17, 40], [7, 8]]


@pytest.mark.parametrize(("count", "tile"), [(1, 23), (3, 7), (5, 1024)])
@pytest.mark.parametrize("exclude_self", [False, True])
def test_nearest_is_the_brute_force(count, tile, exclude_self):
    images = noise(1, 60, 9, 4)
    # Black, white, and neighbours that rounding could confuse.
    images[:3], images[3] = 255, 0
    images[1, 0, 0], images[2, 0, 0] = 254, 253
    others = images if exclude_self else np.concatenate([noise(2, 23, 9, 4), images[::-2]])
    indices, distances = duplicates.nearest(
        images, others, count=count, exclude_self=exclude_self, tile=tile
    )
    flat, other_flat = images.reshape(60, -1) / 255.0, others.reshape(len(others), -1) / 255.0
    squares = cdist(np.round(flat * 255), np.round(other_flat * 255), "sqeuclidean")
    if exclude_self:
        np.fill_diagonal(squares, np.inf)
    expected = np.argsort(squares, axis=1, kind="stable")[:, :count]
    np.testing.assert_array_equal(indices, expected)
    far = cdist(flat, other_flat)
    np.testing.assert_allclose(distances, np.take_along_axis(far, expected, 1), atol=1e-12)


def test_the_largest_images_lose_no_bit():
    # One step of one pixel decides, next to squared distances of 66 million.
    black, white = np.zeros((1, 32, 32), np.uint8), np.full((3, 32, 32), 255, np.uint8)
    white[1, 31, 31], white[2, 31, 31] = 253, 254
    indices, distances = duplicates.nearest(black, white, count=3)
    assert indices.tolist() == [[1, 2, 0]]
    squares = 1023 * 255**2 + np.array([253, 254, 255]) ** 2
    np.testing.assert_array_equal(distances[0], np.sqrt(squares) / 255)


def test_progress_sees_each_tile():
    seen = []

    def track(tiles):
        for tile in tiles:
            seen.append(tile)
            yield tile

    duplicates.nearest(noise(3, 10, 2, 2), noise(4, 3, 2, 2), tile=4, track=track)
    assert seen == [0, 4, 8]


@pytest.mark.parametrize(
    ("images", "others", "options", "message"),
    [
        (noise(0, 3, 4, 4) / 255, noise(0, 3, 4, 4), {}, r"images are float64\[3, 4, 4\]"),
        (noise(0, 3, 4, 4), noise(0, 3, 16), {}, r"others are uint8\[3, 16\]"),
        (noise(0, 3, 4, 4), noise(0, 3, 4, 5), {}, "of one size"),
        (noise(0, 1, 32, 33), noise(0, 1, 32, 33), {}, "at most 1,024 pixels"),
        (noise(0, 3, 4, 4), noise(0, 2, 4, 4), {"exclude_self": True}, "must be the same images"),
        (noise(0, 3, 4, 4), noise(0, 3, 4, 4), {"count": 3, "exclude_self": True}, "count is 3"),
        (noise(0, 3, 4, 4), noise(0, 3, 4, 4), {"tile": 0}, "tile 0"),
    ],
)
def test_bad_input(images, others, options, message):
    with pytest.raises(ValueError, match=message):
        duplicates.nearest(images, others, **options)


def test_planted_near_and_mirrored_duplicates(tiny):
    train, test = tiny.train_images.copy(), tiny.test_images.copy()
    rng = np.random.default_rng(4)
    noisy = np.clip(test[5] + rng.integers(-3, 4, test[5].shape), 0, 255).astype(np.uint8)
    train[11], train[22], train[33] = test[2], noisy, test[9][:, ::-1]
    train[44], test[13] = 0, 0  # two empty images
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


def test_an_empty_image_is_near_to_nothing_else(tiny):
    matches = duplicates.match(np.zeros((1, 28, 28), np.uint8), tiny.train_images)
    assert matches.distances.tolist() == [np.inf]
