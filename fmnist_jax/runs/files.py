"""The files of a run, and writing them so that a reader never sees half of one."""

import io
import json
import os
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fmnist_jax.errors import DamagedFileError

CONFIG = "config.json"
ENVIRONMENT = "environment.json"
METRICS = "metrics.jsonl"
PREDICTIONS = "predictions.npz"
EXAMPLES = "examples.npz"
REPORT = "report.json"
SEEDS = "seeds.json"
CHECKPOINTS = "checkpoints"


def write_bytes(path: Path, content: bytes) -> None:
    """Replaces a file in one step: whenever a reader looks, it is the old one or the new one.

    On return it is on the disk, and would be there after a loss of power.
    """
    # One name for all processes, so that what a killed one leaves is replaced by the next.
    temporary = path.with_name(f".{path.name}.new")
    try:
        temporary.write_bytes(content)
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Makes a folder, and those that it is in, and forces their names to the disk."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)


def sync(path: Path) -> None:
    """Forces a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON that people can read."""
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def read_json(path: Path) -> Any:
    """Reads JSON, or returns None where there is no such file.

    Raises:
      DamagedFileError: if it is no JSON.
    """
    return _parsed(path, path.read_bytes()) if path.exists() else None


def write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Writes one JSON object a line."""
    write_bytes(path, "".join(json.dumps(line) + "\n" for line in lines).encode())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Reads one JSON object a line; no file is no lines.

    Raises:
      DamagedFileError: if a line is no JSON.
    """
    if not path.exists():
        return []
    return [_parsed(path, line) for line in path.read_bytes().splitlines()]


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Reads named NumPy arrays.

    Raises:
      DamagedFileError: if they are not there or cannot be read.
    """
    try:
        # From memory: NumPy leaves the file open where it cannot be read.
        with np.load(io.BytesIO(path.read_bytes())) as arrays:
            return dict(arrays)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DamagedFileError(f"{path} cannot be read: {error}") from error


def _parsed(path: Path, content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:  # what is no UTF-8 is a ValueError too
        raise DamagedFileError(f"{path} is damaged: {error}") from error


def write_arrays(path: Path, **arrays: Any) -> None:
    """Writes named NumPy arrays, compressed."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_bytes(path, buffer.getvalue())
