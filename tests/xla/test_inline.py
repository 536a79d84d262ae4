"""Programs as flat lists of operations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax
from jax.extend import core

from fmnist_jax.xla.inline import inlined_jaxpr


def kinds(function, *arguments):
    return [equation.primitive.name for equation in inlined_jaxpr(function, *arguments).eqns]


@jax.custom_vjp
def with_gradient(x):
    return jnp.sin(x)


with_gradient.defvjp(lambda x: (jnp.sin(x), x), lambda x, g: (g * x,))


@functools.partial(lax.composite, name="test.double")
def double(x):
    return x + x


@jax.jit
def network(x):
    x = double(jax.checkpoint(with_gradient)(jax.nn.relu(x)))
    return lax.platform_dependent(x, cpu=jnp.cos, default=jnp.tanh)


def test_calls_are_replaced_by_their_operations():
    x = jnp.array([-1.0, 0.5])
    closed = inlined_jaxpr(network, x)
    assert [equation.primitive.name for equation in closed.eqns] == ["max", "sin", "add", "tanh"]
    (result,) = core.jaxpr_as_fun(closed)(x)
    np.testing.assert_allclose(result, np.tanh(2 * np.sin(np.maximum(x, 0))), rtol=1e-6)


def test_a_platform_without_a_default_takes_the_first_form():
    def function(x):
        return lax.platform_dependent(x, cpu=jnp.cos, cuda=jnp.sin)

    assert kinds(function, jnp.ones(2)) == ["cos"]


def test_operations_without_a_use_are_left_out():
    @jax.jit
    def pair(x):
        return jnp.sin(x), jnp.cos(x)

    assert kinds(lambda x: pair(x)[1], jnp.ones(2)) == ["cos"]


@pytest.mark.parametrize(
    ("kind", "function"),
    [
        ("cond", lambda x: lax.cond(x > 0, jnp.sin, jnp.cos, x)),
        ("scan", lambda x: lax.scan(lambda y, _: (jnp.sin(y), None), x, length=3)[0]),
    ],
)
def test_loops_and_conditions_stay_single_operations(kind, function):
    found = kinds(jax.jit(function), jnp.float32(1))
    assert kind in found
    assert "sin" not in found


def test_the_batch_size_may_be_symbolic():
    (batch,) = export.symbolic_shape("batch")
    closed = inlined_jaxpr(network, jax.ShapeDtypeStruct((batch, 2), jnp.float32))
    assert closed.out_avals[0].shape == (batch, 2)
