"""Saves and restores what a run needs to go on. This is the only file that imports orbax.

A checkpoint is a folder named by its step:

    arrays/        the arrays by name, written by Orbax
    manifest.json  what they are: step, settings, values of JSON, dtype, shape and SHA-256 of each
                   array, SHA-256 of each file, and of itself

It is written under another name, forced to the disk, and renamed; it is renamed before it is
removed. So a folder with the name of a step was whole once, and if it is not now, it was damaged.
The empty file `.saved` tells that there was one: should none be left, that is damage too.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import math
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fmnist_jax.config import differences
from fmnist_jax.errors import CheckpointError, CheckpointWarning
from fmnist_jax.runs import files

# Raised when what is written here could not be read by the version before.
FORMAT = 1

# Enough to survive damage to one, and no more disk than that.
NUM_LATEST = 2

_ARRAYS, _MANIFEST = "arrays", "manifest.json"
_SAVING, _REMOVING, _DAMAGED = ".saving-", ".removing-", "damaged-"
_SAVED = ".saved"


class _DamagedError(Exception):
    """A checkpoint is not what was written."""


class Checkpoint(NamedTuple):
    """What was saved, as plain NumPy.

    Attributes:
      step: updates made.
      arrays: each array by its name, such as "state.params.Conv_0.kernel".
      meta: the values of JSON that were saved with them.
      settings: the settings of the run.
      score: what it was saved with, or None.
    """

    step: int
    arrays: dict[str, np.ndarray]
    meta: dict[str, Any]
    settings: dict[str, Any]
    score: float | None


class Checkpoints:
    """The checkpoints in a folder, one a step.

    A save is on the disk on return. Kept are the two newest, the one of the highest score, and
    every `keep_every`-th step. One process at a time may save.

    Args:
      directory: made at the first save.
      settings: the settings of the run, ready for JSON; a checkpoint of others is refused.
      keep_every: steps that are multiples of it are kept.

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
        # As it will be read: JSON has no tuples.
        self._settings = json.loads(json.dumps(settings or {}))
        self._keep_every = keep_every

    def steps(self) -> list[int]:
        """The steps that were saved, in rising order; damage is not looked for."""
        return sorted(int(path.name) for path in self._paths() if path.name.isdigit())

    def save(
        self, step: int, tree: Any, meta: Mapping[str, Any], score: float | None = None
    ) -> None:
        """Writes arrays and a few values of JSON; a step that is there already stays as it is.

        Raises:
          CheckpointError: if the checkpoint was not written and forced to the disk; what was saved
            before is as it was.
        """
        temporary = self._directory / f"{_SAVING}{step}"
        try:
            if step in self.steps():
                files.sync(self._directory)  # which may be what failed the last time
                return
            # Whatever is left of others would keep their place on the disk.
            self._clean()
            files.make_folder(self._directory)
            temporary.mkdir()
            arrays = {name: np.asarray(leaf) for name, leaf in _named_leaves(tree).items()}
            _check_room(temporary, sum(array.nbytes for array in arrays.values()))
            _write_arrays(temporary / _ARRAYS, arrays)
            body = {
                "format": FORMAT,
                "step": step,
                "score": score,
                "settings": self._settings,
                "meta": dict(meta),
                "arrays": {name: _describe(array) for name, array in arrays.items()},
                "files": {
                    path.relative_to(temporary).as_posix(): _file_sha256(path)
                    for path in sorted((temporary / _ARRAYS).rglob("*"))
                    if path.is_file()
                },
            }
            manifest = json.dumps({"sha256": _json_sha256(body), "content": body}, indent=1)
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
                f"{_first_line(error)}"
            ) from error
        self._remove_old()

    def restore(self, like: Any) -> tuple[Any, dict[str, Any]] | None:
        """Reads the newest checkpoint that is undamaged.

        A damaged one is reported by a `CheckpointWarning`, kept aside under another name, and
        passed over. What a process that was killed left unfinished is removed.

        Args:
          like: a tree of arrays, or their shapes and dtypes, of the structure that was saved.

        Returns:
          The arrays on the default device, and the values of JSON; None where nothing was ever
          saved.

        Raises:
          CheckpointError: if all are damaged or gone, if one cannot be read, or if it is of other
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
                    f"the checkpoint of step {step} is damaged ({error}); it is kept as {aside}",
                    CheckpointWarning,
                    stacklevel=2,
                )
            else:
                self._remove_old()  # which a process may not have come to
                return tree, checkpoint.meta
        if any(path.name.startswith((_DAMAGED, _SAVED)) for path in self._paths()):
            raise CheckpointError(
                f"every checkpoint in {self._directory} is damaged or gone; what is there stays. "
                "Move the folder away to start from the first step"
            )
        return None

    def restore_step(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """Reads one step, as `restore` does.

        Raises:
          CheckpointError: also if this step is damaged or not there.
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
        leaves = _named_leaves(like)
        wanted = {
            name: f"{np.dtype(leaf.dtype)}{list(leaf.shape)}" for name, leaf in leaves.items()
        }
        found = {
            name: f"{array['dtype']}{array['shape']}" for name, array in content["arrays"].items()
        }
        lines = [
            *differences(content["settings"], self._settings),
            *differences(found, wanted),
        ]
        if lines:
            raise CheckpointError(
                f"the checkpoint {path} is of another run or program. It differs in\n"
                + "\n".join(f"  {line}" for line in lines)
            )
        checkpoint = _read(path, content)
        arrays = [jnp.asarray(checkpoint.arrays[name]) for name in leaves]
        return jax.tree.unflatten(jax.tree.structure(like), arrays), checkpoint

    def _paths(self) -> list[Path]:
        return list(self._directory.iterdir()) if self._directory.is_dir() else []

    # What cannot be removed is in nobody's way, and the next save tries again.

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
            # One whose score cannot be read may be the best.
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
    """Reads a checkpoint of a run as plain NumPy; neither its model nor its settings are needed.

    Args:
      workdir: folder of the run.
      which: a step, the latest, or the one with the best validation accuracy.

    Raises:
      CheckpointError: if it is not there, damaged or cannot be read.
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
    """The score of each step whose manifest can be read."""
    scores = {}
    for step in steps:
        with contextlib.suppress(_DamagedError, CheckpointError):
            scores[step] = _manifest(directory / str(step))["score"]
    return scores


def _best(scores: Mapping[int, float | None]) -> int | None:
    """The step of the highest score, the first of equal ones."""
    finite = {
        step: score for step, score in scores.items() if score is not None and math.isfinite(score)
    }
    return max(finite, key=lambda step: (finite[step], -step), default=None)


def _verified_content(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint whose files are, byte by byte, what was written."""
    content = _manifest(path)
    if str(content["step"]) != path.name:
        raise _DamagedError(f"it is that of step {content['step']}")
    for name, sha256 in content["files"].items():
        try:
            intact = _file_sha256(path / name) == sha256
        except FileNotFoundError:
            raise _DamagedError(f"{name} is missing") from None
        except OSError as error:
            raise _DamagedError(f"{name} cannot be read: {error.strerror}") from error
        if not intact:
            raise _DamagedError(f"{name} is not what was written")
    return content


def _manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads((path / _MANIFEST).read_bytes())
        content = manifest["content"]
        intact = manifest["sha256"] == _json_sha256(content)
    except FileNotFoundError:
        raise _DamagedError(f"{_MANIFEST} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        intact = False
    if not intact:
        raise _DamagedError(f"{_MANIFEST} is not what was written")
    if content["format"] != FORMAT:
        raise CheckpointError(
            f"the checkpoint {path} has format {content['format']}; this version reads {FORMAT}"
        )
    return content


def _read(path: Path, content: dict[str, Any]) -> Checkpoint:
    described = content["arrays"]
    try:
        arrays = _read_arrays(path / _ARRAYS, described)
    except Exception as error:  # Orbax has no error class of its own
        raise CheckpointError(
            f"the checkpoint {path} is undamaged, but Orbax cannot read it: {_first_line(error)}"
        ) from error
    for name, array in arrays.items():
        if _describe(array) != described[name]:
            raise _DamagedError(f"{name} is not what was written")
    return Checkpoint(
        content["step"], arrays, content["meta"], content["settings"], content["score"]
    )


def _check_room(folder: Path, size: int) -> None:
    """Raises OSError where so many bytes cannot be written.

    Orbax would find out as well, but with a traceback on stderr from a thread of its own.
    """
    trial = folder / "trial"
    trial.write_bytes(bytes(size))
    trial.unlink()


def _write_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    ocp = _orbax()
    # Orbax saves no array without elements; the manifest says all about them.
    filled = {name: array for name, array in arrays.items() if array.size}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(filled))


def _read_arrays(path: Path, described: dict[str, Any]) -> dict[str, np.ndarray]:
    ocp = _orbax()
    arrays = {name: np.zeros(d["shape"], d["dtype"]) for name, d in described.items()}
    restore_args = {
        name: ocp.RestoreArgs(restore_type=np.ndarray)
        for name, array in arrays.items()
        if array.size
    }
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        args = ocp.args.PyTreeRestore(restore_args=restore_args)
        return arrays | checkpointer.restore(path, args=args)


@functools.cache
def _orbax() -> Any:
    import orbax.checkpoint as ocp  # imported here: it takes longer than a new run's first step

    return ocp


def _named_leaves(tree: Any) -> dict[str, Any]:
    leaves = jax.tree.leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    if len(named) != len(leaves):
        raise ValueError("two leaves of the tree have the same name")
    return named


def _describe(array: np.ndarray) -> dict[str, Any]:
    sha256 = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
    return {"dtype": str(array.dtype), "shape": list(array.shape), "sha256": sha256}


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _json_sha256(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _free(path: Path) -> Path:
    """The path, or the first with a number behind it that is not taken."""
    numbered = (path.with_name(f"{path.name}.{count}") for count in itertools.count(1))
    return next(free for free in itertools.chain([path], numbered) if not free.exists())


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or type(error).__name__
