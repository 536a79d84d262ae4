"""Max and average pooling over float[batch, height, width, features].

XLA differentiates a maximum over windows by select-and-scatter: 32 ms for [128, 26, 26, 32], Zen 4,
against 1 ms here.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from fmnist_jax.fast.gradients import Arrays, with_gradients
from fmnist_jax.xla.noinline import fence

Pads = tuple[tuple[int, int], tuple[int, int]]


class Windows(NamedTuple):
    """Height and width of the windows, their strides, and the padding."""

    size: tuple[int, int]
    strides: tuple[int, int]
    pads: Pads


def max_pool(images: jax.Array, windows: Windows) -> jax.Array:
    """Returns the maximum of each window; the gradient goes to the first in reading order."""
    shape = images.shape

    def forward(images: jax.Array) -> tuple[jax.Array, Arrays]:
        corners = views(fence(images), windows, -jnp.inf)
        maximum, winner = fence(first_maximum(corners))
        return maximum, (winner,)

    return with_gradients(
        lambda images: functools.reduce(jnp.maximum, views(images, windows, -jnp.inf)),
        forward,
        lambda residuals, tangents: chosen(residuals[0], views(tangents[0], windows, 0)),
        lambda residuals, cotangent: (scatter(residuals[0], cotangent, shape, windows),),
    )(images)


def sum_pool(images: jax.Array, windows: Windows) -> jax.Array:
    """Returns the sum of each window."""
    shape = images.shape

    def total(images: jax.Array) -> jax.Array:
        return functools.reduce(jnp.add, views(images, windows, 0))

    return with_gradients(
        total,
        lambda images: (total(images), ()),
        lambda _, tangents: total(tangents[0]),
        lambda _, cotangent: (scatter(None, cotangent, shape, windows),),
    )(images)


def views(images: jax.Array, windows: Windows, padding: float) -> list[jax.Array]:
    """Returns, for each position in a window, that pixel of all windows, in reading order."""
    (rows, columns), (down, right), pads = windows
    padded = pad(images, pads, padding)
    height, width = out_shape(images.shape, windows)
    return [
        padded[:, i : i + down * (height - 1) + 1 : down, j : j + right * (width - 1) + 1 : right]
        for i in range(rows)
        for j in range(columns)
    ]


def out_shape(shape: Sequence[int], windows: Windows) -> tuple[int, int]:
    """Returns the numbers of rows and columns of windows."""
    sides = zip(shape[1:3], *windows, strict=True)
    height, width = ((side + sum(pads) - size) // stride + 1 for side, size, stride, pads in sides)
    return height, width


def first_maximum(corners: Sequence[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Returns the maximum and the index, uint8, of the first that equals it, by halves."""
    if len(corners) == 1:
        return corners[0], jnp.zeros(corners[0].shape, jnp.uint8)
    half = len(corners) // 2
    (left, first), (right, second) = map(first_maximum, (corners[:half], corners[half:]))
    winner = jnp.where(left >= right, first, second + jnp.uint8(half))
    return jnp.maximum(left, right), winner


def chosen(winner: jax.Array, corners: Sequence[jax.Array]) -> jax.Array:
    """Returns the values at the index of the winner."""
    return functools.reduce(
        jnp.add, [jnp.where(winner == i, corner, 0) for i, corner in enumerate(corners)]
    )


def scatter(
    winner: jax.Array | None, cotangent: jax.Array, shape: tuple[int, ...], windows: Windows
) -> jax.Array:
    """Returns the gradient of the images: the cotangent at each winner, or at every pixel."""
    (rows, columns), (down, right), ((top, _), (left, _)) = windows
    batch, height, width, features = cotangent.shape
    if (rows, columns) == (down, right):
        # float[batch, height, rows, width, columns, features]: each pixel is in one window.
        spread = cotangent[:, :, None, :, None]
        if winner is not None:
            position = jnp.arange(rows * columns, dtype=jnp.uint8).reshape(
                1, 1, rows, 1, columns, 1
            )
            spread = jnp.where(winner[:, :, None, :, None] == position, spread, 0)
        sides = (batch, height, rows, width, columns, features)
        full = jnp.broadcast_to(spread, sides).reshape(batch, height * rows, width * columns, -1)
        return crop(full, (top, left), shape)
    return crop(
        overlapping(
            lambda i, j: (
                cotangent if winner is None else jnp.where(winner == i * columns + j, cotangent, 0)
            ),
            windows,
        ),
        (top, left),
        shape,
    )


def overlapping(part: Callable[[int, int], jax.Array], windows: Windows) -> jax.Array:
    """Adds, for each position (i, j) in a window, `part(i, j)` to that pixel of all windows.

    Returns:
      float[batch, height, width, features] of the padded images.
    """
    (rows, columns), (down, right), _ = windows
    # A pixel has one phase, (row % down, column % right), and the parts of one or more positions.
    # Phases are interleaved rather than added, so that no pixel is written twice.
    tall, wide = -(-rows // down) - 1, -(-columns // right) - 1

    def phase(row: int, column: int) -> jax.Array:
        parts = [
            jnp.pad(
                part(i, j),
                [(0, 0), (i // down, tall - i // down), (j // right, wide - j // right), (0, 0)],
            )
            for i in range(row, rows, down)
            for j in range(column, columns, right)
        ]
        return sum(parts[1:], start=parts[0]) if parts else jnp.zeros_like(first)

    first = phase(0, 0)
    lines = [jnp.stack([phase(i, j) for j in range(right)], 3) for i in range(down)]
    full = jnp.stack(lines, 2)
    batch, height, _, width, _, features = full.shape
    return full.reshape(batch, down * height, right * width, features)


def pad(images: jax.Array, pads: Pads, value: float = 0) -> jax.Array:
    """Pads height and width with a value; negative padding crops."""
    widths = [(0, 0, 0), *((*sides, 0) for sides in pads), (0, 0, 0)]
    return lax.pad(images, jnp.asarray(value, images.dtype), widths)


def crop(images: jax.Array, start: tuple[int, int], shape: tuple[int, ...]) -> jax.Array:
    """Returns `shape[1:3]` pixels from `start` on; those beyond the edge are 0."""
    (top, left), (height, width) = start, images.shape[1:3]
    return pad(images, ((-top, top + shape[1] - height), (-left, left + shape[2] - width)))
