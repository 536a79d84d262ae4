"""Random rotation, shift, shear, zoom, flip and resize as one affine map and one resample.

All functions are pure and traceable. Coordinates are (row, column) in pixels,
with pixel centres at whole numbers.
"""

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Transform(NamedTuple):
    """The geometric transform of one example. Every field is a float32 scalar.

    The fields are those of Keras' `ImageDataGenerator.get_random_transform`, in other units.

    Attributes:
      rotation: radians.
      row_shift: fraction of the image's side.
      column_shift: fraction of the image's side.
      shear: radians for Keras' shear, a slope for the geometric one.
      row_zoom: source pixels per pixel; above 1 the content shrinks.
      column_zoom: source pixels per pixel.
      flip: 1.0 mirrors left and right, 0.0 does not.
    """

    rotation: jax.Array
    row_shift: jax.Array
    column_shift: jax.Array
    shear: jax.Array
    row_zoom: jax.Array
    column_zoom: jax.Array
    flip: jax.Array


@dataclasses.dataclass(frozen=True)
class RandomAffine:
    """Random affine augmentation; each example draws uniformly from its own key.

    Attributes:
      rotation: largest rotation in degrees, in either direction.
      shift: largest shift of rows and of columns, as a fraction of the side.
      shear: largest shear: degrees if `keras_shear`, else a slope (0.2 moves a row's pixels by 0.2
        of its distance from the centre).
      zoom: rows and columns are scaled independently by 1 - zoom to 1 + zoom.
      flip: whether half of the images are mirrored.
      keras_shear: whether the shear is in degrees, as Keras' `shear_range`, of which 0.2 is
        invisible.
      image_size: side of the square result in pixels; None keeps the images' own.

    Example:
      >>> keys = jax.random.split(jax.random.key(0), 2)
      >>> images = jnp.zeros((2, 28, 28), jnp.uint8)
      >>> dataclasses.replace(AUGMENTATIONS["keras"], image_size=40)(keys, images).shape
      (2, 40, 40, 1)
    """

    rotation: float = 40.0
    shift: float = 0.2
    shear: float = 0.2
    zoom: float = 0.2
    flip: bool = True
    keras_shear: bool = False
    image_size: int | None = None

    def __call__(
        self, keys: jax.Array, images: jax.Array, strength: float | jax.Array = 1.0
    ) -> jax.Array:
        """Draws a transform for each key and applies it.

        Args:
          keys: typed PRNG keys of shape [batch], each used here and nowhere else.
          images: uint8[batch, side, side].
          strength: scales every range and the probability of a flip; 0 only resizes. It may be
            traced.

        Returns:
          float32[batch, image_size, image_size, 1], values in [0, 1].
        """
        transforms = jax.vmap(self.draw, (0, None))(keys, jnp.asarray(strength, jnp.float32))
        return apply(transforms, images, keras_shear=self.keras_shear, image_size=self.image_size)

    def draw(self, key: jax.Array, strength: float | jax.Array = 1.0) -> Transform:
        """Draws the transform of one example, with the ranges scaled by the strength."""
        *draws, side = jax.random.uniform(key, (7,), minval=-1)
        draws = [strength * draw for draw in draws]
        degree = jnp.pi / 180
        return Transform(
            rotation=self.rotation * degree * draws[0],
            row_shift=self.shift * draws[1],
            column_shift=self.shift * draws[2],
            shear=self.shear * (degree if self.keras_shear else 1) * draws[3],
            row_zoom=1 + self.zoom * draws[4],
            column_zoom=1 + self.zoom * draws[5],
            flip=jnp.where(self.flip & (side < jnp.minimum(strength, 1) - 1), 1.0, 0.0),
        )


def apply(
    transforms: Transform,
    images: jax.Array,
    *,
    keras_shear: bool = False,
    image_size: int | None = None,
) -> jax.Array:
    """Applies one transform to each image, with bilinear interpolation and edge padding.

    Args:
      transforms: fields of shape [batch].
      images: uint8[batch, side, side].
      keras_shear: whether `shear` is an angle.
      image_size: side of the result in pixels; None keeps the images' own.

    Returns:
      float32[batch, image_size, image_size, 1], values in [0, 1].
    """
    side = images.shape[1]
    matrices = jax.vmap(lambda transform: _source_matrix(transform, side, keras_shear))(transforms)
    pixels = jax.vmap(lambda image, matrix: _resample(image, matrix, image_size or side))(
        images.astype(jnp.float32) / 255, matrices
    )
    return pixels[..., None]


def _source_matrix(transform: Transform, side: int, keras_shear: bool) -> jax.Array:
    """Returns float32[2, 3], from (row, column) about the centre to those of the source."""
    cos, sin = jnp.cos(transform.rotation), jnp.sin(transform.rotation)
    shear = transform.shear
    slope, height = (jnp.sin(shear), jnp.cos(shear)) if keras_shear else (shear, 1.0)
    # Keras multiplies rotation, shift, shear and zoom in this order, and exchanges rows and columns
    # of the product. Written out, that is:
    rotate = jnp.array([[cos, sin], [-sin, cos]])
    shift = side * jnp.stack([transform.column_shift, transform.row_shift])
    shear_and_zoom = jnp.array(
        [
            [height * transform.column_zoom, 0.0],
            [-slope * transform.column_zoom, transform.row_zoom],
        ]
    )
    linear = rotate @ shear_and_zoom
    # The flip is last in Keras, and so first on the way back to the source.
    linear = linear * jnp.stack([1.0, 1 - 2 * transform.flip])[None, :]
    return jnp.concatenate([linear, (rotate @ shift)[:, None]], axis=1)


def _resample(image: jax.Array, matrix: jax.Array, image_size: int) -> jax.Array:
    side = image.shape[0]
    # Centres of the result's pixels, measured from the middle in source pixels.
    steps = (jnp.arange(image_size) + 0.5) * (side / image_size) - side / 2
    row, column = steps[:, None], steps[None, :]
    centre = side / 2 - 0.5
    source = [
        matrix[axis, 0] * row + matrix[axis, 1] * column + matrix[axis, 2] + centre
        for axis in (0, 1)
    ]
    return jax.scipy.ndimage.map_coordinates(image, source, order=1, mode="nearest")


# The ranges are those of Keras' `ImageDataGenerator(rotation_range=40, width_shift_range=.2,
# height_shift_range=.2, shear_range=.2, zoom_range=.2, horizontal_flip=True)`.
AUGMENTATIONS: Mapping[str, RandomAffine] = MappingProxyType(
    {"keras": RandomAffine(keras_shear=True), "geometric": RandomAffine()}
)
