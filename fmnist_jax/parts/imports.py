"""`find`: import paths to objects, and what the folder of a run may have imported.

A folder of a run must not bring code of its own. For it, modules and files inside it are refused,
and a file must have the SHA-256 that was recorded in training.
"""

import functools
import importlib
import importlib.util
import operator
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fmnist_jax.digest import sha256_bytes
from fmnist_jax.errors import ConfigError, first_line
from fmnist_jax.paths import local_path


class Origin(NamedTuple):
    """The folder of a run that names parts, rather than the user.

    Attributes:
      folder: the folder.
      recorded: the source of each part, as its config.json says (`parts.sources`).
    """

    folder: Path
    recorded: Mapping[str, Any]


def find(name: str, origin: Origin | None = None, sha256: str | None = None) -> Any:
    """Imports an object.

    Args:
      name: "package.module:Name" or "/folder/file.py:Name".
      origin: the folder that names it; None if the user does.
      sha256: that of the file in training; needed if `origin` is given and it is a file.

    Raises:
      ConfigError: if it does not exist, cannot be imported, or must not be for this folder.

    Example:
      >>> find("fmnist_jax.nn.models:SmallDropout").__name__
      'SmallDropout'
    """
    place, _, attribute = name.rpartition(":")
    try:
        if place.endswith(".py"):
            module = _run_file(local_path(place).absolute(), origin, sha256)
        else:
            module = _import(place, origin)
        return operator.attrgetter(attribute)(module)
    except ConfigError:
        raise
    except Exception as error:
        hint = ""
        if origin is not None:
            hint = f", as {origin.folder} names it; pass it yourself, by --arch or model="
        elif isinstance(error, ImportError) and not place.endswith(".py"):
            hint = "; add its folder to PYTHONPATH, or name its file, as in nets.py:Net"
        text = f"{type(error).__name__}: {first_line(error)}"
        raise ConfigError(f"{name} cannot be imported ({text}){hint}") from error


def _import(place: str, origin: Origin | None) -> types.ModuleType:
    names = place.split(".")
    for count in range(1, len(names) + 1):
        name = ".".join(names[:count])
        if origin is not None and name not in sys.modules:
            spec = importlib.util.find_spec(name)  # its packages are imported already
            locations = (
                () if spec is None else (spec.origin, *(spec.submodule_search_locations or ()))
            )
            for path in locations:
                _check_outside(name, Path(path or ""), origin)
        importlib.import_module(name)
    return sys.modules[place]


def _run_file(path: Path, origin: Origin | None, sha256: str | None) -> types.ModuleType:
    content = path.read_bytes()
    if origin is not None:
        _check_outside(str(path), path, origin)
        if sha256_bytes(content) != sha256:
            raise ConfigError(
                f"{path} is not the file that {origin.folder} was trained with: it has another "
                "SHA-256, so it is not executed for it; name it yourself, by --arch or model="
            )
    return _executed(str(path), content)


@functools.lru_cache(maxsize=64)  # so that its classes are the same objects in each call
def _executed(path: str, content: bytes) -> types.ModuleType:
    # Under a name that no other module has; dataclasses and pickle look it up.
    module = types.ModuleType(f"{Path(path).stem}_{sha256_bytes(path.encode() + content)[:12]}")
    module.__file__ = path
    sys.modules[module.__name__] = module
    try:
        exec(compile(content, path, "exec"), vars(module))  # noqa: S102 (the user's own file)
    except BaseException:
        del sys.modules[module.__name__]
        raise
    return module


def _check_outside(name: str, path: Path, origin: Origin) -> None:
    if origin.folder.resolve() in path.resolve().parents:
        raise ConfigError(
            f"{name} is inside {origin.folder}, whose code is not executed; move it, and name it "
            "yourself, by --arch or model="
        )
