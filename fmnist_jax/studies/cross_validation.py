"""`cross_validate`: predictions for every training image by a network not trained on it."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from sklearn.model_selection import StratifiedKFold

from fmnist_jax.analysis.label_issues import forgetting_events
from fmnist_jax.config import Run
from fmnist_jax.data.dataset import Dataset
from fmnist_jax.errors import ConfigError
from fmnist_jax.parts.objects import create_part
from fmnist_jax.runs.plan import create_plan
from fmnist_jax.train.hooks import Hook, say
from fmnist_jax.train.loop import train_epochs
from fmnist_jax.train.predict import predict
from fmnist_jax.train.step import TrainState


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
    run: Run, dataset: Dataset, folds: int = 4, *, hooks: Sequence[Hook] = ()
) -> CrossValidation:
    """Trains one network per fold, on the images outside the fold.

    The folds are random and stratified by class. No file is written.

    Args:
      run: recipe, without validation images, and seed. Fold i trains from the seed plus i, modulo
        2**32.
      dataset: the data.
      folds: number of networks, at least 2.
      hooks: receive a message after each epoch.

    Raises:
      ConfigError: if a class has fewer images than there are folds, or the settings do not fit.
    """
    labels, epochs = dataset.train_labels, run.recipe.epochs
    fewest = np.unique(labels, return_counts=True)[1].min()
    if not 2 <= folds <= fewest:
        raise ConfigError(
            f"folds is {folds}; it must be from 2 to {fewest:,}, the number of training images of "
            "the smallest class"
        )
    model = create_part("arch", run, len(dataset.class_names))
    logits, positions, test_logits = [], [], []
    forgotten, learned = np.zeros(len(labels), int), np.zeros(len(labels), bool)
    splits = StratifiedKFold(folds, shuffle=True, random_state=run.seed).split(labels, labels)
    for fold, (inside, held_out) in enumerate(splits):
        history = []
        of_fold = dataclasses.replace(run, seed=(run.seed + fold) % 2**32)
        for state in train_without(of_fold, dataset, held_out):
            predicted = np.asarray(predict(state.variables, dataset.train_images, model=model))
            correct = predicted.argmax(axis=1) == labels
            history.append(correct[inside])
            say(
                hooks,
                f"fold {fold + 1} of {folds}, epoch {len(history)} of {epochs}: accuracy "
                f"{correct[held_out].mean():.2%} on the {len(held_out):,} images of the fold",
            )
        logits.append(predicted[held_out])
        positions.append(held_out)
        test_logits.append(np.asarray(predict(state.variables, dataset.test_images, model=model)))
        forgotten[inside] += forgetting_events(np.array(history))
        learned[inside] |= np.any(history, axis=0)
    in_order = np.concatenate(logits)[np.argsort(np.concatenate(positions))]
    return CrossValidation(in_order, np.array(test_logits), forgotten, learned)


def train_without(run: Run, dataset: Dataset, exclude: np.ndarray) -> Iterator[TrainState]:
    """Trains on all training images but some, without validation images and files.

    Args:
      run: recipe and seed.
      dataset: the data.
      exclude: int[k], positions of the training images to leave out.

    Yields:
      The state after each epoch. It is donated when the next one is requested.
    """
    recipe = dataclasses.replace(run.recipe, val_fraction=0.0, patience=None)
    plan = create_plan(dataclasses.replace(run, recipe=recipe, exclude=exclude.tolist()), dataset)
    for state, _ in train_epochs(
        plan.create_state(), plan.inputs, recipe.epochs, config=plan.config
    ):
        yield state
