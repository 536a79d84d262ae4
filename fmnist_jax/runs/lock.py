"""One process at a time in a folder."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from fmnist_jax.errors import ConfigError


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keeps a folder for this process; the lock ends with the process, however that ends.

    What is locked is an empty file in it, `.lock`, which stays: NFS locks only what is open for
    writing, as a folder cannot be, and a file that were removed could be locked by two.

    Raises:
      ConfigError: if another process has it.
      OSError: if the folder cannot be written.

    Example:
      >>> import tempfile
      >>> with locked(Path(tempfile.mkdtemp())):
      ...     print("mine")
      mine
    """
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
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
