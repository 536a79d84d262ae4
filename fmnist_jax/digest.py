"""SHA-256 of bytes, files, arrays and JSON values, as hexadecimal text."""

import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np


def sha256_bytes(content: bytes) -> str:
    """SHA-256 of bytes.

    Example:
      >>> sha256_bytes(b"")[:16]
      'e3b0c44298fc1c14'
    """
    return hashlib.sha256(content).hexdigest()


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's content.

    Raises:
      OSError: if the file cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_array(array: np.ndarray) -> str:
    """SHA-256 of an array's elements in C order; shape and dtype are not part of it.

    Args:
      array: any shape and dtype but object.

    Example:
      >>> sha256_array(np.zeros((2, 3), np.uint8)) == sha256_bytes(bytes(6))
      True
    """
    # As bytes, because the buffer protocol has no code for bfloat16.
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).hexdigest()


def sha256_json(value: Any) -> str:
    """SHA-256 of a value's JSON text, independent of the order of its keys.

    Args:
      value: anything that `json.dumps` accepts.

    Raises:
      TypeError: if the value is not serializable as JSON.

    Example:
      >>> sha256_json({"a": 1, "b": 2}) == sha256_json({"b": 2, "a": 1})
      True
    """
    return sha256_bytes(json.dumps(value, sort_keys=True).encode())


def params_sha256(params: Any) -> str:
    """Returns the SHA-256 of names, dtypes, shapes and bytes of all parameters.

    Example:
      >>> params_sha256({"w": np.zeros(2)})[:8]
      '99024f1b'
    """
    digest = hashlib.sha256()
    for path, leaf in jax.tree.leaves_with_path(params):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape};".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
