"""An optimized function beside the plain one."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np

from fmnist_jax.fast.rewrite import optimize_for_cpu


def compare(apply, *arrays, tolerance=1e-11):
    """Compares results, gradients and directional derivatives with those of the plain function."""
    generator = np.random.default_rng(1)
    tangents = jax.tree.map(lambda x: jnp.asarray(generator.standard_normal(x.shape)), arrays)

    def everything(apply):
        def loss(*arrays):
            results = jax.tree.leaves(apply(*arrays))
            return sum(jnp.sum(jnp.sin(result)) for result in results)

        gradients = jax.grad(loss, argnums=tuple(range(len(arrays))))(*arrays)
        return apply(*arrays), gradients, jax.jvp(loss, arrays, tangents)[1]

    result, expected = (
        jax.jit(functools.partial(everything, f))() for f in (optimize_for_cpu(apply), apply)
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(result, expected)
    chex.assert_trees_all_close(result, expected, rtol=tolerance, atol=tolerance)


def draw(*shape):
    return jnp.asarray(np.random.default_rng(0).standard_normal(shape))
