"""Compiler options that a version of XLA may not know."""

import warnings
from typing import NamedTuple

import jax.numpy as jnp
import pytest
from jax import lax

from fmnist_jax.errors import EnvironmentWarning
from fmnist_jax.xla import jit, noinline


def test_an_unknown_compiler_option_is_left_out_with_one_warning(monkeypatch):
    known = jit.COMPILER_OPTIONS["cpu"]
    monkeypatch.setitem(jit.COMPILER_OPTIONS, "cpu", known | {"xla_cpu_no_such_option": True})
    jit.supported_options.cache_clear()
    with pytest.warns(EnvironmentWarning, match="no compiler option xla_cpu_no_such_option"):
        assert jit.supported_options("cpu") == known
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert float(jit.platform_jit()(jnp.cos)(0.0)) == 1
    jit.supported_options.cache_clear()


class Config(NamedTuple):
    dtype: str
    matmul_precision: str


# YNN's products are faster than XLA's where the processor has instructions for bfloat16.
@pytest.mark.parametrize("has_instructions", [True, False])
def test_ynn_multiplies_bfloat16_alone(has_instructions, monkeypatch):
    monkeypatch.setattr(jit, "has_bfloat16_instructions", lambda: has_instructions)

    @jit.platform_jit(static_argnames=("config",))
    def multiply(left, right, *, config):
        left, right = left.astype(config.dtype), right.astype(config.dtype)
        return lax.dot(left, right, preferred_element_type=jnp.float32)

    def has_ynn(precision):
        config = Config(precision, precision)
        program = multiply.lower(jnp.ones((64, 64)), jnp.ones((64, 64)), config=config).compile()
        return "__ynn_fusion" in program.as_text()

    assert has_ynn("bfloat16") == has_instructions
    assert not has_ynn("float32")


def test_without_xla_metadata_a_fence_is_left_out_with_a_warning(monkeypatch):
    monkeypatch.setattr(noinline, "set_xla_metadata", None)
    noinline._not_inlined.cache_clear()
    with pytest.warns(EnvironmentWarning, match="set_xla_metadata"):
        assert float(noinline.fence(jnp.float32(2))) == 2
    assert float(noinline.reproducible(jnp.add, 1.0, 2.0)) == 3
    noinline._not_inlined.cache_clear()


def test_every_compiler_option_is_supported():
    jit.supported_options.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert jit.supported_options("cpu") == jit.COMPILER_OPTIONS["cpu"]
