"""The files of a run, written atomically."""

import contextlib
import errno
import io
import json
import os
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from fmnist_jax.differences import differences_message
from fmnist_jax.errors import ConfigError, DamagedFileError

CONFIG = "config.json"
ENVIRONMENT = "environment.json"
METRICS = "metrics.jsonl"
PREDICTIONS = "predictions.npz"
EXAMPLES = "examples.npz"
REPORT = "report.json"
SEEDS = "seeds.json"
CHECKPOINTS = "checkpoints"

# What NumPy raises for a missing or damaged file. The last two come from a changed header.
_UNREADABLE = (
    OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError,
    RuntimeError,
)  # fmt: skip


def write_bytes(path: Path, content: bytes) -> None:
    """Replaces a file atomically and forces it to the disk.

    On return it survives a loss of power. Only one process may write a file at a time.
    """
    # One name for all processes, so that the next one replaces what a killed one left.
    temporary = path.with_name(f".{path.name}.new")
    try:
        temporary.write_bytes(content)
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    except OSError as error:
        error.filename = str(path)  # in place of the temporary one, or of none for a full disk
        raise
    finally:
        temporary.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Creates a folder and its parents, and forces their names to the disk."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)


def sync(path: Path) -> None:
    """Forces a file, or the names in a folder, to the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot open a folder
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems, such as CIFS, cannot do this for folders.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON."""
    write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def read_json(path: Path) -> Any:
    """Reads JSON; returns None if the file does not exist.

    Raises:
      DamagedFileError: if it is not JSON.
    """
    return _parsed(path, path.read_bytes()) if path.exists() else None


def check_config(workdir: Path, settings: Mapping[str, Any], noun: str) -> bool:
    """Returns whether a folder has a config.json.

    Raises:
      ConfigError: if it has other settings; the message lists the differences.
    """
    found = read_json(workdir / CONFIG)
    message = found and differences_message(
        f"workdir {workdir} holds another {noun}; use another folder. The settings differ:",
        without_sources(found),
        without_sources(settings),
    )
    if message:
        raise ConfigError(message)
    return found is not None


def without_sources(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings without the SHA-256 of sources, whose change is a warning."""
    return {name: value for name, value in settings.items() if name != "sources"}


def read_results(path: Path) -> dict[str, Any]:
    """Reads the JSON file of a finished run or study.

    Raises:
      DamagedFileError: if it is missing or damaged.
    """
    results = read_json(path)
    if not isinstance(results, dict):
        raise DamagedFileError(f"{path} is missing or damaged; finish the run first")
    return results


@contextlib.contextmanager
def usable(workdir: Path) -> Iterator[None]:
    """Raises ConfigError, which names the folder, in place of an OSError of the block."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"workdir {workdir} cannot be used: {error.strerror or error}") from error


def write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Writes one JSON object per line."""
    write_bytes(path, "".join(json.dumps(line) + "\n" for line in lines).encode())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Reads one JSON object per line; a missing file has no lines.

    Raises:
      DamagedFileError: if a line is not JSON.
    """
    if not path.exists():
        return []
    return [_parsed(path, line) for line in path.read_bytes().splitlines()]


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    """Reads named NumPy arrays.

    Raises:
      DamagedFileError: if the file is missing or cannot be read.
    """
    try:
        # From memory: NumPy leaves a file open that it cannot read.
        with np.load(io.BytesIO(path.read_bytes())) as arrays:
            return dict(arrays)
    except _UNREADABLE as error:
        raise DamagedFileError(f"{path} cannot be read: {error}") from error


@contextlib.contextmanager
def locked(folder: Path, *, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Locks a folder for this process; it is unlocked when the process ends.

    Args:
      folder: an existing folder.
      on_wait: called before waiting for another process that has locked it; None does not wait.

    Raises:
      ConfigError: if another process has locked it, unless `on_wait` is given.
      OSError: if the folder cannot be written or locked.

    Example:
      >>> import tempfile
      >>> with locked(Path(tempfile.mkdtemp())):
      ...     print("locked")
      locked
    """
    lock = filelock.FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        _check_locks(folder)
        if on_wait is None:
            raise ConfigError(
                f"workdir {folder} is in use by another process; wait for it, or use another folder"
            ) from None
        on_wait()
        lock.acquire(timeout=-1)
    try:
        yield
    finally:
        lock.release()


def _check_locks(folder: Path) -> None:
    """Raises OSError if no file can be locked, which `filelock` takes for a lock of another."""
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".lock-") as file:
        try:
            with filelock.FileLock(file.name, timeout=0):
                pass
        except filelock.Timeout:
            message = "files cannot be locked there, by its file system or a security policy"
            raise OSError(errno.EACCES, message, str(folder)) from None


def _parsed(path: Path, content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:  # invalid UTF-8 is a ValueError too
        raise DamagedFileError(f"{path} is damaged: {error}") from error


def write_arrays(path: Path, **arrays: Any) -> None:
    """Writes named NumPy arrays, compressed."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_bytes(path, buffer.getvalue())
