"""Checkpoints of a run. This is the only file that imports orbax.

A checkpoint is a folder named by its step::

    arrays/        the arrays by name, written by Orbax
    manifest.json  step, settings, score and other JSON values, dtype and shape of each array,
                   SHA-256 of each file and of the manifest itself

It is written under a temporary name, forced to the disk, and renamed; it is renamed again before it
is removed. A folder named by a step was therefore complete; if it is incomplete, it was damaged.
The empty file `.saved` records that there was a checkpoint: if none is left, that is
damage too.
"""

import contextlib
import errno
import functools
import itertools
import json
import math
import os
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fmnist_jax.differences import differences_message
from fmnist_jax.digest import sha256_file, sha256_json
from fmnist_jax.errors import CheckpointError, CheckpointWarning, first_line
from fmnist_jax.runs import files

# Increased when an earlier version could not read what is written here.
FORMAT = 2

# Enough to survive damage to one.
NUM_LATEST = 2

_ARRAYS, _MANIFEST = "arrays", "manifest.json"
_SAVING, _REMOVING, _DAMAGED = ".saving-", ".removing-", "damaged-"
_SAVED = ".saved"

# A file or folder is missing or was exchanged. Other errors may be temporary and are not damage.
_NO_FILE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


class _DamagedError(Exception):
    """A checkpoint differs from what was written."""


class Checkpoint(NamedTuple):
    """A checkpoint as plain NumPy.

    Attributes:
      step: number of steps taken.
      arrays: the arrays by name, such as "state.params.Conv_0.kernel".
      meta: the JSON values that were saved with them.
      settings: the settings of the run.
      score: the validation accuracy, or None.
    """

    step: int
    arrays: dict[str, np.ndarray]
    meta: dict[str, Any]
    settings: dict[str, Any]
    score: float | None


class Checkpoints:
    """The checkpoints in a folder, one per step.

    A checkpoint is on the disk when `save` returns. The two newest, the one with the highest score
    and those at multiples of `keep_every` are retained. Only one process may save at a time.

    Args:
      directory: created by the first save.
      settings: the settings of the run, ready for JSON; a checkpoint with other settings is
        refused.
      keep_every: checkpoints at multiples of this number of steps are retained.

    Example:
      >>> import tempfile
      >>> checkpoints = Checkpoints(Path(tempfile.mkdtemp()), {"seed": 0})
      >>> checkpoints.save(7, {"w": jnp.ones(2)}, {"note": "seven"})
      >>> tree, meta = checkpoints.restore({"w": jnp.zeros(2)})
      >>> tree["w"].tolist(), meta
      ([1.0, 1.0], {'note': 'seven'})
    """

    def __init__(
        self,
        directory: Path,
        settings: Mapping[str, Any] | None = None,
        keep_every: int | None = None,
    ) -> None:
        self._directory = directory.absolute()
        # As JSON returns them: it has no tuples.
        self._settings = json.loads(json.dumps(settings or {}))
        self._keep_every = keep_every

    def steps(self) -> list[int]:
        """Returns the saved steps in ascending order, without checking for damage."""
        return sorted(int(path.name) for path in self._paths() if path.name.isdigit())

    def save(
        self, step: int, tree: Any, meta: Mapping[str, Any], score: float | None = None
    ) -> None:
        """Writes arrays and JSON values; a step that exists already is left unchanged.

        Raises:
          CheckpointError: if the checkpoint was not written and forced to the disk; earlier ones
            are unchanged.
        """
        temporary = self._directory / f"{_SAVING}{step}"
        try:
            if step in self.steps():
                files.sync(self._directory)  # this may have failed the last time
                return
            # Unfinished checkpoints of killed processes take up space on the disk.
            self._clean()
            files.make_folder(self._directory)
            temporary.mkdir()
            arrays = {name: np.asarray(leaf) for name, leaf in named_leaves(tree).items()}
            _check_free_space(temporary, sum(array.nbytes for array in arrays.values()))
            described = {
                name: {"dtype": str(array.dtype), "shape": list(array.shape)}
                for name, array in arrays.items()
            }
            _write_arrays(temporary / _ARRAYS, arrays)
            # Before older checkpoints are removed.
            read = _read_arrays(temporary / _ARRAYS, described)
            if any(array.tobytes() != read[name].tobytes() for name, array in arrays.items()):
                raise ValueError("Orbax reads other values than it has written")
            body = {
                "format": FORMAT,
                "step": step,
                "score": score,
                "settings": self._settings,
                "meta": dict(meta),
                "arrays": described,
                "files": {
                    path.relative_to(temporary).as_posix(): sha256_file(path)
                    for path in sorted((temporary / _ARRAYS).rglob("*"))
                    if path.is_file()
                },
            }
            manifest = json.dumps({"sha256": sha256_json(body), "content": body}, indent=1)
            (temporary / _MANIFEST).write_text(manifest)
            for path in [*temporary.rglob("*"), temporary]:
                files.sync(path)
            temporary.rename(self._directory / str(step))
            if not (self._directory / _SAVED).exists():
                files.write_bytes(self._directory / _SAVED, b"")
            files.sync(self._directory)
        except Exception as error:  # Orbax has no error class of its own
            shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointError(
                f"the checkpoint of step {step} was not written to {self._directory}: "
                f"{first_line(error)}"
            ) from error
        self._remove_old()

    def restore(self, like: Any) -> tuple[Any, dict[str, Any]] | None:
        """Reads the newest undamaged checkpoint.

        A damaged one is reported by a `CheckpointWarning`, renamed and skipped. Unfinished
        checkpoints of a killed process are removed.

        Args:
          like: a tree of arrays, or of their shapes and dtypes, with the structure that was saved.

        Returns:
          The arrays on the default device, and the JSON values; None if nothing was ever saved.

        Raises:
          CheckpointError: if all are damaged or missing, if one cannot be read, or if it has other
            settings, shapes or dtypes; the message lists the differences.
        """
        self._clean()
        for step in reversed(self.steps()):
            path = self._directory / str(step)
            try:
                tree, checkpoint = self._restore(path, like)
            except _DamagedError as error:
                aside = _free(self._directory / f"{_DAMAGED}{step}")
                path.rename(aside)
                warnings.warn(
                    f"the checkpoint of step {step} is damaged ({error}); renamed to {aside}",
                    CheckpointWarning,
                    stacklevel=2,
                )
            else:
                self._remove_old()  # a process may have been killed before
                return tree, checkpoint.meta
        if any(path.name.startswith((_DAMAGED, _SAVED)) for path in self._paths()):
            raise CheckpointError(
                f"every checkpoint in {self._directory} is damaged or missing; damaged ones are "
                f"named {_DAMAGED}STEP. Move the folder to start from the first step"
            )
        return None

    def restore_step(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """Reads the checkpoint of one step, as `restore` does.

        Raises:
          CheckpointError: also if this step is damaged or missing.
        """
        try:
            tree, checkpoint = self._restore(self._directory / str(step), like)
        except _DamagedError as error:
            raise CheckpointError(
                f"the checkpoint of step {step} in {self._directory} is damaged: {error}"
            ) from error
        return tree, checkpoint.meta

    def _restore(self, path: Path, like: Any) -> tuple[Any, Checkpoint]:
        content = _verified_content(path)
        leaves = named_leaves(like)
        wanted = {
            name: f"{np.dtype(leaf.dtype)}{list(leaf.shape)}" for name, leaf in leaves.items()
        }
        found = {
            name: f"{array['dtype']}{array['shape']}" for name, array in content["arrays"].items()
        }
        message = differences_message(
            f"the checkpoint {path} is of another run or version. It differs:",
            files.without_sources(content["settings"]) | {"arrays": found},
            files.without_sources(self._settings) | {"arrays": wanted},
        )
        if message:
            raise CheckpointError(message)
        checkpoint = _read(path, content)
        arrays = [jnp.asarray(checkpoint.arrays[name]) for name in leaves]
        return jax.tree.unflatten(jax.tree.structure(like), arrays), checkpoint

    def _paths(self) -> list[Path]:
        return list(self._directory.iterdir()) if self._directory.is_dir() else []

    # Files that cannot be removed do no harm, and the next save tries again.

    def _clean(self) -> None:
        with contextlib.suppress(OSError):
            for path in self._paths():
                if path.name.startswith((_SAVING, _REMOVING)):
                    shutil.rmtree(path, ignore_errors=True)

    def _remove_old(self) -> None:
        with contextlib.suppress(OSError):
            steps = self.steps()
            scores = _scores(self._directory, steps)
            kept = {*steps[-NUM_LATEST:], _best(scores)}
            # One with an unreadable score may be the best; it is not among `scores`.
            for step in scores:
                if step in kept or (self._keep_every and step % self._keep_every == 0):
                    continue
                removing = self._directory / f"{_REMOVING}{step}"
                with contextlib.suppress(OSError):
                    (self._directory / str(step)).rename(removing)
                    shutil.rmtree(removing)


def load_checkpoint(
    workdir: Path | str, which: int | Literal["latest", "best"] = "latest"
) -> Checkpoint:
    """Reads a checkpoint of a run as plain NumPy, without its model or settings.

    Args:
      workdir: folder of the run.
      which: a step, the latest, or the one with the best validation accuracy.

    Raises:
      CheckpointError: if it is missing, damaged or cannot be read.
    """
    directory = Path(workdir).absolute() / files.CHECKPOINTS
    steps = Checkpoints(directory).steps()
    if which == "latest":
        step = steps[-1] if steps else None
    elif which == "best":
        step = _best(_scores(directory, steps))
    else:
        step = which
    if step not in steps:
        raise CheckpointError(f"{directory} has no checkpoint {which!r}; it has the steps {steps}")
    path = directory / str(step)
    try:
        return _read(path, _verified_content(path))
    except _DamagedError as error:
        raise CheckpointError(f"the checkpoint {path} is damaged: {error}") from error


def _scores(directory: Path, steps: list[int]) -> dict[int, float | None]:
    """Returns the score of each step whose manifest can be read."""
    scores = {}
    for step in steps:
        with contextlib.suppress(_DamagedError, CheckpointError):
            scores[step] = _manifest(directory / str(step))["score"]
    return scores


def _best(scores: Mapping[int, float | None]) -> int | None:
    """Returns the step with the highest score, the first of equal ones."""
    finite = {
        step: score for step, score in scores.items() if score is not None and math.isfinite(score)
    }
    return max(finite, key=lambda step: (finite[step], -step), default=None)


def _verified_content(path: Path) -> dict[str, Any]:
    """Returns the manifest of a checkpoint after verifying all its files."""
    content = _manifest(path)
    if str(content["step"]) != path.name:
        raise _DamagedError(f"its manifest is of step {content['step']}")
    for name, sha256 in content["files"].items():
        try:
            intact = sha256_file(path / name) == sha256
        except _NO_FILE:
            raise _DamagedError(f"{name} is missing") from None
        except OSError as error:
            raise _unreadable(path / name, error) from error
        if not intact:
            raise _DamagedError(f"{name} has another SHA-256")
    return content


def _manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / _MANIFEST).read_bytes())
        content = manifest["content"]
        intact = manifest["sha256"] == sha256_json(content)
    except _NO_FILE:
        raise _DamagedError(f"{_MANIFEST} is missing") from None
    except OSError as error:
        raise _unreadable(path / _MANIFEST, error) from error
    except (ValueError, KeyError, TypeError, RecursionError):
        intact = False
    if not intact:
        raise _DamagedError(f"{_MANIFEST} has another SHA-256")
    if not 1 <= content["format"] <= FORMAT:
        raise CheckpointError(
            f"the checkpoint {path} has format {content['format']}; this version reads 1 to "
            f"{FORMAT}"
        )
    return content


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    return CheckpointError(f"{path} cannot be read: {error.strerror}; retry when it is readable")


def _read(path: Path, content: dict[str, Any]) -> Checkpoint:
    described = content["arrays"]
    try:
        arrays = _read_arrays(path / _ARRAYS, described)
    except Exception as error:  # Orbax has no error class of its own
        raise CheckpointError(
            f"the checkpoint {path} is undamaged, but Orbax cannot read it: {first_line(error)}"
        ) from error
    return Checkpoint(
        content["step"], arrays, content["meta"], content["settings"], content["score"]
    )


def _check_free_space(folder: Path, size: int) -> None:
    # On a full disk Orbax would print a traceback from a thread of its own.
    if shutil.disk_usage(folder).free < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    ocp = _orbax()
    # Orbax cannot save arrays without elements; the manifest describes them in full.
    filled = {name: array for name, array in arrays.items() if array.size}
    with _checkpointer() as checkpointer, _plain(path) as plain:
        checkpointer.save(plain, args=ocp.args.PyTreeSave(filled))


def _read_arrays(path: Path, described: dict[str, Any]) -> dict[str, np.ndarray]:
    ocp = _orbax()
    arrays = {name: np.zeros(d["shape"], d["dtype"]) for name, d in described.items()}
    restore_args = {
        name: ocp.RestoreArgs(restore_type=np.ndarray)
        for name, array in arrays.items()
        if array.size
    }
    with _checkpointer() as checkpointer, _plain(path) as plain:
        args = ocp.args.PyTreeRestore(restore_args=restore_args)
        return arrays | checkpointer.restore(plain, args=args)


@contextlib.contextmanager
def _plain(path: Path) -> Iterator[Path]:
    """Yields another path of a file, if Orbax would read a pattern in it or cannot encode it."""
    if re.fullmatch(r"[\w./-]+", str(path), re.ASCII):
        yield path
    elif sys.platform == "linux":
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            yield Path(f"/proc/self/fd/{descriptor}") / path.name
        finally:
            os.close(descriptor)
    else:
        with tempfile.TemporaryDirectory() as place:
            link = Path(place) / "link"
            link.symlink_to(path.parent, target_is_directory=True)
            yield link / path.name


def _checkpointer() -> Any:
    ocp = _orbax()
    # Only the first process reads and writes; otherwise Orbax would wait for the others.
    options = ocp.options.MultiprocessingOptions(
        primary_host=0, active_processes={0}, barrier_sync_key_prefix="fmnist_jax"
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=options)
    return ocp.Checkpointer(handler, multiprocessing_options=options)


@functools.cache
def _orbax() -> Any:
    import orbax.checkpoint as ocp  # it takes longer to import than a first step

    return ocp


def named_leaves(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a tree by their paths, such as "params.Conv_0.kernel"."""
    leaves = jax.tree.leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    if len(named) != len(leaves):
        raise ValueError("two leaves of the tree have the same name")
    return named


def _free(path: Path) -> Path:
    """Returns the path, or the first free one with a number appended."""
    numbered = (path.with_name(f"{path.name}.{count}") for count in itertools.count(1))
    return next(free for free in itertools.chain([path], numbered) if not free.exists())
