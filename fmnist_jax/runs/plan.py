"""`Plan`: everything that a run decides before its first step, without compiling anything."""

import dataclasses
import functools
import math
from inspect import signature
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from fmnist_jax.config import Interval, Run, to_dict
from fmnist_jax.data.augment import AUGMENTATIONS, RandomAffine
from fmnist_jax.data.sources import Dataset, stratified_split
from fmnist_jax.errors import ConfigError
from fmnist_jax.nn.models import create_model
from fmnist_jax.rng import Streams, create_streams
from fmnist_jax.train import metrics as metrics_lib
from fmnist_jax.train.loop import (
    Regularization,
    TrainState,
    create_train_state,
    steps_per_epoch,
)
from fmnist_jax.train.optim import Optimizer, create_optimizer
from fmnist_jax.xla.compile import Compiled, compiled


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """What follows from a run's settings and its data.

    Attributes:
      run: the settings.
      dataset: the data.
      streams: the random streams of the run's seed.
      train_examples: int32[m], positions of the training split in `dataset.train_images`.
      val_examples: int32[k], likewise of the validation split; it may be empty.
      model: the network.
      tx: its optimizer.
      augment: the augmentation, or None.
      steps_per_epoch: updates an epoch.
    """

    run: Run
    dataset: Dataset
    streams: Streams
    train_examples: np.ndarray
    val_examples: np.ndarray
    model: Any
    tx: Optimizer
    augment: RandomAffine | None
    steps_per_epoch: int

    @property
    def total_steps(self) -> int:
        """Updates of the whole run."""
        return self.steps_per_epoch * self.run.recipe.epochs

    def create_state(self) -> TrainState:
        """The state before the first step."""
        return self._create_state(self.streams.init)

    @functools.cached_property
    def abstract_state(self) -> TrainState:
        """Shapes and dtypes of the state."""
        return self._create_state.trace(self.streams.init).out_info

    @functools.cached_property
    def _create_state(self) -> Compiled[[jax.Array], TrainState]:
        height, width = self.dataset.train_images.shape[1:]

        # One program in place of some twenty small ones, which take a second to compile. It is this
        # plan's alone, because optimizers that are equal may begin with different states.
        def create_state(key: jax.Array) -> TrainState:
            return create_train_state(key, self.model, self.tx, image_shape=(height, width))

        return compiled(quick=True)(create_state)

    @property
    def checkpoint_shapes(self) -> dict[str, Any]:
        """Shapes and dtypes of what a checkpoint of this run holds."""
        return {"state": self.abstract_state, "metrics": jax.eval_shape(metrics_lib.zeros)}

    @property
    def settings(self) -> dict[str, Any]:
        """What config.json holds: all that decides the run's numbers."""
        return {
            **to_dict(self.run),
            "classes": list(self.dataset.class_names),
            "data_sha256": self.dataset.sha256,
            "sample": self.dataset.sample,
        }

    @functools.cached_property
    def parameters(self) -> list[tuple[str, tuple[int, ...], int]]:
        """Name, shape and number of values of each parameter."""
        leaves = jax.tree.leaves_with_path(self.abstract_state.params)
        return [
            (jax.tree_util.keystr(path, simple=True, separator="/"), leaf.shape, leaf.size)
            for path, leaf in leaves
        ]

    @property
    def keep_every(self) -> int | None:
        """Updates whose multiples keep their checkpoint."""
        if self.run.keep_every is None:
            return None
        number, unit = Interval.parse("keep_every", self.run.keep_every)
        return number * self.steps_per_epoch if unit == "ep" else number

    @property
    def num_params(self) -> int:
        """Number of trained values."""
        return sum(size for _, _, size in self.parameters)

    @property
    def regularization(self) -> Regularization:
        """The recipe's, as arrays: other values are the same program."""
        recipe = self.run.recipe
        strengths = recipe.dropout, recipe.label_smoothing, recipe.augmentation_strength
        return Regularization(
            *(None if value is None else jnp.float32(value) for value in strengths)
        )

    @property
    def step_options(self) -> dict[str, Any]:
        """The keyword arguments with which this run calls `train_steps`."""
        return {
            "batch_size": self.run.recipe.batch_size,
            "model": self.model,
            "tx": self.tx,
            "augment": self.augment,
            "dtype": jnp.dtype(self.run.recipe.dtype),
            "regularization": self.regularization,
        }


def create_plan(run: Run, dataset: Dataset) -> Plan:
    """Splits the data and makes model, optimizer and augmentation.

    Args:
      run: the settings.
      dataset: the data; the model gets one output a class.

    Raises:
      ConfigError: if the settings do not fit each other or the data.
      DataError: if there are too few examples.
    """
    recipe = run.recipe
    options = {} if recipe.image_size is None else {"image_size": recipe.image_size}
    model = create_model(recipe.arch, len(dataset.class_names), **options)
    has_dropout = "dropout" in signature(type(model).__call__).parameters
    if recipe.dropout is not None and not has_dropout:
        raise ConfigError(f"dropout is {recipe.dropout}, but {recipe.arch} has no dropout")
    for stream, used in (("dropout", has_dropout), ("augment", recipe.augmentation != "none")):
        if stream in run.stream_seeds and not used:
            raise ConfigError(
                f"the stream {stream} has a seed of its own, but nothing draws from it"
            )
    streams = create_streams(run.seed, run.stream_seeds)
    train_examples, val_examples = stratified_split(
        streams.split, dataset.train_labels, recipe.val_fraction, run.train_examples, run.exclude
    )
    if recipe.batch_size > len(train_examples):
        raise ConfigError(
            f"batch_size is {recipe.batch_size:,}, but there are only {len(train_examples):,} "
            "training examples; choose a smaller batch"
        )
    num_batches = steps_per_epoch(len(train_examples), recipe.batch_size)
    tx = create_optimizer(
        recipe.optimizer,
        recipe.learning_rate,
        schedule=recipe.schedule,
        total_steps=num_batches * recipe.epochs,
        weight_decay=recipe.weight_decay,
    )
    augment = None
    if recipe.augmentation != "none":
        augment = dataclasses.replace(
            AUGMENTATIONS[recipe.augmentation], image_size=recipe.image_size
        )
        strength = recipe.augmentation_strength or 0
        if strength * augment.zoom >= 1:
            raise ConfigError(
                f"augmentation_strength is {strength}; below {1 / augment.zoom:g} the zoom leaves "
                "something of the image"
            )
    plan = Plan(
        run, dataset, streams, train_examples, val_examples, model, tx, augment, num_batches
    )
    _check_keep_every(plan)
    return plan


def _check_keep_every(plan: Plan) -> None:
    if plan.keep_every is None:
        return
    number, unit = Interval.parse("checkpoint_every", plan.run.checkpoint_every)
    # Of "st" and "s", the ends of epochs are saved as well.
    periods = [plan.steps_per_epoch * (number if unit == "ep" else 1)]
    if unit == "st":
        periods.append(number)
    saved = [math.lcm(period, plan.keep_every) <= plan.total_steps for period in periods]
    if not any(saved) and plan.total_steps % plan.keep_every:
        raise ConfigError(
            f"keep_every is {plan.run.keep_every}, but of the checkpoints that are made "
            f"({plan.run.checkpoint_every}, of {plan.total_steps:,} updates in epochs of "
            f"{plan.steps_per_epoch:,}) none falls on a multiple of it"
        )
