"""Random augmentation of training images: affine maps, or shifts by whole pixels and erasing.

All functions are pure and traceable. Coordinates are (row, column) in pixels, and pixel centers are
integers.
"""

import dataclasses
import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

_PIXEL_MEAN = 0.2860  # of the training images of Fashion-MNIST
# Area of an erased rectangle, as a fraction of the image, and its minimum aspect ratio; the maximum
# is the inverse (Zhong et al. 2017).
_ERASE_AREA, _ERASE_ASPECT = (0.02, 0.4), 0.3
_NO_EPOCH = 2**31 - 1  # in place of the epoch, for draws shared by all epochs


class Augmentation(Protocol):
    """A random augmentation, hashable because it is a compile-time constant.

    Attributes:
      image_size: side of the square result in pixels; None keeps that of the images.
      flip: whether images are mirrored.
    """

    @property
    def image_size(self) -> int | None: ...  # noqa: D102
    @property
    def flip(self) -> bool: ...  # noqa: D102

    def __call__(
        self,
        key: jax.Array,
        epoch: jax.Array,
        examples: jax.Array,
        images: jax.Array,
        strength: float | jax.Array = 1.0,
    ) -> jax.Array:
        """Augments images; each result depends on key, epoch and example, not on the batch.

        Args:
          key: the augment stream of the run.
          epoch: int32[], counted from 0.
          examples: int32[batch], indices of the images in the training data.
          images: uint8[batch, side, side], or [batch, side, side, 3] in colour.
          strength: scale of every range, may be traced; 0 changes only the size.

        Returns:
          float32[batch, image_size, image_size, channels], values in [0, 1].
        """
        ...


def example_keys(key: jax.Array, epoch: int | jax.Array, examples: jax.Array) -> jax.Array:
    """Derives one key per example of an epoch from the augment stream."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, epoch), examples)


def with_channels(images: jax.Array) -> jax.Array:
    """Returns [batch, height, width, channels]: grey images get their channel."""
    return images[..., None] if images.ndim == 3 else images


class Transform(NamedTuple):
    """The geometric transform of one example, of float32 scalars.

    Attributes:
      rotation: radians.
      row_shift: fraction of the side.
      column_shift: fraction of the side.
      shear: radians if `keras_shear`, else a slope.
      row_zoom: source pixels per pixel; above 1 the content shrinks.
      column_zoom: source pixels per pixel.
      flip: 1.0 mirrors left to right, 0.0 does not.
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
    """Random affine maps, drawn uniformly with one key per example.

    The default ranges are those of Keras' `ImageDataGenerator(rotation_range=40,
    width_shift_range=.2, height_shift_range=.2, shear_range=.2, zoom_range=.2,
    horizontal_flip=True)`.

    Attributes:
      rotation: maximum rotation in degrees, in either direction.
      shift: maximum shift of rows and of columns, as a fraction of the side.
      shear: maximum shear, in degrees if `keras_shear`, else a slope: the shift of a row per
        distance from the center.
      zoom: rows and columns are scaled independently by factors in [1 - zoom, 1 + zoom].
      flip: whether half of the images are mirrored.
      keras_shear: whether `shear` is in degrees, as in Keras; 0.2 degrees are invisible.
      image_size: side of the square result in pixels; None keeps that of the images.

    Example:
      >>> images = jnp.zeros((2, 28, 28), jnp.uint8)
      >>> augment = RandomAffine(image_size=40)
      >>> augment(jax.random.key(0), jnp.int32(0), jnp.arange(2), images).shape
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
        self,
        key: jax.Array,
        epoch: jax.Array,
        examples: jax.Array,
        images: jax.Array,
        strength: float | jax.Array = 1.0,
    ) -> jax.Array:
        """Implements `Augmentation`; the strength also scales the probability of a flip.

        Raises:
          ValueError: if the images are not square.
        """
        if images.shape[1] != images.shape[2]:
            raise ValueError(
                f"images have {images.shape[1]} x {images.shape[2]} pixels; RandomAffine needs "
                "square ones"
            )
        keys = example_keys(key, epoch, examples)
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


@dataclasses.dataclass(frozen=True)
class RandomShift:
    """Random shifts by whole pixels, alternating flips and random erasing.

    Pixels that a shift uncovers are 0, the background of Fashion-MNIST.

    Attributes:
      shift: maximum shift of rows and of columns in pixels, in either direction.
      flip: whether each image is mirrored left to right in every second epoch, starting at random
        with the first or second ("alternating flip", Jordan 2024).
      erase: probability of setting a rectangle to `erase_value` (random erasing, Zhong et al.
        2017). Sides are clipped to the image.
      erase_value: one value per channel, in [0, 1]. None is the mean pixel of the training images
        in a run, and elsewhere that of Fashion-MNIST.
      image_size: None; images keep their size.

    Example:
      >>> images = jnp.arange(9, dtype=jnp.uint8).reshape(1, 3, 3)
      >>> key, example = jax.random.key(1), jnp.array([0])
      >>> for epoch in range(2):
      ...     pixels = RandomShift(shift=1)(key, jnp.int32(epoch), example, images)
      ...     print((255 * pixels[0, :, :, 0]).round().astype(int).tolist())
      [[1, 2, 0], [4, 5, 0], [7, 8, 0]]
      [[0, 5, 4], [0, 8, 7], [0, 0, 0]]
    """

    shift: int = 1
    flip: bool = True
    erase: float = 0.0
    erase_value: tuple[float, ...] | None = None
    image_size: None = None

    def __call__(
        self,
        key: jax.Array,
        epoch: jax.Array,
        examples: jax.Array,
        images: jax.Array,
        strength: float | jax.Array = 1.0,
    ) -> jax.Array:
        """Implements `Augmentation`."""
        strength = jnp.asarray(strength, jnp.float32)
        keys = example_keys(key, _NO_EPOCH, examples)
        is_odd = jax.vmap(lambda k: jax.random.bits(k, (), jnp.uint32) % 2)(keys)
        mirrored = (is_odd.astype(jnp.int32) + epoch) % 2 == 1
        mirrored &= self.flip & (strength > 0)
        keys = example_keys(key, epoch, examples)
        draws = jax.vmap(lambda k: jax.random.uniform(k, (7,)))(keys)
        pixels = jax.vmap(self._transformed, (0, 0, 0, None))(images, mirrored, draws, strength)
        return with_channels(pixels)

    def _transformed(
        self, image: jax.Array, mirrored: jax.Array, draws: jax.Array, strength: jax.Array
    ) -> jax.Array:
        height, width = image.shape[:2]
        limit = jnp.round(strength * self.shift)
        shift = jnp.floor(draws[:2] * (2 * limit + 1) - limit).astype(jnp.int32)
        rows, columns = jnp.arange(height) - shift[0], jnp.arange(width) - shift[1]
        columns = jnp.where(mirrored, width - 1 - columns, columns)
        # Indices beyond the image read 0; negative ones would count from the end.
        rows, columns = (jnp.where(index < 0, 2**30, index) for index in (rows, columns))
        pixels = image.at[rows[:, None], columns[None, :]].get(mode="fill", fill_value=0)
        pixels = pixels.astype(jnp.float32) / 255
        if self.erase == 0:
            return pixels
        low, high = _ERASE_AREA
        area = height * width * strength * (low + (high - low) * draws[2])
        aspect = _ERASE_ASPECT ** (2 * draws[3] - 1)
        sides = jnp.sqrt(area * jnp.stack([aspect, 1 / aspect]))
        corner = draws[4:6] * (jnp.array([height, width]) - sides)
        inside = [
            (jnp.arange(size) >= start) & (jnp.arange(size) < start + length)
            for size, start, length in zip((height, width), corner, sides, strict=True)
        ]
        erased = inside[0][:, None] & inside[1][None, :] & (draws[6] < self.erase)
        value = self.erase_value or (_PIXEL_MEAN,)
        if image.ndim == 2:
            return jnp.where(erased, value[0], pixels)
        return jnp.where(erased[..., None], jnp.float32(value)[None, None, :], pixels)


def apply(
    transforms: Transform,
    images: jax.Array,
    *,
    keras_shear: bool = False,
    image_size: int | None = None,
) -> jax.Array:
    """Applies one transform to each image, with bilinear interpolation and edge padding.

    Args:
      transforms: fields float32[batch].
      images: uint8[batch, side, side], or [batch, side, side, 3] in colour.
      keras_shear: whether `shear` is in radians, else a slope.
      image_size: side of the result in pixels; None keeps that of the images.

    Returns:
      float32[batch, image_size, image_size, channels], values in [0, 1].
    """
    side = images.shape[1]
    matrices = jax.vmap(lambda transform: _source_matrix(transform, side, keras_shear))(transforms)
    resample = functools.partial(_resample, image_size=image_size or side)
    if images.ndim == 4:
        resample = jax.vmap(resample, (-1, None), -1)
    return with_channels(jax.vmap(resample)(images.astype(jnp.float32) / 255, matrices))


def _source_matrix(transform: Transform, side: int, keras_shear: bool) -> jax.Array:
    """Returns float32[2, 3], the map from (row, column) to the source, both from the center."""
    cos, sin = jnp.cos(transform.rotation), jnp.sin(transform.rotation)
    shear = transform.shear
    slope, height = (jnp.sin(shear), jnp.cos(shear)) if keras_shear else (shear, 1.0)
    # Keras multiplies rotation, shift, shear and zoom in this order, and swaps rows and columns.
    rotate = jnp.array([[cos, sin], [-sin, cos]])
    shift = side * jnp.stack([transform.column_shift, transform.row_shift])
    column_zoom, row_zoom = transform.column_zoom, transform.row_zoom
    shear_and_zoom = jnp.array([[height * column_zoom, 0.0], [-slope * column_zoom, row_zoom]])
    # Keras applies the flip last, so it is first in the map to the source.
    linear = (rotate @ shear_and_zoom) * jnp.stack([1.0, 1 - 2 * transform.flip])[None, :]
    return jnp.concatenate([linear, (rotate @ shift)[:, None]], axis=1)


def _resample(image: jax.Array, matrix: jax.Array, image_size: int) -> jax.Array:
    side = image.shape[0]
    # Pixel centers of the result, relative to the image center, in source pixels.
    steps = (jnp.arange(image_size) + 0.5) * (side / image_size) - side / 2
    row, column = steps[:, None], steps[None, :]
    center = side / 2 - 0.5
    source = [
        matrix[axis, 0] * row + matrix[axis, 1] * column + matrix[axis, 2] + center
        for axis in (0, 1)
    ]
    return jax.scipy.ndimage.map_coordinates(image, source, order=1, mode="nearest")


AUGMENTATIONS: Mapping[str, RandomAffine | RandomShift] = MappingProxyType({
    "keras": RandomAffine(keras_shear=True),
    "geometric": RandomAffine(),
    "shift": RandomShift(),
    "shift_erase": RandomShift(erase=0.5),  # the probability of Zhong et al.
})  # fmt: skip
