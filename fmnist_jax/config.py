"""Settings: `Recipe` describes how a network is trained; `Run` adds a seed and a folder.

Both are frozen and validated on construction. `help` in a field's metadata is the text of its
command-line flag. Standard library only.
"""

import dataclasses
import json
import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, get_args, get_origin

from fmnist_jax.errors import ConfigError
from fmnist_jax.paths import local_path

OptimizerName = Literal["adam", "rmsprop", "sgd", "muon"]
ScheduleName = Literal["constant", "cosine", "one_cycle", "linear"]
DtypeName = Literal["float32", "bfloat16"]
AugmentationName = Literal["none", "keras", "geometric", "shift", "shift_erase"]
LossName = Literal["cross_entropy"]
ClassWeightsName = Literal["none", "balanced"]

# Fields of a recipe that name its parts; each has a field of options, such as `arch_options`.
PARTS = ("arch", "optimizer", "loss", "augmentation", "schedule")

# Fields of a run that have no effect on its training, or are recorded by name.
_NO_EFFECT = ("workdir", "checkpoint_every", "keep_every", "tta", "devices", "parts")

# Fields of a recipe that earlier versions did not have, with the values that they had in effect.
ADDED = {
    "shards": 1,
    "loss": "cross_entropy",
    "patience": None,
    "matmul_precision": "float32",
    "class_weights": "none",
} | {f"{part}_options": None for part in PARTS}


class _Range(NamedTuple):
    """What a number must be: its type, and the bounds that the text names."""

    text: str
    kind: Any
    is_inside: Callable[[Any], bool]


_COUNT = _Range("an integer of at least 1", int, lambda value: value >= 1)
# jax.random.key silently drops the bits above 32, so two seeds would be one.
_SEED = _Range("an integer in [0, 2**32)", int, lambda value: 0 <= value < 2**32)
_FRACTION = _Range("a number in [0, 1)", int | float, lambda value: 0 <= value < 1)
_RATE = _Range("a finite number above 0", int | float, lambda value: 0 < value < math.inf)
_SCALE = _Range("a finite number of at least 0", int | float, lambda value: 0 <= value < math.inf)


def _flag(text: str, default: Any = dataclasses.MISSING, expected: _Range | None = None) -> Any:
    return dataclasses.field(default=default, metadata={"help": text, "range": expected})


def _part(text: str, default: str, names: Any) -> Any:
    choices = get_args(names)
    text += f": {', '.join(choices)}, or package.module:Name or file.py:Name"
    return dataclasses.field(default=default, metadata={"help": text, "names": choices})


def _options(part: str) -> Any:
    return dataclasses.field(default=None, metadata={"help": f"arguments of the {part}"})


class Options(dict[str, Any]):
    """Keyword arguments of a part, ready for JSON; hashable, because a recipe is."""

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(json.dumps(self, sort_keys=True))


def parse_value(text: str) -> Any:
    """Reads the value of an option: JSON, or else the text itself.

    Example:
      >>> parse_value("0.5"), parse_value("[1, 2]"), parse_value("relu")
      (0.5, [1, 2], 'relu')
    """
    try:
        return json.loads(text)
    except ValueError:
        return text


def short_name(part: str) -> str:
    """Returns the name of a part without its module or file.

    Example:
      >>> short_name("package.nets:Net"), short_name("adam")
      ('Net', 'adam')
    """
    return part.rpartition(":")[2]


def _set_parts(recipe: "Recipe") -> None:
    """Makes the paths of files absolute and the options hashable."""
    for part in PARTS:
        name, options = getattr(recipe, part), getattr(recipe, f"{part}_options")
        place, _, attribute = str(name).rpartition(":")
        if place.endswith(".py"):
            object.__setattr__(recipe, part, f"{local_path(place).absolute()}:{attribute}")
        try:
            if options is not None:
                options = Options(json.loads(json.dumps(dict(options), allow_nan=False))) or None
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"{part}_options is {options!r}; expected names with numbers, texts, booleans or "
                "lists of them"
            ) from error
        object.__setattr__(recipe, f"{part}_options", options)


def _check_fields(settings: Any) -> None:
    """Checks each field with a range or choices; None stands where its type allows it."""
    for field in dataclasses.fields(settings):
        value, expected = getattr(settings, field.name), field.metadata.get("range")
        choices = get_args(field.type) if get_origin(field.type) is Literal else ()
        names = field.metadata.get("names", ())
        if (choices and value not in choices) or (
            names and value not in names and not re.fullmatch(".+:.+", str(value))
        ):
            path = ", or an import path such as package.module:Name" if names else ""
            known = ", ".join(choices or names)
            raise ConfigError(f"{field.name} is {value!r}; choose one of {known}{path}")
        if expected is None or (value is None and type(None) in get_args(field.type)):
            continue
        is_number = isinstance(value, expected.kind) and not isinstance(value, bool)
        if not (is_number and expected.is_inside(value)):
            raise ConfigError(f"{field.name} is {value!r}; expected {expected.text}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one network is trained.

    `arch`, `optimizer`, `loss`, `augmentation` and `schedule` are names of the package, or import
    paths: "package.module:Name", or "nets.py:Name" for a file. "Your own parts" in the
    documentation says what each must be.

    Attributes:
      arch: the network, a key of `fmnist_jax.ARCHS` or an import path.
      arch_options: arguments of the network; likewise of the other parts. Numbers, texts, booleans
        and lists; None is none.
      epochs: passes over the training split, at least 1.
      batch_size: examples per step, at least 1.
      microbatch_size: examples that go through the network at once; with batch normalization, which
        uses the statistics of each microbatch, it changes the training. None chooses by device.
      shards: equal parts of a batch that devices can share (`Run.devices`), a power of two that
        divides the batch size. Each has its own dropout key and batch normalization. The number of
        shards determines the bits of the training, the number of devices does not.
      optimizer: "adam", "rmsprop" or "sgd" (momentum 0.9), in Keras' formulas, or "muon".
      optimizer_options: see `arch_options`.
      learning_rate: peak of the schedule, above 0; None for an optimizer with its own.
      schedule: "constant", "cosine", "one_cycle" or "linear" (to zero), over the whole run.
      schedule_options: see `arch_options`.
      loss: "cross_entropy" or an import path.
      loss_options: see `arch_options`.
      weight_decay: decoupled, on kernels only, at least 0; None is none.
      dropout: one rate in [0, 1) for all dropout layers; None keeps the rate of each layer.
      label_smoothing: fraction of the target spread over all classes, in [0, 1); None is none.
      class_weights: "none", or "balanced", which multiplies the training loss of an image by n /
        (num_classes * n_class), counted on the training images and the validation images that the
        run draws from them; their mean weight is 1. The accuracy, and the loss of validation and
        test images, have no weights.
      augmentation: "none", "keras" (as Keras' `ImageDataGenerator`), "geometric", "shift" (by at
        most one pixel, and mirrored in every second epoch), or "shift_erase" (a random rectangle as
        well).
      augmentation_options: see `arch_options`; for a name, its attributes that differ.
      augmentation_strength: scales every range of the augmentation, at least 0; None is 1.
      dtype: "float32", or "bfloat16" for accelerators; the network computes in it during training.
        Parameters and evaluation are float32.
      matmul_precision: "float32", or "bfloat16", which rounds the factors of products in training;
        parameters, sums and statistics stay float32. See "Products in bfloat16" in the
        documentation.
      image_size: side to which images are resized, in pixels; None keeps their own.
      val_fraction: fraction of the training images held out for validation, in [0, 1).
      patience: training ends after this many epochs without a better validation accuracy; None
        trains all epochs.

    Raises:
      ConfigError: if a value is outside its range.

    Example:
      >>> recipe = Recipe(arch="same_3x3", epochs=10)
      >>> dataclasses.replace(recipe, epochs=0)
      Traceback (most recent call last):
      ...
      fmnist_jax.errors.ConfigError: epochs is 0; expected an integer of at least 1
    """

    arch: str
    arch_options: Mapping[str, Any] | None = _options("network")
    epochs: int = _flag("passes over the training images", expected=_COUNT)
    batch_size: int = _flag("examples per step", 128, _COUNT)
    microbatch_size: int | None = _flag(
        "examples that go through the network at once", None, _COUNT
    )
    shards: int = _flag("parts of a batch that devices can share, a power of two", 1)
    optimizer: str = _part("optimizer", "adam", OptimizerName)
    optimizer_options: Mapping[str, Any] | None = _options("optimizer")
    learning_rate: float | None = _flag("peak of the schedule", 1e-3, _RATE)
    schedule: str = _part("learning rate over the whole run", "constant", ScheduleName)
    schedule_options: Mapping[str, Any] | None = _options("schedule")
    loss: str = _part("loss of an example", "cross_entropy", LossName)
    loss_options: Mapping[str, Any] | None = _options("loss")
    weight_decay: float | None = _flag("decoupled weight decay of the kernels", None, _SCALE)
    dropout: float | None = _flag("one rate for all dropout layers, in [0, 1)", None, _FRACTION)
    label_smoothing: float | None = _flag(
        "fraction of the target spread over all classes", None, _FRACTION
    )
    class_weights: ClassWeightsName = _flag("weights of the classes in the training loss", "none")
    augmentation: str = _part("augmentation of training images", "none", AugmentationName)
    augmentation_options: Mapping[str, Any] | None = _options("augmentation")
    augmentation_strength: float | None = _flag(
        "scales the ranges of the augmentation", None, _SCALE
    )
    dtype: DtypeName = _flag("dtype of the network in training", "float32")
    matmul_precision: DtypeName = _flag("precision of products in training", "float32")
    image_size: int | None = _flag("side to which images are resized, in pixels", None, _COUNT)
    val_fraction: float = _flag("fraction held out for validation, in [0, 1)", 0.1, _FRACTION)
    patience: int | None = _flag(
        "end after so many epochs without a better validation accuracy", None, _COUNT
    )

    def __post_init__(self) -> None:
        _set_parts(self)
        _check_fields(self)
        check_shards(self.shards, self.batch_size)
        size, shard_size = self.microbatch_size, self.batch_size // self.shards
        if size is not None and size < shard_size and shard_size % size:
            whole = "batch_size is" if self.shards == 1 else "the size of a shard is"
            raise ConfigError(
                f"microbatch_size is {size}, but {whole} {shard_size}; expected a divisor of it"
            )
        if self.augmentation_strength is not None and self.augmentation == "none":
            raise ConfigError(
                f"augmentation_strength is {self.augmentation_strength}, but augmentation is "
                "'none'; choose an augmentation or leave the strength out"
            )
        if self.patience is not None and self.val_fraction == 0:
            raise ConfigError(
                f"patience is {self.patience}, but val_fraction is 0; it needs validation images"
            )


class Interval(NamedTuple):
    """A number of steps ("st"), epochs ("ep") or seconds ("s").

    Example:
      >>> Interval.parse("checkpoint_every", "500st")
      Interval(number=500, unit='st')
    """

    number: int
    unit: str

    @classmethod
    def parse(cls, name: str, text: str, units: Sequence[str] = ("st", "ep", "s")) -> Self:
        """Parses a number and its unit.

        Args:
          name: the setting, for the error message.
          text: such as "500st".
          units: units that are allowed.

        Raises:
          ConfigError: if the text has another form.
        """
        match = re.fullmatch(rf"([1-9][0-9]*)({'|'.join(units)})", str(text))
        if match is None:
            counts = {"st": 500, "ep": 1, "s": 60}
            examples = " or ".join(f"{counts[unit]}{unit}" for unit in units)
            raise ConfigError(
                f"{name} is {text!r}; expected a number of at least 1 with a unit, such as "
                f"{examples} (st: steps, ep: epochs, s: seconds)"
            )
        return cls(int(match[1]), match[2])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One training run: a recipe, a seed and a folder.

    Attributes:
      recipe: how to train.
      workdir: folder of the run's files on this machine, where `~` is the home folder; created
        if missing.
      seed: root of every random stream, in [0, 2**32).
      exclude: training images left out of training and validation, by their positions in the
        published file. Compare validation accuracies only between runs with the same exclusions.
      train_examples: number of examples of the training split to train on, stratified by class;
        None is all.
      checkpoint_every: "1ep" saves at the end of every epoch, "5ep" of every fifth; "500st" and
        "60s" save at the end of every epoch and every 500 steps or 60 seconds. The last state is
        always saved.
      keep_every: "5000st" or "10ep" also retains the checkpoints at multiples of it. The latest two
        and the one with the best validation accuracy are always retained.
      tta: whether test-time augmentation is evaluated as well; None does so where the augmentation
        of the recipe mirrors images.
      devices: how many devices share the shards of each batch, or "all"; their number must divide
        `recipe.shards`. None is one device, or all if there are several processes.
      log_grad_norms: whether metrics.jsonl has the mean norms of gradient, parameters and updates.
      parts: name and object of parts that the recipe names; set by the functions that take them.

    Raises:
      ConfigError: if a value is outside its range.
    """

    recipe: Recipe
    workdir: Path
    seed: int = _flag("root of all randomness", 0, _SEED)
    exclude: Sequence[int] = ()
    train_examples: int | None = _flag("number of training examples; default: all", None, _COUNT)
    checkpoint_every: str = _flag("interval of checkpoints, such as 500st, 1ep or 60s", "1ep")
    keep_every: str | None = _flag("retain checkpoints at multiples of it, such as 10ep", None)
    tta: bool | None = _flag(
        "evaluate test-time augmentation; default: where the augmentation mirrors", None
    )
    devices: str | int | None = _flag("devices that share the shards of each batch, or all", None)
    log_grad_norms: bool = _flag("log the norms of gradient, parameters and updates", False)
    parts: Mapping[str, Any] = dataclasses.field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "workdir", local_path(self.workdir))
        object.__setattr__(self, "exclude", _positions(self.exclude))
        _check_fields(self)
        Interval.parse("checkpoint_every", self.checkpoint_every)
        if self.keep_every is not None:
            Interval.parse("keep_every", self.keep_every, ("st", "ep"))
        if self.devices not in (None, "all"):
            devices = str(self.devices)
            if not (devices.isdecimal() and int(devices) >= 1):
                raise ConfigError(
                    f"devices is {self.devices!r}; expected an integer of at least 1, or all"
                )
            object.__setattr__(self, "devices", int(devices))


def to_dict(run: Run) -> dict[str, Any]:
    """Returns the settings that determine a run's training, ready for JSON.

    Example:
      >>> to_dict(Run(recipe=Recipe(arch="same_3x3", epochs=10), workdir=Path("w")))["seed"]
      0
    """
    names = [field.name for field in dataclasses.fields(run) if field.name not in _NO_EFFECT]
    settings: dict[str, Any] = {name: getattr(run, name) for name in names}
    # Settings of this version at their defaults are left out, so that earlier runs can resume.
    settings["recipe"] = {
        name: value
        for name, value in dataclasses.asdict(run.recipe).items()
        if not (name in ADDED and value == ADDED[name])
    }
    if not run.log_grad_norms:
        del settings["log_grad_norms"]
    settings["stream_seeds"] = {}  # version 0.2 could set them
    return settings


def from_dict(settings: Mapping[str, Any], workdir: Path) -> Run:
    """Returns the run with the settings that `to_dict` returned; other keys are ignored.

    Raises:
      ConfigError: if a value is outside its range, or these are not the settings of a run.

    Example:
      >>> run = Run(recipe=Recipe(arch="same_3x3", epochs=10), workdir=Path("w"), seed=5)
      >>> from_dict(to_dict(run), Path("w")) == run
      True
    """
    names = {field.name for field in dataclasses.fields(Run)} - {"parts"}
    given = {name: value for name, value in settings.items() if name in names}
    try:
        return Run(**given | {"recipe": Recipe(**settings["recipe"])}, workdir=workdir)
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{workdir} has settings of another version: {error}") from error


def check_shards(shards: int, batch_size: int) -> None:
    """Checks that a batch can be cut into this many shards.

    Raises:
      ConfigError: if not; the message lists the numbers that can be chosen.
    """
    # & -size is the largest power of two that divides the size.
    choices = [2**power for power in range((batch_size & -batch_size).bit_length())]
    if type(shards) is not int or shards not in choices:
        raise ConfigError(
            f"shards is {shards!r}, but batch_size is {batch_size}; choose one of "
            f"{', '.join(map(str, choices))}"
        )


def _positions(values: Iterable[Any]) -> list[int]:
    """Sorts and deduplicates integers of any type."""
    positions = set()
    for value in values:
        try:
            position = operator.index(value)
        except TypeError:
            position = -1
        if position < 0:
            raise ConfigError(f"exclude has {value!r}; expected integers of at least 0")
        positions.add(position)
    return sorted(positions)
