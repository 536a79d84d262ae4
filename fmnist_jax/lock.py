"""One process at a time in a folder."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from fmnist_jax.config import ConfigError


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps a folder for this process; the lock ends with the process, however that ends.

    Nothing is written: it is the folder itself that is locked.

    Raises:
      ConfigError: if another process has it.
      OSError: if the folder cannot be opened.

    Example:
      >>> import tempfile
      >>> with locked(Path(tempfile.mkdtemp())):
      ...     print("mine")
      mine
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(
                f"workdir {folder} is used by another run that is under way; wait for it, or name "
                "another folder"
            ) from None
        yield
    finally:
        os.close(descriptor)
