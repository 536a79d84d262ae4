"""The files of a run, and writing them so that a reader never sees half of one."""

import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

CONFIG = "config.json"
ENVIRONMENT = "environment.json"
METRICS = "metrics.jsonl"
PREDICTIONS = "predictions.npz"
EXAMPLES = "examples.npz"
REPORT = "report.json"
CHECKPOINTS = "checkpoints"


def write_bytes(path: Path, content: bytes) -> None:
    """Replaces a file in one step: whenever a reader looks, it is the old one or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Writes JSON that people can read."""
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def read_json(path: Path) -> Any:
    """Reads JSON, or returns None where there is no such file."""
    return json.loads(path.read_text()) if path.exists() else None


def write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Writes one JSON object a line."""
    write_bytes(path, "".join(json.dumps(line) + "\n" for line in lines).encode())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Reads one JSON object a line; no file is no lines."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_arrays(path: Path, **arrays: Any) -> None:
    """Writes named NumPy arrays, compressed."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_bytes(path, buffer.getvalue())
