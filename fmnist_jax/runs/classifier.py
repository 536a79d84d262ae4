"""`Classifier`: the trained network of a run, for arrays and files of pictures."""

import dataclasses
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax.errors import ScopeParamShapeError

from fmnist_jax.config import Recipe, Run, from_dict, short_name
from fmnist_jax.data.batches import checked_images, input_shape
from fmnist_jax.data.pictures import SIZE, Picture, read_pictures
from fmnist_jax.data.sources import is_fashion_mnist
from fmnist_jax.digest import params_sha256
from fmnist_jax.errors import CheckpointError, ConfigError, DataError, EnvironmentWarning
from fmnist_jax.nn.adapters import init_variables
from fmnist_jax.parts.imports import Origin
from fmnist_jax.parts.objects import create_part, find_sources, with_objects
from fmnist_jax.runs import files
from fmnist_jax.runs.checkpoint import Checkpoint, load_checkpoint, named_leaves
from fmnist_jax.train.predict import predict

_FEW = 32


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Classifier:
    """A trained network with the names of its classes.

    Attributes:
      model: the network, as in `StepConfig`.
      variables: its variables, as `model.apply` takes them.
      class_names: the names of the classes in the order of the logits.
      temperature: divides the logits before the softmax. It was fitted on the validation images; 1
        if the run has none for this checkpoint.
      recipe: the recipe of the run.
      step: number of steps of the training.
      image_shape: height and width of the training images, and 3 if in colour; None if version
        0.2, which did not record them, trained the network.
      prepares_articles: whether the training images are those of Fashion-MNIST, so that
        `classify_files` prepares pictures like its authors.

    Example:
      >>> import tempfile, fmnist_jax as fm
      >>> data = fm.load_fashion_mnist(sample=True)
      >>> recipe = fm.Recipe(arch="valid_2x2", epochs=1)
      >>> run = fm.Run(recipe=recipe, workdir=Path(tempfile.mkdtemp()), train_examples=200)
      >>> _ = fm.fit(run, data, hooks=())
      >>> classifier = load_classifier(run.workdir)
      >>> classifier
      Classifier(valid_2x2, 10 classes, step 2)
      >>> classifier.probabilities(data.test_images[:3]).shape
      (3, 10)
      >>> classifier.class_names[classifier.predict(data.test_images[:1])[0]] in data.class_names
      True
    """

    model: Any
    variables: Any
    class_names: tuple[str, ...]
    temperature: float
    recipe: Recipe
    step: int
    image_shape: tuple[int, ...] | None
    prepares_articles: bool = True

    def __repr__(self) -> str:
        arch, num_classes = short_name(self.recipe.arch), len(self.class_names)
        return f"Classifier({arch}, {num_classes} classes, step {self.step:,})"

    def logits(self, images: Any) -> np.ndarray:
        """Computes the logits.

        Args:
          images: uint8[n, height, width], or [n, height, width, channels] with 1 or 3 channels,
            like the training images.

        Returns:
          float32[n, num_classes].

        Raises:
          TypeError: if the images are not uint8.
          ValueError: if their shape is another, or not that of the training images.
        """
        images = checked_images(images)
        trained_on = " x ".join(map(str, self.image_shape or ())) or "another size"
        arch = short_name(self.recipe.arch)
        refusal = ValueError(
            f"images have shape {images.shape}, but {arch} was trained on images of {trained_on}"
        )
        if self.image_shape not in (None, images.shape[1:]):
            raise refusal
        # Few images are not padded to the size at which many are fastest. Powers of two, so that
        # six programs serve all.
        size = 1 << max(len(images) - 1, 0).bit_length()
        batch_size = size if size <= _FEW else None
        try:
            logits = predict(self.variables, images, model=self.model, batch_size=batch_size)
            return np.asarray(logits)
        except ScopeParamShapeError as error:
            raise refusal from error

    def probabilities(self, images: Any) -> np.ndarray:
        """Computes the probabilities of the classes, float32[n, num_classes]; as `logits`."""
        return np.asarray(jax.nn.softmax(jnp.asarray(self.logits(images)) / self.temperature))

    def predict(self, images: Any) -> np.ndarray:
        """Returns the position of the most likely class, int32[n]; as `logits`."""
        return self.logits(images).argmax(axis=1).astype(np.int32)


def load_classifier(
    workdir: Path | str, which: int | Literal["latest", "best"] = "latest", *, model: Any = None
) -> Classifier:
    """Loads the network of a run from its folder, which may be unfinished.

    The SHA-256 of the files and of the parameters are verified. A network that is not of this
    package is imported where it was when it was trained; code in the folder is not executed.

    Args:
      workdir: folder of the run.
      which: as for `load_checkpoint`: a step, the latest, or the one with the best validation
        accuracy.
      model: the network, or its import path, in place of the one that the run names. A class of
        modules receives the options of the run.

    Warns:
      EnvironmentWarning: if the source of the network has changed since it was trained.

    Raises:
      ConfigError: if the network cannot be imported, or the folder holds no run.
      CheckpointError: if the checkpoint is missing, damaged or of another network.
      DamagedFileError: if the report of the run cannot be read.
    """
    workdir = Path(workdir)
    if not (workdir / files.CHECKPOINTS).exists():
        name = files.CHECKPOINTS
        found = [*workdir.glob(f"*/{name}"), *workdir.glob(f"*/*/{name}")]
        runs = sorted(path.parent.relative_to(workdir).as_posix() for path in found)
        hint = f"; it holds the runs {', '.join(runs)}" if runs else ""
        raise ConfigError(f"{workdir} is not the folder of a run: it has no {name}{hint}")
    checkpoint = load_checkpoint(workdir, which)
    run = from_dict(checkpoint.settings, workdir)
    recipe, class_names = run.recipe, tuple(checkpoint.settings["classes"])
    model = _model(checkpoint, workdir, run, len(class_names), model)
    variables = _variables(checkpoint, model, short_name(recipe.arch))
    temperature = 1.0
    report = files.read_json(workdir / files.REPORT)
    if report is not None and report["steps"] == checkpoint.step:
        if report["params_sha256"] != params_sha256(variables["params"]):
            raise CheckpointError(
                f"the parameters of step {checkpoint.step} in {workdir} have another SHA-256 than "
                f"{files.REPORT} says; one of the two files was replaced"
            )
        temperature = report["calibration"]["temperature"] or 1.0
    shape = checkpoint.meta.get("image_shape")
    return Classifier(
        model, variables, class_names, temperature, recipe, checkpoint.step,
        shape and tuple(shape),
        shape is None or is_fashion_mnist(checkpoint.settings["data_sha256"]),
    )  # fmt: skip


def _model(checkpoint: Checkpoint, workdir: Path, run: Run, num_classes: int, model: Any) -> Any:
    """Creates the network of a checkpoint; warns if its source has changed."""
    recorded = checkpoint.settings.get("sources", {})
    origin: Origin | None = Origin(workdir, recorded)
    if model is not None:
        run, origin = with_objects(run, num_classes, model=model), None
    created = create_part("arch", run, num_classes, origin)
    before, now = recorded.get("arch"), find_sources(run, ("arch",), origin).get("arch")
    if before is not None and now is not None and before["sha256"] != now["sha256"]:
        warnings.warn(
            f"the source of {short_name(run.recipe.arch)} has changed since {workdir} was trained",
            EnvironmentWarning,
            stacklevel=3,
        )
    return created


def _variables(checkpoint: Checkpoint, model: Any, name: str) -> dict[str, Any]:
    """Returns the model's variables, which a checkpoint holds by name."""
    # Version 0.2 did not record the size; names do not depend on it.
    image_shape = checkpoint.meta.get("image_shape") or (SIZE, SIZE)
    images = jnp.zeros((1, *input_shape(image_shape)), jnp.float32)
    like = jax.eval_shape(lambda: init_variables(jax.random.key(0), images, model=model))
    leaves = []
    for leaf_name, leaf in named_leaves(like).items():
        kind, _, rest = leaf_name.partition(".")
        place = f"state.params.{rest}" if kind == "params" else f"state.model_state.{leaf_name}"
        array = checkpoint.arrays.get(place)
        is_same = array is not None and (
            "image_shape" not in checkpoint.meta or array.shape == leaf.shape
        )
        if not is_same:
            found = "no" if array is None else f"{list(array.shape)} as"
            raise CheckpointError(
                f"the checkpoint of step {checkpoint.step} has {found} {leaf_name}, and {name} has "
                f"{list(leaf.shape)}; pass the network that was trained"
            )
        leaves.append(jnp.asarray(array))
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def classify_files(
    classifier: Classifier,
    paths: Sequence[Path],
    batch_size: int = 256,
    on_file: Callable[[], None] = lambda: None,
) -> Iterator[tuple[Picture | Path, np.ndarray | DataError]]:
    """Classifies the pictures in files, in order, batch by batch.

    Pictures are converted to the size and the channels of the training images. For a network that
    was trained on Fashion-MNIST, they are prepared like its images, and the probabilities are the
    mean over the picture and its mirror image, because the shoes of Fashion-MNIST point to the
    left. Images of 28 x 28 in IDX files are not mirrored.

    Args:
      classifier: the network.
      paths: files, as `read_pictures` reads them.
      batch_size: pictures in memory at once.
      on_file: called after each file.

    Yields:
      A picture and its probabilities, float[num_classes]; or the path of a file that cannot be read
      and its error.
    """
    image_shape = classifier.image_shape or (SIZE, SIZE)
    stream = _read(paths, on_file, None if classifier.prepares_articles else image_shape)
    while batch := list(itertools.islice(stream, batch_size)):
        pictures = [item for item, error in batch if error is None]
        # Batches of one size, so that one program serves all.
        size = batch_size if len(paths) > batch_size else len(pictures)
        images = np.zeros((size, *image_shape), np.uint8)
        for number, picture in enumerate(pictures):
            images[number] = picture.image
        probabilities = iter(_mean_probabilities(classifier, images, pictures))
        for item, error in batch:
            yield item, next(probabilities) if error is None else error


def _mean_probabilities(
    classifier: Classifier, images: np.ndarray, pictures: Sequence[Picture]
) -> np.ndarray:
    if not pictures:
        return np.zeros((0, len(classifier.class_names)), np.float32)
    plain = classifier.probabilities(images)[: len(pictures)]
    is_original = np.array([picture.is_original for picture in pictures])
    if is_original.all() or not classifier.prepares_articles:
        return plain
    mirrored = classifier.probabilities(images[:, :, ::-1])[: len(pictures)]
    return np.where(is_original[:, None], plain, (plain + mirrored) / 2)


def _read(
    paths: Sequence[Path], on_file: Callable[[], None], image_shape: tuple[int, ...] | None
) -> Iterator[tuple[Any, DataError | None]]:
    for path in paths:
        try:
            for picture in read_pictures(path, image_shape):
                yield (path, picture) if isinstance(picture, DataError) else (picture, None)
        except DataError as error:
            yield path, error
        on_file()
