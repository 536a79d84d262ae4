"""`Plan`: everything that a run decides before its first step, without compiling anything."""

import dataclasses
import functools
import math
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np

from fmnist_jax.config import PARTS, Interval, Run, to_dict
from fmnist_jax.data.augment import Augmentation, RandomAffine, RandomShift
from fmnist_jax.data.batches import steps_per_epoch
from fmnist_jax.data.dataset import Dataset
from fmnist_jax.data.sources import is_fashion_mnist
from fmnist_jax.data.split import stratified_split
from fmnist_jax.digest import sha256_array
from fmnist_jax.distributed.mesh import create_mesh
from fmnist_jax.distributed.shards import Shards
from fmnist_jax.errors import ConfigError
from fmnist_jax.nn.summary import summarize
from fmnist_jax.parts.contract import check_contract, check_identity
from fmnist_jax.parts.imports import Origin
from fmnist_jax.parts.objects import Parts, create_part, find_sources, with_objects
from fmnist_jax.rng import Streams, create_streams
from fmnist_jax.runs import environment
from fmnist_jax.train import metrics as metrics_lib
from fmnist_jax.train.layout import Layout
from fmnist_jax.train.loop import TrainInputs, train_steps
from fmnist_jax.train.metrics import Metrics
from fmnist_jax.train.step import (
    Hyperparams,
    Loss,
    StepConfig,
    TrainState,
    WeightedLoss,
    create_train_state,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """What follows from a run's settings and its data.

    Attributes:
      run: the settings.
      dataset: the data.
      streams: the random streams of the run's seed.
      train_examples: int32[m], positions of the training split in `dataset.train_images`.
      val_examples: int32[k], likewise of the validation split; it may be empty.
      config: what is fixed at compile time.
      sources: file and SHA-256 of each part that is not of this package.
    """

    run: Run
    dataset: Dataset
    streams: Streams
    train_examples: np.ndarray
    val_examples: np.ndarray
    config: StepConfig
    sources: dict[str, dict[str, Any]]

    @property
    def model(self) -> Any:
        """The network."""
        return self.config.model

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps in an epoch."""
        return steps_per_epoch(len(self.train_examples), self.config.batch_size)

    @property
    def total_steps(self) -> int:
        """Number of steps of the whole run."""
        return self.steps_per_epoch * self.run.recipe.epochs

    @functools.cached_property
    def hyperparams(self) -> Hyperparams:
        """The recipe's scalars as arrays: other values reuse the compiled program."""
        recipe = self.run.recipe
        values = (
            recipe.weight_decay,
            recipe.dropout,
            recipe.label_smoothing,
            recipe.augmentation_strength,
        )
        rate, *others = (
            None if value is None else jnp.float32(value)
            for value in (recipe.learning_rate, *values)
        )
        total_steps = None if self.config.schedule is None else jnp.int32(self.total_steps)
        return Hyperparams(rate, total_steps, *others)

    @property
    def unweighted_loss(self) -> Loss:
        """The loss of validation images: that of the recipe, without class weights."""
        loss = self.config.loss
        return loss.loss if isinstance(loss, WeightedLoss) else loss

    @property
    def tta(self) -> bool:
        """Whether test-time augmentation is evaluated."""
        if self.run.tta is not None:
            return self.run.tta
        return getattr(self.config.augment, "flip", False)

    @property
    def inputs(self) -> TrainInputs:
        """What the training reads, as NumPy arrays."""
        return TrainInputs(
            self.dataset.train_images,
            self.dataset.train_labels,
            self.streams,
            self.hyperparams,
            self.train_examples,
        )

    def create_state(self) -> TrainState:
        """Returns the state before the first step."""
        return create_train_state(
            self.streams.init, self.config, image_shape=self.dataset.image_shape
        )

    @functools.cached_property
    def abstract_state(self) -> TrainState:
        """Shapes and dtypes of the state."""
        return jax.eval_shape(self.create_state)

    @property
    def abstract_checkpoint(self) -> dict[str, Any]:
        """Shapes and dtypes of the arrays in a checkpoint of this run."""
        return {"state": self.abstract_state, "metrics": self.abstract_metrics}

    @property
    def abstract_metrics(self) -> Metrics:
        """Shapes and dtypes of an epoch's metrics."""
        return jax.eval_shape(lambda: metrics_lib.zeros(self.config.log_norms))

    @property
    def settings(self) -> dict[str, Any]:
        """The content of config.json: everything that determines the run's training."""
        sources = {"sources": self.sources} if self.sources else {}
        is_drawn = self.dataset.val_examples is None
        split = {} if is_drawn else {"val_examples_sha256": sha256_array(self.val_examples)}
        return {
            **to_dict(self.run),
            **sources,
            **split,
            "classes": list(self.dataset.class_names),
            "data_sha256": self.dataset.sha256,
            "sample": self.dataset.sample,
        }

    @functools.cached_property
    def network(self) -> list[dict[str, Any]]:
        """The layers of the network, as `summarize` returns them; empty if it cannot."""
        try:
            return summarize(self.model, self.abstract_state.variables, self.dataset.image_shape)
        except Exception:  # noqa: BLE001 (of any network; a table is not worth a training)
            return []

    @property
    def num_params(self) -> int:
        """Number of parameters."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.abstract_state.params))

    @property
    def keep_every(self) -> int | None:
        """Checkpoints at multiples of this number of steps are retained."""
        if self.run.keep_every is None:
            return None
        number, unit = Interval.parse("keep_every", self.run.keep_every)
        return number * self.steps_per_epoch if unit == "ep" else number


def create_plan(
    run: Run, dataset: Dataset, *, origin: Origin | None = None, **objects: Unpack[Parts]
) -> Plan:
    """Splits the data and creates model, optimizer, loss, augmentation and schedule.

    Args:
      run: the settings.
      dataset: the data; the model has one output per class.
      origin: the folder that names the parts; None if the user does.
      **objects: parts in place of those that the recipe names.

    Raises:
      ConfigError: if the settings do not fit each other or the data.
      DataError: if there are too few examples.
    """
    num_classes = len(dataset.class_names)
    run = with_objects(run, num_classes, **objects)
    recipe = run.recipe
    created = {part: create_part(part, run, num_classes, origin) for part in PARTS}
    check_identity(created["arch"], recipe.arch)
    streams = create_streams(run.seed)
    train_examples, val_examples = _split(run, dataset, streams.split)
    if recipe.batch_size > len(train_examples):
        raise ConfigError(
            f"batch_size is {recipe.batch_size:,}, but there are only {len(train_examples):,} "
            "training examples; choose a smaller batch size"
        )
    loss = created["loss"]
    if recipe.class_weights == "balanced":
        loss = WeightedLoss(loss, _balanced_weights(dataset, train_examples, val_examples))
    config = StepConfig(
        model=created["arch"],
        tx=created["optimizer"],
        batch_size=recipe.batch_size,
        loss=loss,
        augment=_fitted(created["augmentation"], run, dataset),
        schedule=created["schedule"],
        dtype=recipe.dtype,
        matmul_precision=recipe.matmul_precision,
        microbatch_size=recipe.microbatch_size,
        layout=_create_layout(run),
        log_norms=run.log_grad_norms,
    )
    sources = find_sources(run, origin=origin)
    plan = Plan(run, dataset, streams, train_examples, val_examples, config, sources)
    if plan.total_steps >= 2**31:
        raise ConfigError(
            f"epochs is {recipe.epochs:,}, which makes {plan.total_steps:,} steps; expected fewer "
            f"than {2**31:,}, because steps are counted in 32 bits"
        )
    _check_keep_every(plan)
    if recipe.learning_rate is None and config.schedule is not None:
        raise ConfigError(
            f"schedule is {recipe.schedule}, but learning_rate is None; a schedule scales it"
        )
    given = [name for name, value in plan.hyperparams._asdict().items() if value is not None]
    names = tuple((part, getattr(recipe, part)) for part in PARTS)
    check_contract(config, tuple(given), dataset.image_shape, num_classes, names)
    return plan


def _split(run: Run, dataset: Dataset, key: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """Returns the positions of the training and of the validation examples."""
    if dataset.val_examples is None:
        fraction = run.recipe.val_fraction
        return stratified_split(
            key, dataset.train_labels, fraction, run.train_examples, run.exclude
        )
    given = np.setdiff1d(dataset.val_examples, run.exclude).astype(np.int32)
    exclude = sorted({*run.exclude, *given.tolist()})
    train, _ = stratified_split(key, dataset.train_labels, 0.0, run.train_examples, exclude)
    return train, given


def loop_cost(plan: Plan) -> tuple[float, int]:
    """Compiles the training loop for the default device and reads its cost.

    Returns:
      Floating-point operations of a step, and bytes of device memory for state, training images,
      results and temporaries.
    """
    inputs = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, plan.inputs))
    num_steps, metrics = jax.ShapeDtypeStruct((), jnp.int32), plan.abstract_metrics

    def compiled(config: StepConfig) -> Any:
        lowered = train_steps.lower(plan.abstract_state, inputs, num_steps, metrics, config=config)
        return lowered.compile()

    # The compiler counts the body of a loop once, so operations are read without microbatches.
    whole = dataclasses.replace(plan.config, microbatch_size=plan.config.batch_size)
    flops = compiled(whole).cost_analysis().get("flops", 0.0)
    memory = compiled(plan.config).memory_analysis()
    sizes = memory.argument_size_in_bytes + memory.output_size_in_bytes
    return flops, sizes - memory.alias_size_in_bytes + memory.temp_size_in_bytes


def _balanced_weights(
    dataset: Dataset, train_examples: np.ndarray, val_examples: np.ndarray
) -> tuple[float, ...]:
    """Returns a weight per class, whose mean over the images that were split is 1.

    Raises:
      ConfigError: if a class has no training examples.
    """
    names = dataset.class_names
    absent = set(range(len(names))) - set(dataset.train_labels[train_examples].tolist())
    if absent:
        missing = ", ".join(str(names[label]) for label in sorted(absent))
        raise ConfigError(
            f"class_weights is 'balanced', but there are no training examples of {missing}; choose "
            "'none', or leave the class out"
        )
    # With the validation images that a run draws, because the counts without them depend on the
    # seed, and the weights are constants of the compiled program.
    if dataset.val_examples is None:
        train_examples = np.concatenate([train_examples, val_examples])
    counts = np.bincount(dataset.train_labels[train_examples], minlength=len(names))
    return tuple((len(train_examples) / (len(names) * counts)).tolist())


def _create_layout(run: Run) -> Layout:
    """Returns the devices of a run, and how they divide its batches.

    Raises:
      ConfigError: if there are fewer devices, they cannot share the shards equally, or they would
        change the rounding.
    """
    available, num_processes, shards = jax.device_count(), jax.process_count(), run.recipe.shards
    num_devices = run.devices or ("all" if num_processes > 1 else 1)
    num_devices = available if num_devices == "all" else int(num_devices)
    if num_devices > available:
        raise ConfigError(
            f"devices is {num_devices}, but JAX has {available}; choose at most {available}"
        )
    if num_processes > 1 and num_devices < available:
        raise ConfigError(
            f"devices is {num_devices}, but {num_processes} processes have {available}; choose all"
        )
    if shards % num_devices:
        choices = [str(count) for count in range(1, available + 1) if shards % count == 0]
        is_choice = (
            num_devices & (num_devices - 1) == 0 and run.recipe.batch_size % num_devices == 0
        )
        hint = f", or set shards to {num_devices}" if is_choice else ""
        raise ConfigError(
            f"devices is {num_devices}, but shards is {shards}; choose one of "
            f"{', '.join(choices)} devices{hint}"
        )
    if num_devices == 1:
        return Layout() if shards == 1 else Shards(shards)
    threads = environment.num_threads()
    if jax.default_backend() == "cpu" and jax.local_device_count() > threads:
        raise ConfigError(
            f"this process has {jax.local_device_count()} CPU devices, but {threads} threads; "
            "more devices than threads change the rounding. Choose fewer devices, or set NPROC to "
            "the number of threads for every layout"
        )
    return Shards(shards, create_mesh(num_devices))


def _fitted(augment: Augmentation | None, run: Run, dataset: Dataset) -> Augmentation | None:
    """Fills in the image size of the recipe and the mean pixel of the data; checks the strength."""
    recipe = run.recipe
    if isinstance(augment, RandomShift):
        is_known = augment.erase_value is not None or is_fashion_mnist(dataset.sha256)
        if augment.erase and not is_known:
            augment = dataclasses.replace(augment, erase_value=dataset.mean_pixel)
    if not isinstance(augment, RandomAffine):
        return augment  # the network itself resizes the images
    augment = dataclasses.replace(augment, image_size=recipe.image_size)
    strength = recipe.augmentation_strength or 0
    if strength * augment.zoom >= 1:
        raise ConfigError(
            f"augmentation_strength is {strength}; expected less than {1 / augment.zoom:g}, where "
            "the zoom reduces an image to nothing"
        )
    return augment


def _check_keep_every(plan: Plan) -> None:
    if plan.keep_every is None:
        return
    number, unit = Interval.parse("checkpoint_every", plan.run.checkpoint_every)
    # With "st" and "s", the ends of epochs are saved as well.
    periods = [plan.steps_per_epoch * (number if unit == "ep" else 1)]
    if unit == "st":
        periods.append(number)
    retained = [math.lcm(period, plan.keep_every) <= plan.total_steps for period in periods]
    if not any(retained) and plan.total_steps % plan.keep_every:
        raise ConfigError(
            f"keep_every is {plan.run.keep_every}, but none of the checkpoints falls on a multiple "
            f"of it: checkpoint_every is {plan.run.checkpoint_every}, and the run has "
            f"{plan.total_steps:,} steps in epochs of {plan.steps_per_epoch:,}"
        )
