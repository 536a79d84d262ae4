"""What a run is made of: `Recipe` says how a network is trained, `Run` says which training it is.

Both are frozen and check themselves when they are made. Standard library only.
"""

import dataclasses
import math
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self, get_args

from fmnist_jax.errors import ConfigError

OptimizerName = Literal["adam", "rmsprop", "sgd"]
ScheduleName = Literal["constant", "cosine", "one_cycle"]
DtypeName = Literal["float32", "bfloat16"]
AugmentationName = Literal["none", "keras", "geometric"]
StreamName = Literal["init", "split", "shuffle", "augment", "dropout"]


_NOTHING = "nothing"

# What a recipe says and does not do.
_TEXTS = ("source", "claim", "claimed_test_accuracy", "not_comparable", "open_choices")


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
      weight_decay: decoupled, of the kernels, at least 0; None is none.
      dropout: one rate in [0, 1) for every dropout of the network; None leaves each its own.
      label_smoothing: share of the target spread over all classes, in [0, 1); None is none.
      augmentation: "none", "keras" (what `ImageDataGenerator` does) or "geometric".
      augmentation_strength: share of every range of the augmentation, at least 0; None is 1.
      dtype: "float32", or "bfloat16" for accelerators; in what the network computes while it is
        trained. Parameters and evaluation are float32.
      image_size: side to which images are resized, in pixels; None keeps their own.
      val_fraction: share of the training images held out for validation, in [0, 1).
      source: the Keras project that the recipe stands for.
      claim: what that project says it reached.
      claimed_test_accuracy: the accuracy on test images in it, a fraction; None if there is none.
      not_comparable: why its numbers cannot be compared with this recipe's; empty if they can.
      open_choices: what the project left open and this recipe decided.

    Raises:
      ConfigError: if a value is outside its range.

    Example:
      >>> recipe = Recipe(arch="same_3x3", epochs=10)
      >>> dataclasses.replace(recipe, epochs=0)
      Traceback (most recent call last):
      ...
      fmnist_jax.errors.ConfigError: epochs is 0; it must be a whole number of at least 1
    """

    arch: str
    epochs: int
    batch_size: int = 128
    optimizer: OptimizerName = "adam"
    learning_rate: float = 1e-3
    schedule: ScheduleName = "constant"
    weight_decay: float | None = None
    dropout: float | None = None
    label_smoothing: float | None = None
    augmentation: AugmentationName = "none"
    augmentation_strength: float | None = None
    dtype: DtypeName = "float32"
    image_size: int | None = None
    val_fraction: float = 0.1
    source: str = ""
    claim: str = ""
    claimed_test_accuracy: float | None = None
    not_comparable: str = ""
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
        _check_share("val_fraction", self.val_fraction)
        for name in ("dropout", "label_smoothing"):
            if getattr(self, name) is not None:
                _check_share(name, getattr(self, name))
        for name in ("weight_decay", "augmentation_strength"):
            value = getattr(self, name)
            if value is not None:
                _check_number(name, value)
                if not (math.isfinite(value) and value >= 0):
                    raise ConfigError(f"{name} is {value}; it must be a finite number from 0 on")
        if self.augmentation_strength is not None and self.augmentation == "none":
            raise ConfigError(
                f"augmentation_strength is {self.augmentation_strength}, but there is no "
                "augmentation; choose one, or leave the strength out"
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
      stream_seeds: other seeds for some of the streams, as in {"init": 3}.
      exclude: training images that are left out of training and validation, by their positions in
        the published file. A validation accuracy without them is not that of other runs.
      train_examples: train on so many examples of the training split, its classes in proportion;
        None takes all.
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
    stream_seeds: Mapping[str, int] = dataclasses.field(default_factory=dict)
    exclude: Sequence[int] = ()
    train_examples: int | None = None
    checkpoint_every: str = "1ep"
    keep_every: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "workdir", Path(self.workdir))
        object.__setattr__(self, "stream_seeds", dict(self.stream_seeds))
        object.__setattr__(self, "exclude", _positions(self.exclude))
        _check_seed("seed", self.seed)
        for name, seed in self.stream_seeds.items():
            _check_choice("a stream", name, StreamName)
            _check_seed(f"the seed of {name}", seed)
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
    for text in _TEXTS:
        del settings["recipe"][text]
    return settings


def from_dict(settings: Mapping[str, Any], workdir: Path) -> Run:
    """The run with these settings, as `to_dict` wrote them; others are passed over.

    Raises:
      ConfigError: if a value is outside its range, or these are not the settings of a run.

    Example:
      >>> run = Run(recipe=Recipe(arch="same_3x3", epochs=10), workdir=Path("w"), seed=5)
      >>> from_dict(to_dict(run), Path("w")) == run
      True
    """
    names = {field.name for field in dataclasses.fields(Run)}
    given = {name: value for name, value in settings.items() if name in names}
    try:
        return Run(**given | {"recipe": Recipe(**settings["recipe"])}, workdir=workdir)
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{workdir} has no settings that this version knows: {error}") from error


def differences(
    found: Any, wanted: Any, places: tuple[str, str] = ("there", "asked for"), name: str = ""
) -> list[str]:
    """What differs between two sets of settings, a line each; `places` says where each is.

    Example:
      >>> differences({"seed": 0, "recipe": {"epochs": 3}}, {"seed": 0, "recipe": {"epochs": 5}})
      ['recipe.epochs: 3 there, 5 asked for']
    """
    if isinstance(found, dict) and isinstance(wanted, dict):
        return [
            line
            for key in {**found, **wanted}
            for line in differences(
                found.get(key, _NOTHING),
                wanted.get(key, _NOTHING),
                places,
                f"{name}.{key}".lstrip("."),
            )
        ]
    if found == wanted:
        return []
    return [f"{name}: {_short(found)} {places[0]}, {_short(wanted)} {places[1]}"]


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not (isinstance(value, int) and value >= 1):
        raise ConfigError(f"{name} is {value!r}; it must be a whole number of at least 1")


def _positions(values: Iterable[Any]) -> list[int]:
    """Rising whole numbers, each once, of any integer type."""
    positions = set()
    for value in values:
        try:
            position = operator.index(value)
        except TypeError:
            position = -1
        if position < 0:
            raise ConfigError(f"exclude has {value!r}; it must have whole numbers from 0 on")
        positions.add(position)
    return sorted(positions)


def _check_seed(name: str, value: int) -> None:
    # jax.random.key drops the bits above 32 without a word, so two seeds would be one.
    if isinstance(value, bool) or not (isinstance(value, int) and 0 <= value < 2**32):
        raise ConfigError(f"{name} is {value!r}; it must be a whole number from 0 to 2**32 - 1")


def _check_share(name: str, value: float) -> None:
    _check_number(name, value)
    if not 0 <= value < 1:
        raise ConfigError(f"{name} is {value}; it must be at least 0 and below 1")


def _check_number(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"{name} is {value!r}; it must be a number")


def _check_choice(name: str, value: str, choices: Any) -> None:
    if value not in get_args(choices):
        raise ConfigError(f"{name} is {value!r}; choose one of {', '.join(get_args(choices))}")
