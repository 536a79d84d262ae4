"""Examines the data: class balance, pixels, duplicates and label issues.

    python experiments/audit.py

Writes `audit.html`, `audit.json` and `label_issues.txt`, which `run.py --exclude` reads, into a
folder. Exit status: 0 done, 2 bad usage or bad input.
"""

import signal

# Nothing needs to be saved, so Ctrl-C ends the process.
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cli
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import track
from scipy.special import softmax

import fmnist_jax as fm
from fmnist_jax.analysis import duplicates
from fmnist_jax.errors import ConfigError
from fmnist_jax.report.audit import write_audit
from fmnist_jax.runs import files
from fmnist_jax.studies.cross_validation import cross_validate, train_epochs
from fmnist_jax.studies.label_issues import LabelIssues, find_label_issues

ARCH = "small_dropout"  # the fastest of the networks that reach 91%
NUM_SEEDS = 3  # trainings with and without the label issues
# A test label is doubtful if the mean of the folds' networks gives it a lower probability.
DOUBTFUL = 0.01


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    return cli.run(_run, create_parser().parse_args(argv))


def create_parser() -> argparse.ArgumentParser:
    """Creates the parser of the command line."""
    parser = cli.Parser(
        description="Examines the data: class balance, pixels, duplicates and label issues."
    )
    for name, default, text in (
        ("folds", 4, "folds of the cross-validation"),
        ("epochs", 5, "epochs of each training"),
        ("seed", 0, "root of all randomness"),
    ):
        parser.add_argument(
            f"--{name}", type=int, metavar="int", default=default, help=f"{text} (%(default)s)"
        )
    parser.add_argument(
        "--skip-training", action="store_true", help="do not search for label issues"
    )
    parser.add_argument(
        "--workdir",
        type=Path,
        metavar="DIR",
        default=Path("runs/audit"),
        help="folder of the files (%(default)s)",
    )
    cli.add_output_flags(parser)
    cli.add_data_flags(parser)
    return parser


def _run(arguments: argparse.Namespace, console: Console) -> int:
    fm.create_streams(arguments.seed)  # refuses an invalid seed before any work
    workdir = arguments.workdir
    try:
        files.make_folder(workdir)
    except OSError as error:
        raise ConfigError(f"workdir {workdir} cannot be used: {error}") from error
    dataset = cli.load_data(arguments)
    console.print(f"Data: {dataset.source}", highlight=False, soft_wrap=True)
    labels = None
    if not arguments.skip_training:
        progress = fm.ConsoleProgress(console)
        labels = audit_labels(dataset, arguments.folds, arguments.epochs, arguments.seed, progress)
    matches, near_duplicates = compare_images(dataset, console)
    audit: dict[str, Any] = {
        "data": {
            "source": dataset.source,
            "sha256": dataset.sha256,
            "sample": dataset.sample,
            "classes": list(dataset.class_names),
        },
        "splits": {
            "train": describe(dataset.train_images, dataset.train_labels, dataset.class_names),
            "test": describe(dataset.test_images, dataset.test_labels, dataset.class_names),
        },
        "exact_duplicates": _exact_duplicates(dataset),
        "near_duplicates": near_duplicates,
        "labels": labels,
    }
    if labels:
        source = "the embedded sample" if dataset.sample else "the published file"
        lines = [
            f"# label issues of {len(dataset.train_labels)} training images: positions in "
            f"{source}, largest margin first; data SHA-256 {dataset.sha256}",
            *(str(issue["index"]) for issue in labels["issues"]),
        ]
        files.write_bytes(workdir / "label_issues.txt", ("\n".join(lines) + "\n").encode())
    files.write_json(workdir / "audit.json", audit)
    page = write_audit(workdir, audit, dataset, {name: m.distances for name, m in matches.items()})
    console.print(f"The report is {page}.", highlight=False, soft_wrap=True)
    return 0


def describe(images: np.ndarray, labels: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
    """Counts images and describes pixels in [0, 1], of all images and by class.

    Example:
      >>> describe(np.array([[[0, 255]]], np.uint8), np.array([0]), ["Bag"])["mean"]
      0.5
    """
    histograms = np.array(
        [
            np.bincount(images[labels == label].ravel(), minlength=256)
            for label in range(len(class_names))
        ]
    )
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


def _exact_duplicates(dataset: fm.Dataset) -> list[list[dict[str, Any]]]:
    num_train = len(dataset.train_labels)
    labels = np.concatenate([dataset.train_labels, dataset.test_labels])
    groups = duplicates.exact_duplicates(
        np.concatenate([dataset.train_images, dataset.test_images])
    )
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


def compare_images(
    dataset: fm.Dataset, console: Console
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
        console.print(f"Comparing {text} ...", highlight=False)
        bar = functools.partial(
            track, description=text, console=console, transient=True,
            disable=not console.is_terminal,
        )  # fmt: skip
        matches[name] = duplicates.match(images, others, track=bar)
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
    dataset: fm.Dataset, folds: int, epochs: int, seed: int, progress: fm.NullProgress
) -> dict[str, Any]:
    """Finds label issues by cross-validation, and trains with and without them."""
    labels, names = dataset.train_labels, dataset.class_names
    model = fm.create_model(ARCH, num_classes=len(names))
    progress.say(f"Cross-validating {ARCH} with {folds} folds ...")
    crossed = cross_validate(
        seed, dataset.train_images, labels, dataset.test_images,
        model=model, folds=folds, epochs=epochs, progress=progress,
    )  # fmt: skip
    found = find_label_issues(crossed.logits, labels)
    is_issue = np.zeros(len(labels), bool)
    is_issue[found.indices] = True

    everything = np.arange(len(labels), dtype=np.int32)
    images, device_labels = jnp.asarray(dataset.train_images), jnp.asarray(labels)
    test = jnp.asarray(dataset.test_images), jnp.asarray(dataset.test_labels)
    accuracies: dict[str, list[float]] = {"with": [], "without": []}
    for number in range(NUM_SEEDS):
        for name, examples in (("with", everything), ("without", everything[~is_issue])):
            progress.say(
                f"Training {number + 1} of {NUM_SEEDS} {name} the label issues, "
                f"{len(examples):,} images ..."
            )
            *_, state = train_epochs(
                (seed + number) % 2**32, images, device_labels, examples, model=model, epochs=epochs
            )
            accuracy = fm.evaluate(state.variables, *test, model=model).means()["accuracy"]
            accuracies[name].append(accuracy)
            progress.say(f"test accuracy {accuracy:.2%}")

    ensemble = softmax(crossed.test_logits.astype(np.float64), axis=2).mean(axis=0)
    is_correct = ensemble.argmax(axis=1) == dataset.test_labels
    probabilities = ensemble[np.arange(len(is_correct)), dataset.test_labels]
    indices = np.flatnonzero(probabilities < DOUBTFUL)
    indices = indices[np.argsort(probabilities[indices], kind="stable")]
    doubtful = LabelIssues(
        indices, dataset.test_labels[indices], ensemble[indices].argmax(axis=1),
        probabilities[indices], ensemble[indices].max(axis=1),
    )  # fmt: skip
    return {
        "arch": ARCH,
        "folds": folds,
        "epochs": epochs,
        "seed": seed,
        "out_of_fold_accuracy": float((crossed.logits.argmax(axis=1) == labels).mean()),
        "issues": [
            row | {"forgotten": int(crossed.forgotten[row["index"]])} for row in _rows(found, names)
        ],
        "forgotten": {
            "issues": _mean(crossed.forgotten[is_issue]),
            "others": _mean(crossed.forgotten[~is_issue]),
            "never_forgotten": int((crossed.learned & (crossed.forgotten == 0)).sum()),
            "never_learned": int((~crossed.learned).sum()),
            "never_learned_issues": int((~crossed.learned & is_issue).sum()),
        },
        "test_accuracy": accuracies,
        "ensemble_test_accuracy": float(is_correct.mean()),
        "ensemble_test_accuracy_without_doubtful": _mean(is_correct[probabilities >= DOUBTFUL]),
        "doubtful_below": DOUBTFUL,
        "doubtful_test_images": _rows(doubtful, names),
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


if __name__ == "__main__":
    sys.exit(main())
