"""Training images whose labels are probably wrong, as training itself shows it.

Two signs: a network that has not seen the image is sure of another class (confident learning,
Northcutt, Jiang and Chuang 2021), and networks that are trained on it get it right and then wrong
again (forgetting events, Toneva et al. 2019). Neither proves anything: look at the pictures.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import softmax
from sklearn.model_selection import StratifiedKFold

from fmnist_jax.data.batches import steps_per_epoch
from fmnist_jax.errors import ConfigError
from fmnist_jax.rng import create_streams
from fmnist_jax.runs.writers import NullProgress
from fmnist_jax.train.loop import train_epoch
from fmnist_jax.train.optim import create_optimizer, create_schedule
from fmnist_jax.train.predict import predict
from fmnist_jax.train.step import Hyperparams, StepConfig, TrainState, create_train_state


class Suspects(NamedTuple):
    """Images whose labels are doubted, the greatest margin first.

    Attributes:
      indices: int[s], positions among all images.
      given: int[s], their labels.
      other: int[s], the classes that they are taken for.
      given_probability: float64[s].
      other_probability: float64[s]; the margin is what it exceeds `given_probability` by.
    """

    indices: np.ndarray
    given: np.ndarray
    other: np.ndarray
    given_probability: np.ndarray
    other_probability: np.ndarray


class CrossValidation(NamedTuple):
    """What networks say of the images that they were not trained on, and how they learned others.

    Attributes:
      logits: float32[n, num_classes], each training image's from the one network without it.
      test_logits: float32[folds, m, num_classes], of the test images from each network.
      forgotten: int[n], forgetting events summed over the networks trained on the image.
      learned: bool[n], whether one of them was right at the end of any epoch.
    """

    logits: np.ndarray
    test_logits: np.ndarray
    forgotten: np.ndarray
    learned: np.ndarray


def find_suspects(logits: np.ndarray, labels: np.ndarray) -> Suspects:
    """Finds labels that confident predictions contradict.

    A class's threshold is the mean probability that its own images give it (Northcutt et al.,
    eq. 2), so a class that is hard to tell asks for less than an easy one. An image is a suspect if
    its label's probability is below the label's threshold while another class reaches its own; of
    several, the most probable one is meant.

    Args:
      logits: float[n, num_classes], each image's from a network that was not trained on it.
      labels: int[n], values in [0, num_classes).

    Raises:
      ValueError: if shapes do not fit together.

    Example:
      >>> logits = np.array([[2.0, 0], [3, 0], [0, 3], [0, 2], [0, 4]])
      >>> find_suspects(logits, np.array([0, 0, 1, 1, 0])).indices.tolist()
      [4]
    """
    if logits.ndim != 2 or labels.shape != logits.shape[:1] or len(labels) == 0:
        raise ValueError(
            f"logits of shape {logits.shape} and labels of shape {labels.shape}; they must be "
            "[n, num_classes] and [n], with at least one image"
        )
    probabilities = softmax(logits.astype(np.float64), axis=1)
    rows = np.arange(len(labels))
    given = probabilities[rows, labels]
    num_classes = logits.shape[1]
    counts = np.bincount(labels, minlength=num_classes)
    sums = np.bincount(labels, weights=given, minlength=num_classes)
    # A class without images has no threshold to reach.
    thresholds = np.divide(sums, counts, out=np.full(num_classes, np.inf), where=counts > 0)

    confident = np.where(probabilities >= thresholds, probabilities, -1.0)
    confident[rows, labels] = -1.0
    other = confident.argmax(axis=1)
    highest = confident[rows, other]
    found = np.flatnonzero((given < thresholds[labels]) & (highest >= 0))
    found = found[np.argsort((given - highest)[found], kind="stable")]
    return Suspects(found, labels[found], other[found], given[found], highest[found])


def forgetting_events(history: np.ndarray) -> np.ndarray:
    """How often each image went from right to wrong.

    Args:
      history: bool[epochs, n], whether it was right at the end of each epoch.

    Returns:
      int[n]. An image that was never right has 0; Toneva et al. put it with the most forgotten.

    Example:
      >>> forgetting_events(np.array([[1, 0], [0, 0], [1, 1], [0, 1]], bool)).tolist()
      [2, 0]
    """
    return (history[:-1] & ~history[1:]).sum(axis=0)


def train_epochs(
    seed: int,
    images: jax.Array,
    labels: jax.Array,
    examples: np.ndarray,
    *,
    model: Any,
    epochs: int,
    batch_size: int = 128,
) -> Iterator[TrainState]:
    """Trains with Adam, 1e-3 falling by a cosine, and yields the state after each epoch.

    That is the recipe of `small_dropout`, shortened.

    Args:
      seed: root of all randomness, in [0, 2**32).
      images: uint8[n, height, width].
      labels: int32[n].
      examples: int32[m], positions of the images to train on.
      model: as for `train_steps`.
      epochs: passes over them.
      batch_size: images an update.

    Yields:
      The state. Its arrays are gone when the next one is asked for.
    """
    config = StepConfig(
        model=model,
        tx=create_optimizer("adam"),
        batch_size=batch_size,
        schedule=create_schedule("cosine"),
    )
    total_steps = epochs * steps_per_epoch(len(examples), batch_size)
    hyperparams = Hyperparams(jnp.float32(1e-3), jnp.int32(total_steps))
    streams = create_streams(seed)
    height, width = images.shape[1:]
    state = create_train_state(streams.init, config, image_shape=(height, width))
    for _ in range(epochs):
        for state, _ in train_epoch(  # noqa: B020
            state, images, labels, jnp.asarray(examples), streams, hyperparams, config=config
        ):
            pass
        yield state


def cross_validate(
    seed: int,
    images: np.ndarray,
    labels: np.ndarray,
    test_images: np.ndarray,
    *,
    model: Any,
    folds: int = 4,
    epochs: int = 5,
    batch_size: int = 128,
    progress: NullProgress | None = None,
) -> CrossValidation:
    """Trains a network for each fold, on the images outside it.

    The folds are drawn at random, with the classes in proportion.

    Args:
      seed: root of all randomness, in [0, 2**32); the folds' networks take it and those after it.
      images: uint8[n, height, width].
      labels: int32[n].
      test_images: uint8[m, height, width].
      model: as for `train_steps`.
      folds: number of networks, at least 2.
      epochs: passes of each over its images.
      batch_size: images an update.
      progress: told of each epoch.

    Raises:
      ConfigError: if a class has fewer images than there are folds, or a number is too small.
    """
    progress = progress or NullProgress()
    fewest = np.unique(labels, return_counts=True)[1].min()
    if not 2 <= folds <= fewest:
        raise ConfigError(
            f"folds is {folds}; it must be from 2 to the {fewest:,} training images of the "
            "smallest class"
        )
    if epochs < 1:
        raise ConfigError(f"epochs is {epochs}; it must be at least 1")
    all_images, all_labels = jnp.asarray(images), jnp.asarray(labels)
    logits: np.ndarray | None = None
    test_logits = []
    forgotten, learned = np.zeros(len(labels), int), np.zeros(len(labels), bool)
    splits = StratifiedKFold(folds, shuffle=True, random_state=seed).split(images, labels)
    for fold, (inside, held_out) in enumerate(splits):
        history = []
        states = train_epochs(
            (seed + fold) % 2**32, all_images, all_labels, inside.astype(np.int32),
            model=model, epochs=epochs, batch_size=batch_size,
        )  # fmt: skip
        for state in states:
            seen = np.asarray(predict(state.variables, all_images, model=model))
            right = seen.argmax(axis=1) == labels
            history.append(right[inside])
            progress.say(
                f"fold {fold + 1} of {folds}, epoch {len(history)} of {epochs}: "
                f"{right[held_out].mean():.2%} of the {len(held_out):,} images outside were right"
            )
        if logits is None:
            logits = np.empty_like(seen)
        logits[held_out] = seen[held_out]
        test_logits.append(
            np.asarray(predict(state.variables, jnp.asarray(test_images), model=model))
        )
        forgotten[inside] += forgetting_events(np.array(history))
        learned[inside] |= np.any(history, axis=0)
    assert logits is not None  # there are two folds or more
    return CrossValidation(logits, np.array(test_logits), forgotten, learned)
