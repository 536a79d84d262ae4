"""Compiler options that a version of XLA may not know."""

import warnings

import jax.numpy as jnp
import pytest

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
