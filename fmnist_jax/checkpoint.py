"""Saves and restores what a run needs to go on. This is the only file that imports orbax."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import jax

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

# Enough to survive a save that was cut short, and no more disk than that.
NUM_KEPT = 2


class CheckpointError(OSError):
    """A checkpoint could not be written or read."""


class Checkpoints:
    """The checkpoints in a folder, one a step; a context manager.

    A save is complete on return. Orbax writes `commit_success.txt` into a checkpoint last, and one
    without that file is not seen: neither a save cut short nor an empty folder is taken for one.

    Args:
      directory: made where it does not exist.

    Example:
      >>> import tempfile, jax.numpy as jnp
      >>> with Checkpoints(Path(tempfile.mkdtemp())) as checkpoints:
      ...     checkpoints.save(7, {"w": jnp.ones(2)}, {"note": "seven"})
      ...     tree, meta = checkpoints.restore(7, {"w": jnp.zeros(2)})
      >>> tree["w"].tolist(), meta
      ([1.0, 1.0], {'note': 'seven'})
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory.absolute()
        self._directory.mkdir(parents=True, exist_ok=True)

    @functools.cached_property
    def _manager(self) -> ocp.CheckpointManager:
        ocp = _orbax()
        return ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=ocp.checkpoint_managers.LatestN(NUM_KEPT),
                atomicity_options=ocp.options.AtomicityOptions(
                    mode=ocp.options.AtomicityMode.COMMIT_FILE
                ),
                cleanup_tmp_directories=True,
                enable_async_checkpointing=False,
            ),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if "_manager" in vars(self):
            self._manager.close()

    def latest_step(self) -> int | None:
        """The newest step with a complete checkpoint, or None."""
        return self._manager.latest_step() if any(self._directory.iterdir()) else None

    def save(self, step: int, tree: Any, meta: Mapping[str, Any]) -> None:
        """Writes arrays and a few JSON values; a step that is there already stays as it is.

        Raises:
          CheckpointError: if the checkpoint was not written.
        """
        if step == self.latest_step():
            return
        ocp = _orbax()
        items = ocp.args.Composite(
            tree=ocp.args.StandardSave(tree), meta=ocp.args.JsonSave(dict(meta))
        )
        try:
            saved = self._manager.save(step, args=items)
        except Exception as error:  # Orbax has no error class of its own
            raise CheckpointError(
                f"the checkpoint of step {step} in {self._directory} was not written: "
                f"{_first_line(error)}"
            ) from error
        # Orbax may refuse a step without an error.
        if not saved:
            raise CheckpointError(
                f"the checkpoint of step {step} was refused: step {self.latest_step()} is newer"
            )

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """Reads a step.

        Args:
          step: one that is there.
          like: a tree of arrays, or their shapes and dtypes, of the structure that was saved.

        Returns:
          The arrays on the default device, and the JSON values.

        Raises:
          CheckpointError: if the checkpoint cannot be read.
        """
        ocp = _orbax()
        sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), like
        )
        items = ocp.args.Composite(
            tree=ocp.args.StandardRestore(abstract), meta=ocp.args.JsonRestore()
        )
        try:
            restored = self._manager.restore(step, args=items)
        except Exception as error:  # Orbax has no error class of its own
            raise CheckpointError(
                f"the checkpoint of step {step} in {self._directory} cannot be read: "
                f"{_first_line(error)}"
            ) from error
        return restored["tree"], restored["meta"]


def _orbax() -> Any:
    import orbax.checkpoint as ocp  # imported here: it takes longer than a new run's first step

    return ocp


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
