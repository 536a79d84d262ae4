"""Products and sums over rows."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from fmnist_jax.fast.gradients import Arrays, with_gradients
from fmnist_jax.fast.precision import factors, product, transposed
from fmnist_jax.xla.noinline import fence, fenced_transpose


def matmul(inputs: jax.Array, kernel: jax.Array) -> jax.Array:
    """Multiplies float[m, n] and float[n, p]."""
    return with_gradients(
        lambda *arrays: _forward(*arrays)[0],
        _forward,
        functools.partial(_push, dtype=inputs.dtype),
        functools.partial(_pull, dtype=inputs.dtype),
    )(inputs, kernel)


def _forward(inputs: jax.Array, kernel: jax.Array) -> tuple[jax.Array, Arrays]:
    rounded = factors((inputs, kernel))
    return product(*rounded, inputs.dtype), rounded


def _push(residuals: Arrays, tangents: Arrays, dtype: DTypeLike) -> jax.Array:
    inputs, kernel = (array.astype(dtype) for array in residuals)
    return tangents[0] @ kernel + inputs @ tangents[1]


def _pull(residuals: Arrays, cotangent: jax.Array, dtype: DTypeLike) -> Arrays:
    inputs, kernel = residuals
    cotangent = factors(cotangent)
    # XLA:CPU multiplies few rows with a transposed matrix slowly: 60 GFLOP/s for [32, 256] and
    # [1568, 256], against 150 GFLOP/s with the transpose stored, including the transposition.
    return (
        product(cotangent, fenced_transpose(kernel), dtype),
        product(transposed(inputs), cotangent, dtype),
    )


def sum_rows(array: jax.Array) -> jax.Array:
    """Returns the sum over all axes but the last, float[features].

    XLA:CPU reduces leading axes slowly. Here, eight parts are added in one elementwise operation,
    which XLA fuses with what computes the array, and a product with ones sums the rest. Measured
    for the 3x3 kernel of a depthwise convolution, [128, 14, 14, 64], Zen 3: 4 ms against 29 ms.
    """
    shape = array.shape

    def pull(residuals: Arrays, cotangent: jax.Array) -> Arrays:
        del residuals
        return (jnp.broadcast_to(cotangent, shape),)

    return with_gradients(
        _sum_rows,
        lambda array: (_sum_rows(array), ()),
        lambda _, tangents: tangents[0].sum(range(len(shape) - 1)),
        pull,
    )(array)


def spread(values: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Broadcasts float[features] along the other axes; the gradient is `sum_rows`."""

    def broadcast(values: jax.Array) -> jax.Array:
        return jnp.broadcast_to(values, shape)

    return with_gradients(
        broadcast,
        lambda values: (broadcast(values), ()),
        lambda _, tangents: broadcast(tangents[0]),
        lambda _, cotangent: (_sum_rows(cotangent),),
    )(values)


def add_features(array: jax.Array, values: jax.Array, axis: int) -> jax.Array:
    """Adds one value per feature, float[features], along an axis.

    The gradient of the array is stored, because a normalization reads it more than once.
    """
    shape = [1] * array.ndim
    shape[axis] = -1

    def add(array: jax.Array, values: jax.Array) -> jax.Array:
        return lax.add(array, jnp.broadcast_to(values.reshape(shape), array.shape))

    def pull(residuals: Arrays, cotangent: jax.Array) -> Arrays:
        del residuals
        cotangent = fence(cotangent)
        return cotangent, _sum_rows(jnp.moveaxis(cotangent, axis, -1))

    return with_gradients(
        add,
        lambda array, values: (add(array, values), ()),
        lambda _, tangents: add(*tangents),
        pull,
    )(array, values)


def _sum_rows(array: jax.Array) -> jax.Array:
    features = array.shape[-1]
    rows = array.reshape(-1, features)
    parts = math.gcd(len(rows), 8)
    # In float32, because a sum of many rows loses the digits of half precision.
    total = rows.astype(jnp.promote_types(array.dtype, jnp.float32))
    total = total.reshape(parts, -1, features)
    total = fence(sum((total[i] for i in range(1, parts)), start=total[0]))
    return (jnp.ones(len(total), total.dtype) @ total).astype(array.dtype)


def dot(left: jax.Array, right: jax.Array, params: Any) -> jax.Array | None:
    """Returns `lax.dot_general` as a product of matrices, or None where it is none.

    Args:
      left: float[..., k...].
      right: float[k..., ...].
      params: those of `lax.dot_general`.
    """
    (left_axes, right_axes), batch = params["dimension_numbers"]
    count = len(left_axes)
    plain = tuple(range(left.ndim - count, left.ndim)), tuple(range(count))
    same = left.dtype == right.dtype == (params["preferred_element_type"] or left.dtype)
    if any(batch) or (tuple(left_axes), tuple(right_axes)) != plain or count == 0 or not same:
        return None
    size = math.prod(right.shape[:count])
    shape = left.shape[: left.ndim - count] + right.shape[count:]
    return matmul(left.reshape(-1, size), right.reshape(size, -1)).reshape(shape)
