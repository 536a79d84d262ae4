"""The parts of a run: names to objects, and objects to what config.json says of them.

A recipe names its network, optimizer, loss, augmentation and schedule. A name is one of this
package, or the import path of a target: a class or function, to which the options of the part are
passed, or an object that is used as it is.
"""

import contextlib
import dataclasses
import functools
import inspect
import re
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict, Unpack

import jax
import jax.numpy as jnp
import optax

from fmnist_jax.config import PARTS, Recipe, Run, short_name
from fmnist_jax.data.augment import AUGMENTATIONS
from fmnist_jax.digest import sha256_bytes, sha256_file
from fmnist_jax.errors import ConfigError, first_line
from fmnist_jax.nn.adapters import Adapter, find_adapter
from fmnist_jax.nn.models import ARCHS, create_model
from fmnist_jax.parts.imports import Origin, find
from fmnist_jax.train.metrics import cross_entropy
from fmnist_jax.train.optim import (
    OPTIMIZERS,
    SCHEDULES,
    create_optimizer,
    first_update,
    with_learning_rate,
)

# The arguments of `fit` in place of the fields of a recipe.
KEYWORDS = dict(zip(PARTS, ("model", "tx", "loss", "augment", "schedule"), strict=True))

_NAMED: dict[str, Mapping[str, Any]] = {
    "arch": ARCHS,
    "optimizer": {name: create_optimizer(name) for name in OPTIMIZERS},
    "loss": {"cross_entropy": cross_entropy},
    "augmentation": {"none": None, **AUGMENTATIONS},
    "schedule": SCHEDULES,
}

_EXPECTED = {
    "arch": "a class of Linen, NNX, Equinox or Haiku modules, or an object with init and apply",
    "optimizer": "an optax transformation, or a function that returns one",
    "loss": "a function of logits and labels",
    "augmentation": "a function of key, epoch, examples, images and strength",
    "schedule": "a function of the fraction of the run that is done",
}

_OBJECT = "object"  # the option of an object that cannot be made again, with its text


class Parts(TypedDict, total=False):
    """Objects in place of the parts that a recipe names."""

    model: Any
    tx: Any
    loss: Any
    augment: Any
    schedule: Any


def with_objects(run: Run, num_classes: int, **objects: Unpack[Parts]) -> Run:
    """Returns the run with objects in place of parts that its recipe names.

    The recipe gets their names, and the arguments with which they were constructed as options.

    Args:
      run: the run.
      num_classes: number of classes of its data.
      **objects: the objects, each as in `StepConfig`; or a class, a function or its name, to which
        the options of the recipe are passed.

    Raises:
      ConfigError: if an object is a module that holds its own parameters.
      TypeError: if there is no such part.
    """
    if unknown := set(objects) - set(KEYWORDS.values()):
        known = ", ".join(KEYWORDS.values())
        raise TypeError(f"unknown parts {', '.join(sorted(unknown))}; expected some of {known}")
    recipe, parts = run.recipe, dict(run.parts)
    for part, keyword in KEYWORDS.items():
        value = objects.get(keyword)
        if value is None:
            continue
        if isinstance(value, str):
            recipe = dataclasses.replace(recipe, **{part: value})  # type: ignore[arg-type]
            name = getattr(recipe, part)  # with the whole path of a file
            parts[part] = name, _target(part, dataclasses.replace(run, recipe=recipe))
            continue
        if find_adapter(type(value)) is not None:
            raise ConfigError(
                f"the model is a {type(value).__name__} with parameters of its own; pass the "
                "class, and its arguments as arch_options of the recipe"
            )
        target, options = _taken_apart(part, value, num_classes)
        if options is None:
            options = getattr(recipe, f"{part}_options") if _takes_options(target) else {}
        changes: Any = {part: _name_of(part, target), f"{part}_options": options}
        recipe = dataclasses.replace(recipe, **changes)
        parts[part] = getattr(recipe, part), target
    return dataclasses.replace(run, recipe=recipe, parts=parts)


def create_part(part: str, run: Run, num_classes: int, origin: Origin | None = None) -> Any:
    """Creates the object of a part.

    Args:
      part: the field of the recipe that names it.
      run: the run.
      num_classes: number of classes of its data.
      origin: the folder that names the parts; None if the user does.

    Raises:
      ConfigError: if it cannot be found, must not be called, takes other options, or is another
        kind of object.
    """
    name = getattr(run.recipe, part)
    options = _tuples(dict(getattr(run.recipe, f"{part}_options") or {}))
    if isinstance(options.pop(_OBJECT, None), str) and part not in run.parts:
        raise ConfigError(
            f"{part} is {name}, an object that cannot be made from its name and options; pass it "
            f"as {KEYWORDS[part]}="
        )
    target = _target(part, run, origin)
    is_given = run.parts.get(part, ("", None))[0] == name
    if options and not _takes_options(target):
        raise ConfigError(f"{short_name(name)} takes no options; leave {part}_options out")
    if origin is not None and not is_given:
        _check_may_call(part, name, target)
    if part == "arch" and run.recipe.image_size is not None:
        options = {"image_size": run.recipe.image_size} | options
    try:
        value = _constructed(part, name, target, tuple(options.items()), num_classes)
    except TypeError as error:
        given = ", ".join(options) or "left out"
        raise ConfigError(
            f"{short_name(name)} cannot be constructed with {part}_options {given}: "
            f"{first_line(error)}"
        ) from error
    is_right = {
        "arch": hasattr(value, "init") and hasattr(value, "apply"),
        "optimizer": isinstance(value, optax.GradientTransformation),
    }.get(part, value is None or callable(value))
    if not is_right:
        raise ConfigError(f"{part} {name} gives {type(value).__name__}; expected {_EXPECTED[part]}")
    return value


@functools.lru_cache(maxsize=64)  # one object for equal options, and so one compiled program
def _constructed(
    part: str, name: str, target: Any, options: tuple[tuple[str, Any], ...], num_classes: int
) -> Any:
    given = dict(options)
    if not _takes_options(target):
        return target
    if part == "arch":
        return create_model(name if name in ARCHS else target, num_classes, **given)
    if part == "optimizer":
        is_scaled = "learning_rate" in inspect.signature(target).parameters
        return with_learning_rate(target, **given) if is_scaled else target(**given)
    if isinstance(target, type):
        return target(**given)
    if target in AUGMENTATIONS.values():
        return dataclasses.replace(target, **given)
    inspect.signature(target).bind_partial(**given)  # raises TypeError
    return functools.partial(target, **given) if given else target


def _takes_options(target: Any) -> bool:
    """Whether a target is a class, a function or a named augmentation."""
    return _is_defined(target) or target in AUGMENTATIONS.values()


def _is_defined(target: Any) -> bool:
    """Whether a target is a class or a function, also one in a wrapper such as `jax.jit`."""
    return isinstance(inspect.unwrap(target), type | types.FunctionType)


def _definition(target: Any) -> Any:
    """Returns the class or function in the source that a target is, or is an object of."""
    return inspect.unwrap(target) if _is_defined(target) else type(target)


def _check_may_call(part: str, name: str, target: Any) -> None:
    """Refuses to call what could do anything with the arguments that a folder gives."""
    if name in _NAMED[part] or not _takes_options(target):
        return
    if part == "arch":
        has_methods = hasattr(target, "init") and hasattr(target, "apply")
        may_call = isinstance(target, type) and (has_methods or find_adapter(target) is not None)
    else:
        may_call = target.__module__.partition(".")[0] == "optax"
    if not may_call:
        raise ConfigError(
            f"{name} is named by a folder and is not called for it; pass it yourself, as "
            f"{KEYWORDS[part]}= or --{part}"
        )


def find_sources(
    run: Run, names: Sequence[str] = PARTS, origin: Origin | None = None
) -> dict[str, dict[str, Any]]:
    """Returns file and SHA-256 of the source of each part that is not of this package.

    The SHA-256 is that of the file; of a class or function of a notebook, that of its text; and of
    an optimizer that is an object, that of its update as a program.
    """
    found = {}
    for part in names:
        if getattr(run.recipe, part) not in _NAMED[part]:
            found[part] = _source(_target(part, run, origin))
    return found


def _source(target: Any) -> dict[str, Any]:
    if isinstance(target, optax.GradientTransformation):
        return {"file": None, "sha256": _program_sha256(target)}
    target = _definition(target)
    with contextlib.suppress(OSError, TypeError):
        file = inspect.getsourcefile(target) or ""
        return {"file": file, "sha256": sha256_file(Path(file))}
    # In a notebook, functions have a source, and classes only since Python 3.13.
    text = ""
    for function in vars(target).values() if isinstance(target, type) else [target]:
        with contextlib.suppress(OSError, TypeError):
            text += inspect.getsource(function)
    return {"file": None, "sha256": sha256_bytes(text.encode()) if text else None}


def _program_sha256(tx: optax.GradientTransformation) -> str | None:
    """SHA-256 of an optimizer's update of a kernel and a bias; it depends on its constants."""
    params = {"bias": jnp.zeros(2), "kernel": jnp.zeros((3, 3, 2, 2))}
    scalars = {"learning_rate": jnp.float32(1), "weight_decay": jnp.float32(0)}
    try:
        program = jax.make_jaxpr(functools.partial(first_update, tx))(scalars, params)
        return sha256_bytes(_text(program).encode())
    except Exception:  # noqa: BLE001 (any error, of an optimizer that needs other parameters)
        return None


def _target(part: str, run: Run, origin: Origin | None = None) -> Any:
    name = getattr(run.recipe, part)
    given_name, given = run.parts.get(part, ("", None))
    if given_name == name:
        return given
    if name in _NAMED[part]:
        return _NAMED[part][name]
    if ":" not in name:
        raise ConfigError(
            f"{part} is {name!r}; choose one of {', '.join(_NAMED[part])}, or an import path such "
            "as package.module:Name"
        )
    recorded = (origin.recorded.get(part) or {}) if origin else {}
    return find(name, origin, recorded.get("sha256"))


def _name_of(part: str, target: Any) -> str:
    """Returns the name of a target of this package, or its import path."""
    for name, named in _NAMED[part].items():
        if named is target:
            return name
    if isinstance(target, optax.GradientTransformation):
        target = target.update
    target = _definition(target)
    module, name = str(target.__module__), str(target.__qualname__)
    package = module.partition(".")[0]
    if module != package and getattr(sys.modules.get(package), name, None) is target:
        return f"{package}:{name}"  # its public path
    file = getattr(sys.modules.get(module), "__file__", None)
    is_of_file = file is not None and module.rpartition("_")[0] == Path(file).stem
    return f"{file if is_of_file else module}:{name}"


def _taken_apart(part: str, value: Any, num_classes: int) -> tuple[Any, dict[str, Any] | None]:
    """Returns a target and the options with which it gives the object again, or the object."""
    is_named = any(value is named for named in _NAMED[part].values())
    if is_named or _is_defined(value):
        return value, None
    target: Any = type(value)
    options: Any = {}
    made_of: Any = None
    if isinstance(value, optax.GradientTransformation):
        target, options = made_of = getattr(value.update, "made_of", (value, {}))
    elif isinstance(value, Adapter):
        target, options = value.module, dict(value.options)
    elif isinstance(value, functools.partial) and not value.args:
        target, options = made_of = value.func, value.keywords
    name = _name_of(part, target)
    try:
        if dataclasses.is_dataclass(value) and not isinstance(value, Adapter):
            options = {
                field.name: option
                for field in dataclasses.fields(value)
                if field.init and field.name not in ("parent", "name")
                and (option := getattr(value, field.name)) != field.default
            }  # fmt: skip
        if options.get("num_classes") == num_classes:
            options = {key: option for key, option in options.items() if key != "num_classes"}
        names: Any = {"arch": "", part: name, f"{part}_options": options}
        run = Run(recipe=Recipe(epochs=1, **names), workdir=Path(), parts={part: (name, target)})
        if made_of is not None or create_part(part, run, num_classes) == value:
            return target, dict(options)
    except Exception:  # noqa: BLE001, S110 (of a constructor of the user)
        pass
    return value, {_OBJECT: _text(value)}


def _text(value: Any) -> str:
    """Returns the text of an object without addresses."""
    return re.sub(" at 0x[0-9a-f]+", "", repr(value))


def _tuples(value: Any) -> Any:
    """Returns options with tuples for the lists of JSON, so that they hash."""
    if isinstance(value, list | tuple):
        return tuple(map(_tuples, value))
    return {key: _tuples(item) for key, item in value.items()} if isinstance(value, dict) else value
