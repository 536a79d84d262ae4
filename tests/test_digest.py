"""Digests of equal content are equal, whatever holds it."""

import hashlib

import jax.numpy as jnp
import numpy as np
import pytest

from fmnist_jax import digest


def test_bytes_and_file_match_hashlib(tmp_path):
    content = bytes(range(256)) * 5000
    (tmp_path / "file").write_bytes(content)
    expected = hashlib.sha256(content).hexdigest()
    assert digest.sha256_bytes(content) == expected
    assert digest.sha256_file(tmp_path / "file") == expected


@pytest.mark.parametrize(
    "array",
    [
        np.arange(24).reshape(2, 3, 4).transpose(2, 0, 1)[::2],
        np.array(3.5),
        np.zeros((0, 28)),
        np.asarray(jnp.arange(5, dtype=jnp.bfloat16)),
    ],
    ids=["strided", "scalar", "empty", "bfloat16"],
)
def test_array_digest_is_that_of_its_elements_in_c_order(array):
    assert digest.sha256_array(array) == hashlib.sha256(array.tobytes()).hexdigest()


def test_json_digest_ignores_key_order_alone():
    assert digest.sha256_json({"a": [1], "b": None}) == digest.sha256_json({"b": None, "a": [1]})
    assert digest.sha256_json([1, 2]) != digest.sha256_json([2, 1])
    assert digest.sha256_json({"a": 1}) == hashlib.sha256(b'{"a": 1}').hexdigest()
