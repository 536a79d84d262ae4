"""`audit_images`, `audit_labels`: statistics, duplicates and label issues of a data set."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fmnist_jax.analysis import duplicates
from fmnist_jax.analysis.label_issues import LabelIssues, find_label_issues
from fmnist_jax.config import Run
from fmnist_jax.data.dataset import Dataset
from fmnist_jax.parts.objects import create_part
from fmnist_jax.recipes import RECIPES
from fmnist_jax.studies.cross_validation import CrossValidation, cross_validate, train_without
from fmnist_jax.train.hooks import Hook, say
from fmnist_jax.train.predict import evaluate

ARCH = "small_dropout"  # the fastest of the networks that reach 91%
SMALL_ARCH, SMALL_SIDE = "same_3x3", 18  # for images of smaller sides, from 8 pixels on
NUM_SEEDS = 3  # trainings with and without the label issues
# A test label is doubtful if the mean of the folds' networks gives it a lower probability.
DOUBTFUL = 0.01

Track = Callable[[Iterable[int]], Iterable[int]]


def audit_images(
    dataset: Dataset, track: Callable[[str], Track] = lambda _: iter
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Describes the images and finds duplicates.

    Args:
      dataset: the data.
      track: maps a text to what wraps a slow iteration (`duplicates.nearest`), for progress.

    Returns:
      The entries `data`, `splits`, `exact_duplicates` and `near_duplicates` of audit.json; and the
      distances of the "test" images and of "train" images to their nearest training images,
      float[n] each.
    """
    matches, near_duplicates = _compare_images(dataset, track)
    audit: dict[str, Any] = {
        "data": {
            "source": dataset.source,
            "sha256": dataset.sha256,
            "sample": dataset.sample,
            "classes": list(dataset.class_names),
        },
        "splits": {
            "train": image_statistics(
                dataset.train_images, dataset.train_labels, dataset.class_names
            ),
            "test": image_statistics(dataset.test_images, dataset.test_labels, dataset.class_names),
        },
        "exact_duplicates": _exact_duplicates(dataset),
        "near_duplicates": near_duplicates,
    }
    return audit, {name: found.distances for name, found in matches.items()}


def image_statistics(
    images: np.ndarray, labels: np.ndarray, class_names: Sequence[str]
) -> dict[str, Any]:
    """Counts images and describes pixels in [0, 1], of all images and by class.

    Example:
      >>> image_statistics(np.array([[[0, 255]]], np.uint8), np.array([0]), ["Bag"])["mean"]
      0.5
    """
    histograms = np.zeros((len(class_names), 256), np.int64)
    for image, label in zip(images, labels, strict=True):
        histograms[label] += np.bincount(image.ravel(), minlength=256)
    counts = np.bincount(labels, minlength=len(class_names))
    by_class = [
        {"name": name, "images": int(count)} | _pixels(histogram)
        for name, count, histogram in zip(class_names, counts, histograms, strict=True)
        if count
    ]
    return {"images": len(labels)} | _pixels(histograms.sum(axis=0)) | {"by_class": by_class}


def _pixels(histogram: np.ndarray) -> dict[str, float]:
    fractions, values = histogram / histogram.sum(), np.arange(256) / 255
    mean = float(fractions @ values)
    return {
        "mean": mean,
        "std": float(np.sqrt(fractions @ (values - mean) ** 2)),
        "zero_share": float(fractions[0]),
    }


def _exact_duplicates(dataset: Dataset) -> list[list[dict[str, Any]]]:
    num_train = len(dataset.train_labels)
    labels = np.concatenate([dataset.train_labels, dataset.test_labels])
    groups = duplicates.exact_duplicates(itertools.chain(dataset.train_images, dataset.test_images))
    return [
        [
            {
                "split": "train" if position < num_train else "test",
                "index": position if position < num_train else position - num_train,
                "label": dataset.class_names[labels[position]],
            }
            for position in group
        ]
        for group in groups
    ]


def _compare_images(
    dataset: Dataset, track: Callable[[str], Track]
) -> tuple[dict[str, duplicates.Matches], dict[str, Any]]:
    """Finds the nearest training image of each test image, and of as many training images.

    The latter are the reference: how near the first training images are to the others.
    """
    train, test = dataset.train_images, dataset.test_images
    num_compared = min(len(test), len(train) // 2)
    matches = {}
    for name, images, others in (
        ("test", test, train),
        ("train", train[:num_compared], train[num_compared:]),
    ):
        text = f"{len(images):,} {name} images against {len(others):,} training images"
        matches[name] = duplicates.match(images, others, track=track(text))
    found = matches["test"]
    near = np.flatnonzero(found.distances < duplicates.NEAR)
    pairs = [
        {
            "test": int(index),
            "train": int(found.others[index]),
            "distance": float(found.distances[index]),
            "mirrored": bool(found.mirrored[index]),
            "test_label": dataset.class_names[dataset.test_labels[index]],
            "train_label": dataset.class_names[dataset.train_labels[found.others[index]]],
        }
        for index in near[np.argsort(found.distances[near], kind="stable")]
    ]
    return matches, {
        "threshold": duplicates.NEAR,
        "pairs": pairs,
        "with_another_label": sum(pair["test_label"] != pair["train_label"] for pair in pairs),
        "compared_within_training": num_compared,
        "near_within_training": int((matches["train"].distances < duplicates.NEAR).sum()),
        "median_distance": {name: float(np.median(m.distances)) for name, m in matches.items()},
    }


def audit_labels(
    dataset: Dataset, folds: int, epochs: int, seed: int, hooks: Sequence[Hook] = ()
) -> dict[str, Any]:
    """Finds label issues by cross-validation, and trains with and without them.

    Args:
      dataset: the data.
      folds: as for `cross_validate`.
      epochs: of each training.
      seed: root of all randomness, in [0, 2**32).
      hooks: receive messages.

    Returns:
      The entry `labels` of audit.json.
    """
    labels, names = dataset.train_labels, dataset.class_names
    arch = ARCH if min(dataset.image_shape[:2]) >= SMALL_SIDE else SMALL_ARCH
    batch_size = min(RECIPES[arch].batch_size, max(1, len(labels) // 4))
    recipe = dataclasses.replace(RECIPES[arch], epochs=epochs, batch_size=batch_size)
    run = Run(recipe=recipe, workdir=Path(), seed=seed)
    say(hooks, f"Cross-validating {arch} with {folds} folds ...")
    crossed = cross_validate(run, dataset, folds, hooks=hooks)
    found = find_label_issues(crossed.logits, labels)
    is_issue = np.zeros(len(labels), bool)
    is_issue[found.indices] = True
    issues = [
        row | {"forgotten": int(crossed.forgotten[row["index"]])} for row in _rows(found, names)
    ]
    return {
        "arch": arch,
        "folds": folds,
        "epochs": epochs,
        "seed": seed,
        "out_of_fold_accuracy": float((crossed.logits.argmax(axis=1) == labels).mean()),
        "issues": issues,
        "forgotten": {
            "issues": _mean(crossed.forgotten[is_issue]),
            "others": _mean(crossed.forgotten[~is_issue]),
            "never_forgotten": int((crossed.learned & (crossed.forgotten == 0)).sum()),
            "never_learned": int((~crossed.learned).sum()),
            "never_learned_issues": int((~crossed.learned & is_issue).sum()),
        },
        "test_accuracy": _accuracies(run, dataset, found.indices, hooks),
    } | _doubtful_test_labels(dataset, crossed)


def _accuracies(
    run: Run, dataset: Dataset, issues: np.ndarray, hooks: Sequence[Hook]
) -> dict[str, list[float]]:
    """Returns the test accuracies of trainings with and without the label issues."""
    model = create_part("arch", run, len(dataset.class_names))
    accuracies: dict[str, list[float]] = {"with": [], "without": []}
    for number in range(NUM_SEEDS):
        of_seed = dataclasses.replace(run, seed=(run.seed + number) % 2**32)
        for name, excluded in (("with", issues[:0]), ("without", issues)):
            num_images = len(dataset.train_labels) - len(excluded)
            say(
                hooks,
                f"Training {number + 1} of {NUM_SEEDS} {name} the label issues, "
                f"{num_images:,} images ...",
            )
            *_, state = train_without(of_seed, dataset, excluded)
            metrics = evaluate(
                state.variables, dataset.test_images, dataset.test_labels, model=model
            )
            accuracies[name].append(metrics.means()["accuracy"])
            say(hooks, f"test accuracy {accuracies[name][-1]:.2%}")
    return accuracies


def _doubtful_test_labels(dataset: Dataset, crossed: CrossValidation) -> dict[str, Any]:
    """Describes the test images whose labels the mean of the folds' networks contradicts."""
    from scipy.special import softmax  # here, because SciPy takes half a second

    labels = dataset.test_labels
    ensemble = softmax(crossed.test_logits.astype(np.float64), axis=2).mean(axis=0)
    is_correct = ensemble.argmax(axis=1) == labels
    probabilities = ensemble[np.arange(len(labels)), labels]
    indices = np.flatnonzero(probabilities < DOUBTFUL)
    indices = indices[np.argsort(probabilities[indices], kind="stable")]
    doubtful = LabelIssues(
        indices, labels[indices], ensemble[indices].argmax(axis=1),
        probabilities[indices], ensemble[indices].max(axis=1),
    )  # fmt: skip
    return {
        "ensemble_test_accuracy": float(is_correct.mean()),
        "ensemble_test_accuracy_without_doubtful": _mean(is_correct[probabilities >= DOUBTFUL]),
        "doubtful_below": DOUBTFUL,
        "doubtful_test_images": _rows(doubtful, dataset.class_names),
    }


def _rows(found: LabelIssues, names: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {
            "index": int(index),
            "label": names[given],
            "predicted": names[other],
            "label_probability": float(given_probability),
            "other_probability": float(other_probability),
        }
        for index, given, other, given_probability, other_probability in zip(*found, strict=True)
    ]


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None
