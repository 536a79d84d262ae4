"""What a run is made of: `Recipe` says how a network is trained, `Run` says which training it is.

Both are frozen and check themselves when they are made. Standard library only.
"""

import dataclasses
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, get_args

OptimizerName = Literal["adam", "rmsprop", "sgd"]
ScheduleName = Literal["constant", "cosine", "one_cycle"]
DtypeName = Literal["float32", "bfloat16"]
AugmentationName = Literal["none", "keras", "geometric"]


_NOTHING = "nothing"


class ConfigError(ValueError):
    """A setting has a value that cannot work. The message names value, expectation and remedy."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one network is trained.

    Attributes:
      arch: name of the network, a key of `fmnist_jax.ARCHS`.
      epochs: passes over the training split, at least 1.
      batch_size: images an update, at least 1.
      optimizer: "adam", "rmsprop" or "sgd" (momentum 0.9), in Keras' formulas.
      learning_rate: the peak of the schedule, greater than 0.
      schedule: "constant", "cosine" or "one_cycle" over the whole run.
      augmentation: "none", "keras" (what `ImageDataGenerator` does) or "geometric".
      dtype: "float32", or "bfloat16" for accelerators; in what the network computes while it is
        trained. Parameters and evaluation are float32.
      image_size: side to which images are resized, in pixels; None keeps their own.
      val_fraction: share of the training images held out for validation, in [0, 1).
      source: the Keras project that the recipe stands for.
      claim: what that project says it reached.
      open_choices: what the project left open and this recipe decided.

    Raises:
      ConfigError: if a value is outside its range.

    Example:
      >>> recipe = Recipe(arch="same_3x3", epochs=10)
      >>> dataclasses.replace(recipe, epochs=0)
      Traceback (most recent call last):
      ...
      fmnist_jax.config.ConfigError: epochs is 0; it must be a whole number of at least 1
    """

    arch: str
    epochs: int
    batch_size: int = 128
    optimizer: OptimizerName = "adam"
    learning_rate: float = 1e-3
    schedule: ScheduleName = "constant"
    augmentation: AugmentationName = "none"
    dtype: DtypeName = "float32"
    image_size: int | None = None
    val_fraction: float = 0.1
    source: str = ""
    claim: str = ""
    open_choices: str = ""

    def __post_init__(self) -> None:
        _check_count("epochs", self.epochs)
        _check_count("batch_size", self.batch_size)
        if self.image_size is not None:
            _check_count("image_size", self.image_size)
        _check_choice("optimizer", self.optimizer, OptimizerName)
        _check_choice("schedule", self.schedule, ScheduleName)
        _check_choice("dtype", self.dtype, DtypeName)
        _check_choice("augmentation", self.augmentation, AugmentationName)
        _check_number("learning_rate", self.learning_rate)
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ConfigError(
                f"learning_rate is {self.learning_rate}; it must be a finite number above 0"
            )
        _check_number("val_fraction", self.val_fraction)
        if not 0 <= self.val_fraction < 1:
            raise ConfigError(
                f"val_fraction is {self.val_fraction}; it must be at least 0 and below 1"
            )


class Interval(NamedTuple):
    """A number of updates ("st"), epochs ("ep") or seconds ("s").

    Example:
      >>> Interval.parse("checkpoint_every", "500st")
      Interval(number=500, unit='st')
    """

    number: int
    unit: str

    @classmethod
    def parse(cls, name: str, text: str, units: Sequence[str] = ("st", "ep", "s")) -> Self:
        """Reads a number and its unit.

        Raises:
          ConfigError: if it is another text; `name` is the setting that it calls wrong.
        """
        match = re.fullmatch(rf"([1-9][0-9]*)({'|'.join(units)})", text)
        if match is None:
            counts = {"st": 500, "ep": 1, "s": 60}
            examples = " or ".join(f"{counts[unit]}{unit}" for unit in units)
            raise ConfigError(
                f"{name} is {text!r}; it must be a number of at least 1 and a unit, such as "
                f"{examples} (st updates, ep epochs, s seconds)"
            )
        return cls(int(match[1]), match[2])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """One training: a recipe, a seed and a place for its files.

    Attributes:
      recipe: how to train.
      workdir: folder of the run's files; it is made where it does not exist.
      seed: root of every random stream, in [0, 2**32).
      train_examples: train on so many examples of the training split, equally from each class as
        far as possible; None takes all.
      checkpoint_every: "1ep", at the end of each epoch; "5ep", of each fifth one; "500st" and
        "60s", at the end of each epoch, every 500 updates or 60 seconds as well. The last state is
        always saved.
      keep_every: "5000st" or "10ep": checkpoints at multiples of it are kept, besides the latest
        two and the one with the best validation accuracy, which are always kept.

    Raises:
      ConfigError: if a value is outside its range.
    """

    recipe: Recipe
    workdir: Path
    seed: int = 0
    train_examples: int | None = None
    checkpoint_every: str = "1ep"
    keep_every: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "workdir", Path(self.workdir))
        # jax.random.key drops the bits above 32 without a word, so two seeds would be one.
        if isinstance(self.seed, bool) or not (
            isinstance(self.seed, int) and 0 <= self.seed < 2**32
        ):
            raise ConfigError(
                f"seed is {self.seed!r}; it must be a whole number from 0 to 2**32 - 1"
            )
        if self.train_examples is not None:
            _check_count("train_examples", self.train_examples)
        Interval.parse("checkpoint_every", self.checkpoint_every)
        if self.keep_every is not None:
            Interval.parse("keep_every", self.keep_every, ("st", "ep"))


def to_dict(run: Run) -> dict[str, Any]:
    """The settings that decide a run's numbers, ready for JSON; neither its folder nor its texts.

    Example:
      >>> to_dict(Run(recipe=Recipe(arch="same_3x3", epochs=10), workdir=Path("w")))["seed"]
      0
    """
    settings = dataclasses.asdict(run)
    for name in ("workdir", "checkpoint_every", "keep_every"):
        del settings[name]
    for text in ("source", "claim", "open_choices"):
        del settings["recipe"][text]
    return settings


def differences(found: Any, wanted: Any, name: str = "") -> list[str]:
    """What differs between two sets of settings, a line each.

    Example:
      >>> differences({"seed": 0, "recipe": {"epochs": 3}}, {"seed": 0, "recipe": {"epochs": 5}})
      ['recipe.epochs: 3 there, 5 asked for']
    """
    if isinstance(found, dict) and isinstance(wanted, dict):
        return [
            line
            for key in {**found, **wanted}
            for line in differences(
                found.get(key, _NOTHING), wanted.get(key, _NOTHING), f"{name}.{key}".lstrip(".")
            )
        ]
    return [] if found == wanted else [f"{name}: {found} there, {wanted} asked for"]


def _check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not (isinstance(value, int) and value >= 1):
        raise ConfigError(f"{name} is {value!r}; it must be a whole number of at least 1")


def _check_number(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{name} is {value!r}; it must be a number")


def _check_choice(name: str, value: str, choices: Any) -> None:
    if value not in get_args(choices):
        raise ConfigError(f"{name} is {value!r}; choose one of {', '.join(get_args(choices))}")
