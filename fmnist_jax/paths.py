"""Paths of the user. Standard library only."""

import os
import re
from pathlib import Path

from fmnist_jax.errors import ConfigError


def local_path(path: str | Path) -> Path:
    """Replaces `~`, and refuses a URL, which would become a folder of that name.

    Raises:
      ConfigError: if it is a URL, or there is no home folder.

    Example:
      >>> local_path("gs://bucket/run")
      Traceback (most recent call last):
      ...
      fmnist_jax.errors.ConfigError: gs://bucket/run is a URL; expected a path on this machine
    """
    if re.match("[A-Za-z][A-Za-z0-9+.-]+:/", str(path)):  # Path removes the second slash
        raise ConfigError(f"{path} is a URL; expected a path on this machine")
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(f"{path} is in a home folder that cannot be found") from error


def user_folder(default: str, variable: str = "") -> Path | None:
    """Returns the folder that an environment variable, if any, or else `default` names.

    None if it is in a home folder and there is none, as for a user without HOME and without a name.

    Example:
      >>> user_folder("~/data") == Path.home() / "data"
      True
    """
    try:
        return Path(os.environ.get(variable) or default).expanduser()
    except RuntimeError:
        return None
