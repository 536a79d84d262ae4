"""The flags that the commands share, and the runs and data that they describe."""

import argparse
import dataclasses
import json
import re
import types
import typing
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

import fmnist_jax as fm
from fmnist_jax import config, errors
from fmnist_jax.digest import sha256_json
from fmnist_jax.parts.objects import KEYWORDS, Parts
from fmnist_jax.paths import local_path
from fmnist_jax.recipes import find_recipe
from fmnist_jax.studies.executors import Executor, RayExecutor, fit_in_turn


class Parser(argparse.ArgumentParser):
    """A parser that reports bad usage in one line, and whose paths are local."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.register("type", Path, _path)

    def error(self, message: str) -> NoReturn:
        """Prints the message and exits with status 2."""
        self.exit(2, f"error: {message}; --help shows all flags\n")


def add_recipe_flag(parser: argparse.ArgumentParser, **options: Any) -> None:
    """Adds `--arch`, which names a recipe or a network, and its synonym `--recipe`."""
    text = (
        "recipe, or network with its first recipe (`run --list` shows all), or your own network: "
        "package.module:Name or file.py:Name"
    )
    parser.add_argument("--arch", "--recipe", metavar="NAME", help=text, **options)


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say where the data are."""
    data = parser.add_argument_group("data", "Without these, Fashion-MNIST is found or downloaded.")
    group = data.add_mutually_exclusive_group()
    group.add_argument(
        "--data-dir", type=Path, metavar="DIR", help="Fashion-MNIST: IDX files, or TFDS directory"
    )
    group.add_argument("--sample", action="store_true", help="use the embedded sample")
    group.add_argument(
        "--dataset",
        metavar="SOURCE",
        help="other images: folder of pictures, .npz archive, IDX files, or name in TFDS",
    )
    data.add_argument(
        "--resize", type=int, metavar="N", help="resize the images of --dataset to N x N pixels"
    )
    data.add_argument(
        "--skip-unreadable", action="store_true", help="leave out pictures that cannot be read"
    )


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the data flags and one flag per field of `Recipe` and `Run` that has a help text.

    A training flag that is not given is absent from the parsed arguments.
    """
    add_data_flags(parser)
    group = parser.add_argument_group("recipe", "The defaults are those of the recipe.")
    for field in _fields(fm.Recipe):
        _add_flag(group, field, field.metadata["help"])
    group = parser.add_argument_group("run")
    for field in _fields(fm.Run):
        default = "" if field.default is None else f" ({field.default})"
        _add_flag(group, field, field.metadata["help"] + default)
    group.add_argument(
        "--exclude",
        type=Path,
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="file that lists training images to leave out, one position per line",
    )
    group.add_argument(
        "--classes", metavar="A,B,...", help="train on these, by name or number; default: all"
    )


def add_output_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that `run` reads."""
    parser.add_argument("--no-cache", action="store_true", help="do not cache compiled programs")
    parser.add_argument("--quiet", action="store_true", help="print errors and warnings only")


def add_network_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments that `load_classifier` reads."""
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--which",
        metavar="CHECKPOINT",
        default="latest",
        help="latest, best (by validation accuracy), or a step (%(default)s)",
    )
    parser.add_argument(
        "--arch", metavar="NAME", help="network of the run, if it cannot be imported as recorded"
    )


def load_classifier(arguments: argparse.Namespace) -> fm.Classifier:
    """Loads the network that the arguments of `add_network_arguments` describe."""
    which = arguments.which
    if which in ("latest", "best"):
        return fm.load_classifier(arguments.run, which, model=arguments.arch)
    if not which.isdecimal():
        raise errors.ConfigError(f"--which is {which!r}; expected latest, best or a step")
    return fm.load_classifier(arguments.run, int(which), model=arguments.arch)


def add_workdir_flag(parser: argparse.ArgumentParser, default: Path | None, text: str) -> None:
    """Adds `--workdir`."""
    parser.add_argument("--workdir", type=Path, metavar="DIR", default=default, help=text)


def add_ray_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that `create_executor` reads."""
    group = parser.add_argument_group("Ray", "Independent runs at once, on a Ray cluster.")
    group.add_argument(
        "--ray",
        metavar="ADDRESS",
        nargs="?",
        const="local",
        help="cluster, such as auto or ray://head:10001; without an address, this machine",
    )
    group.add_argument("--ray-cpus", type=float, metavar="N", default=1, help="cores of a run (1)")
    group.add_argument("--ray-gpus", type=float, metavar="N", default=0, help="GPUs of a run (0)")


def create_executor(arguments: argparse.Namespace) -> Executor:
    """Creates the executor that the flags of `add_ray_flags` describe."""
    if arguments.ray is None:
        return fit_in_turn
    return RayExecutor(arguments.ray, num_cpus=arguments.ray_cpus, num_gpus=arguments.ray_gpus)


def create_run(arguments: argparse.Namespace, name: str, workdir: Path) -> fm.Run:
    """Creates the run that the training flags describe.

    Args:
      arguments: with the flags of `add_training_flags`.
      name: of a recipe or a network (`find_recipe`).
      workdir: folder of the run.

    Raises:
      ConfigError: if there is no such recipe, or a value is outside its range.
    """
    recipe = dataclasses.replace(find_recipe(name), **_given(arguments, fm.Recipe))
    settings = _given(arguments, fm.Run)
    if "exclude" in arguments:
        settings["exclude"] = _read_positions(arguments.exclude)
    return fm.Run(recipe=recipe, workdir=workdir, **settings)


def given_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the settings that training flags give."""
    exclude = {"exclude": arguments.exclude} if "exclude" in arguments else {}
    return _given(arguments, fm.Recipe) | _given(arguments, fm.Run) | exclude


def load_data(arguments: argparse.Namespace, console: Console) -> fm.Dataset:
    """Loads the data that the flags describe; the console says what is read.

    Raises:
      ConfigError: if --exclude was made for other data, or is combined with --classes, or a flag
        of --dataset is given without it.
      DataError: if the data cannot be read.
    """
    classes = getattr(arguments, "classes", None)
    if classes is not None and "exclude" in arguments:
        raise errors.ConfigError(
            "--exclude lists positions among the images of all classes; leave --classes out"
        )
    if arguments.dataset is not None:
        console.print(f"Reading {arguments.dataset} ...", highlight=False, soft_wrap=True)
        dataset = fm.load_dataset(
            arguments.dataset,
            resize=arguments.resize,
            skip_unreadable=arguments.skip_unreadable,
        )
    elif arguments.resize is not None or arguments.skip_unreadable:
        raise errors.ConfigError("--resize and --skip-unreadable are for --dataset")
    else:
        dataset = fm.load_fashion_mnist(arguments.data_dir, sample=arguments.sample)
    check_excluded(arguments, dataset)
    return dataset if classes is None else fm.select_classes(dataset, classes)


def check_excluded(arguments: argparse.Namespace, dataset: fm.Dataset) -> None:
    """Refuses a list of excluded images whose comments name the SHA-256 of other data."""
    if "exclude" not in arguments:
        return
    named = re.search(r"#.*SHA-256 ([0-9a-f]{64})", _read_text(arguments.exclude))
    if named is not None and named[1] != dataset.sha256:
        raise errors.ConfigError(
            f"{arguments.exclude} lists images of other data, with SHA-256 {named[1][:12]}...; "
            f"this is {dataset.source}, {dataset.sha256[:12]}..."
        )


def name_workdir(parent: Path, run: fm.Run, dataset: fm.Dataset, *, seeds: bool) -> Path:
    """Returns a folder for these settings, so that the same settings find the same run again.

    Args:
      parent: folder of the folder.
      run: the run, or the first of several seeds.
      dataset: the data.
      seeds: whether runs with further seeds share the folder.
    """
    digest = sha256_json([config.to_dict(run), dataset.class_names, dataset.sha256])
    # Without the number of seeds, so that more can be added.
    name = f"seeds-from-{run.seed}" if seeds else f"seed{run.seed}"
    return parent / f"{config.short_name(run.recipe.arch)}-{name}-{digest[:8]}"


def _fields(settings: type[fm.Recipe] | type[fm.Run]) -> list[dataclasses.Field[Any]]:
    return [field for field in dataclasses.fields(settings) if "help" in field.metadata]


def _given(
    arguments: argparse.Namespace, settings: type[fm.Recipe] | type[fm.Run]
) -> dict[str, Any]:
    names = [field.name for field in _fields(settings) if field.name in arguments]
    given = {name: getattr(arguments, name) for name in names}
    return {
        name: dict(value) if name.endswith("_options") else value for name, value in given.items()
    }


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is no option; expected NAME=VALUE")
    return name, config.parse_value(value)


def named_parts(arguments: argparse.Namespace) -> Parts:
    """Returns the import paths of parts that flags give, as `fm.fit` takes them."""
    names = {keyword: getattr(arguments, part, "") for part, keyword in KEYWORDS.items()}
    given: Any = {keyword: name for keyword, name in names.items() if ":" in name}
    return given


def part_flags(recipe: fm.Recipe) -> list[str]:
    """Returns the flags that name the parts of a recipe and their options."""
    flags = []
    for part in KEYWORDS:
        flags += [f"--{part}", getattr(recipe, part)] if part != "arch" else []
        options = getattr(recipe, f"{part}_options") or {}
        pairs = [f"{name}={json.dumps(value)}" for name, value in options.items()]
        flags += [f"--{part}-options", *pairs] if pairs else []
    return flags


def _add_flag(
    group: argparse._ArgumentGroup, field: dataclasses.Field[Any], help_text: str
) -> None:
    is_optional = typing.get_origin(field.type) in (types.UnionType, typing.Union)
    kind: Any = typing.get_args(field.type)[0] if is_optional else field.type
    options: dict[str, Any] = {"type": kind, "metavar": getattr(kind, "__name__", None)}
    if "names" in field.metadata:
        options["metavar"] = "NAME"
    elif field.name.endswith("_options"):
        options = {"type": _option, "nargs": "+", "metavar": "NAME=VALUE"}
    elif field.name == "learning_rate":
        options["type"] = _number_or_none
    elif typing.get_origin(kind) is typing.Literal:
        options = {"choices": typing.get_args(kind)}
    elif kind is bool:
        options = {"action": argparse.BooleanOptionalAction}
    group.add_argument(
        f"--{field.name.replace('_', '-')}",
        default=argparse.SUPPRESS,
        help=help_text.replace("%", "%%"),
        **options,
    )


def _number_or_none(text: str) -> float | None:
    return None if text == "none" else float(text)


def _path(text: str) -> Path:
    try:
        return local_path(text)
    except errors.ConfigError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _read_positions(path: Path) -> list[int]:
    """Reads one integer per line; # starts a comment."""
    lines = [line.partition("#")[0].strip() for line in _read_text(path).splitlines()]
    wrong = next((line for line in lines if line and not line.isdecimal()), None)
    if wrong is not None:
        raise errors.ConfigError(f"{path} has the line {wrong!r}; expected one integer per line")
    return [int(line) for line in lines if line]


def _read_text(path: Path) -> str:
    return path.read_text(errors="replace")
