"""`cross_validate`: predictions for every training image by a network not trained on it."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.model_selection import StratifiedKFold

from fmnist_jax.analysis.label_issues import forgetting_events
from fmnist_jax.data.batches import steps_per_epoch
from fmnist_jax.errors import ConfigError
from fmnist_jax.rng import create_streams
from fmnist_jax.train.hooks import Hook, say
from fmnist_jax.train.loop import TrainInputs, train_epochs
from fmnist_jax.train.optim import create_optimizer, create_schedule
from fmnist_jax.train.predict import predict
from fmnist_jax.train.step import (
    Hyperparams,
    Model,
    StepConfig,
    TrainState,
    create_train_state,
)


class CrossValidation(NamedTuple):
    """Out-of-fold predictions, and what the networks learned of the images they were trained on.

    Attributes:
      logits: float32[n, num_classes], of each training image from the network without it.
      test_logits: float32[folds, m, num_classes], of the test images from each network.
      forgotten: int[n], forgetting events, summed over the networks trained on the image.
      learned: bool[n], True if such a network was correct after any epoch.
    """

    logits: np.ndarray
    test_logits: np.ndarray
    forgotten: np.ndarray
    learned: np.ndarray


def cross_validate(
    seed: int,
    images: np.ndarray,
    labels: np.ndarray,
    test_images: np.ndarray,
    *,
    model: Model,
    folds: int = 4,
    epochs: int = 5,
    batch_size: int = 128,
    hooks: Sequence[Hook] = (),
) -> CrossValidation:
    """Trains one network per fold, on the images outside the fold.

    The folds are random and stratified by class.

    Args:
      seed: root of all randomness, in [0, 2**32). Fold i trains from seed + i, modulo 2**32.
      images: uint8[n, height, width].
      labels: int32[n], values in [0, num_classes).
      test_images: uint8[m, height, width].
      model: as in `StepConfig`.
      folds: number of networks, at least 2.
      epochs: epochs per network, at least 1.
      batch_size: examples per step, at least 1.
      hooks: receive a message after each epoch.

    Raises:
      ConfigError: if a class has fewer images than there are folds, or epochs is below 1.
    """
    fewest = np.unique(labels, return_counts=True)[1].min()
    if not 2 <= folds <= fewest:
        raise ConfigError(
            f"folds is {folds}; it must be from 2 to {fewest:,}, the number of training images of "
            "the smallest class"
        )
    if epochs < 1:
        raise ConfigError(f"epochs is {epochs}; it must be at least 1")
    device_images, device_labels = jnp.asarray(images), jnp.asarray(labels)
    logits, positions, test_logits = [], [], []
    forgotten, learned = np.zeros(len(labels), int), np.zeros(len(labels), bool)
    splits = StratifiedKFold(folds, shuffle=True, random_state=seed).split(images, labels)
    for fold, (inside, held_out) in enumerate(splits):
        history = []
        states = train_network(
            (seed + fold) % 2**32, device_images, device_labels, inside.astype(np.int32),
            model=model, epochs=epochs, batch_size=batch_size,
        )  # fmt: skip
        for state in states:
            predicted = np.asarray(predict(state.variables, images, model=model))
            correct = predicted.argmax(axis=1) == labels
            history.append(correct[inside])
            say(
                hooks,
                f"fold {fold + 1} of {folds}, epoch {len(history)} of {epochs}: accuracy "
                f"{correct[held_out].mean():.2%} on the {len(held_out):,} images of the fold",
            )
        logits.append(predicted[held_out])
        positions.append(held_out)
        test_logits.append(np.asarray(predict(state.variables, test_images, model=model)))
        forgotten[inside] += forgetting_events(np.array(history))
        learned[inside] |= np.any(history, axis=0)
    in_order = np.concatenate(logits)[np.argsort(np.concatenate(positions))]
    return CrossValidation(in_order, np.array(test_logits), forgotten, learned)


def train_network(
    seed: int,
    images: jax.Array | np.ndarray,
    labels: jax.Array | np.ndarray,
    examples: np.ndarray,
    *,
    model: Model,
    epochs: int,
    batch_size: int = 128,
) -> Iterator[TrainState]:
    """Trains a network like the recipe `small_dropout`: Adam, 1e-3 with a cosine schedule.

    Args:
      seed: root of all randomness, in [0, 2**32).
      images: uint8[n, height, width].
      labels: int32[n], values in [0, num_classes).
      examples: int32[m], positions of the images to train on.
      model: as in `StepConfig`.
      epochs: number of epochs.
      batch_size: examples per step, at least 1.

    Yields:
      The state after each epoch. It is donated when the next one is requested.
    """
    config = StepConfig(
        model=model,
        tx=create_optimizer("adam"),
        batch_size=batch_size,
        schedule=create_schedule("cosine"),
    )
    total_steps = epochs * steps_per_epoch(len(examples), batch_size)
    inputs = TrainInputs(
        images,
        labels,
        create_streams(seed),
        Hyperparams(jnp.float32(1e-3), jnp.int32(total_steps)),
        jnp.asarray(examples),
    )
    height, width = images.shape[1:]
    initial = create_train_state(inputs.streams.init, config, image_shape=(height, width))
    for state, _ in train_epochs(initial, inputs, epochs, config=config):
        yield state
