"""Looks at the data: balance, pixels, duplicates, and labels that training doubts.

    python experiments/audit.py

It writes `audit.html`, `audit.json` and `suspects.txt` into a folder. Exit status: 0 done, 2 bad
usage or bad input.
"""

import signal

# Nothing is left to save, so Ctrl-C just ends the process, without a traceback.
if __name__ == "__main__":
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
from fmnist_jax.report.audit import write_audit
from fmnist_jax.runs import files
from fmnist_jax.studies import label_issues as suspects

ARCH = "small_dropout"  # the fastest of the networks that reach 91%
NUM_SEEDS = 3  # trainings with and without the suspects
# A test label with less than this probability in the mean of the folds' networks is doubted.
DOUBTED = 0.01


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    return cli.run(_run, _parser().parse_args(argv))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Looks at the data and writes a page about it.")
    cli.add_data_flags(parser)
    parser.add_argument(
        "--workdir", type=Path, default=Path("runs/audit"), help="folder of the files (%(default)s)"
    )
    parser.add_argument("--folds", type=int, default=4, help="of cross-validation (%(default)s)")
    parser.add_argument("--epochs", type=int, default=5, help="of each training (%(default)s)")
    parser.add_argument("--skip-training", action="store_true", help="leave the labels alone")
    parser.add_argument("--seed", type=int, default=0, help="root of all randomness (%(default)s)")
    return parser


def _run(arguments: argparse.Namespace, console: Console) -> int:
    fm.create_streams(arguments.seed)  # refuses a seed that cannot be one, before any work
    workdir = arguments.workdir
    try:
        files.make_folder(workdir)
    except OSError as error:
        raise fm.ConfigError(f"workdir {workdir} cannot be used: {error}") from error
    dataset = cli.load_data(arguments)
    console.print(f"Data: {dataset.source}", highlight=False, soft_wrap=True)

    # First, because it is what may refuse its settings.
    labels = None
    if not arguments.skip_training:
        progress = fm.ConsoleProgress(console)
        labels = doubt(dataset, arguments.folds, arguments.epochs, arguments.seed, progress)
    matches, near = compare(dataset, console)
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
        "exact_duplicates": _exact(dataset),
        "near_duplicates": near,
        "labels": labels,
    }
    if labels:
        place = "the embedded sample" if dataset.sample else "the published file"
        lines = [
            f"# suspected labels of {len(dataset.train_labels)} training images: positions in "
            f"{place}, most suspect first; data SHA-256 {dataset.sha256}",
            *(str(suspect["index"]) for suspect in labels["suspects"]),
        ]
        files.write_bytes(workdir / "suspects.txt", ("\n".join(lines) + "\n").encode())
    files.write_json(workdir / "audit.json", audit)
    page = write_audit(workdir, audit, dataset, {name: m.distances for name, m in matches.items()})
    console.print(f"Written: {page}", highlight=False, soft_wrap=True)
    return 0


def describe(images: np.ndarray, labels: np.ndarray, class_names: Sequence[str]) -> dict[str, Any]:
    """Counts and pixel statistics of a split, pixels in [0, 1], over all and by class.

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
    share, values = histogram / histogram.sum(), np.arange(256) / 255
    mean = float(share @ values)
    return {
        "mean": mean,
        "std": float(np.sqrt(share @ (values - mean) ** 2)),
        "zero_share": float(share[0]),
    }


def _exact(dataset: fm.Dataset) -> list[list[dict[str, Any]]]:
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


def compare(
    dataset: fm.Dataset, console: Console
) -> tuple[dict[str, duplicates.Matches], dict[str, Any]]:
    """The nearest training image of each test image, and of as many training images.

    The second says what is usual: how near the first training images come to the others.
    """
    train, test = dataset.train_images, dataset.test_images
    count = min(len(test), len(train) // 2)
    matches = {}
    for name, images, others in (
        ("test", test, train),
        ("train", train[:count], train[count:]),
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
        "compared_within_training": count,
        "near_within_training": int((matches["train"].distances < duplicates.NEAR).sum()),
        "median_distance": {name: float(np.median(m.distances)) for name, m in matches.items()},
    }


def doubt(
    dataset: fm.Dataset, folds: int, epochs: int, seed: int, progress: fm.Silence
) -> dict[str, Any]:
    """Finds the suspects by cross-validation, and trains with and without them."""
    labels, names = dataset.train_labels, dataset.class_names
    model = fm.create_model(ARCH, num_classes=len(names))
    progress.say(f"Training {folds} networks of {ARCH}, each on the images outside its fold ...")
    crossed = suspects.cross_validate(
        seed, dataset.train_images, labels, dataset.test_images,
        model=model, folds=folds, epochs=epochs, progress=progress,
    )  # fmt: skip
    found = suspects.find_suspects(crossed.logits, labels)
    is_suspect = np.zeros(len(labels), bool)
    is_suspect[found.indices] = True

    everything = np.arange(len(labels), dtype=np.int32)
    images, device_labels = jnp.asarray(dataset.train_images), jnp.asarray(labels)
    test = jnp.asarray(dataset.test_images), jnp.asarray(dataset.test_labels)
    accuracies: dict[str, list[float]] = {"with": [], "without": []}
    for number in range(NUM_SEEDS):
        for name, examples in (("with", everything), ("without", everything[~is_suspect])):
            *_, state = suspects.train_epochs(
                (seed + number) % 2**32, images, device_labels, examples, model=model, epochs=epochs
            )
            accuracy = fm.evaluate(state.params, *test, model=model).means()["accuracy"]
            accuracies[name].append(accuracy)
            progress.say(
                f"training {number + 1} of {NUM_SEEDS} {name} the suspects: test {accuracy:.2%}"
            )

    ensemble = softmax(crossed.test_logits.astype(np.float64), axis=2).mean(axis=0)
    right = ensemble.argmax(axis=1) == dataset.test_labels
    own = ensemble[np.arange(len(right)), dataset.test_labels]
    doubted = np.flatnonzero(own < DOUBTED)
    doubted = doubted[np.argsort(own[doubted], kind="stable")]
    probable = ensemble[doubted]
    in_doubt = suspects.Suspects(
        doubted, dataset.test_labels[doubted], probable.argmax(axis=1), own[doubted],
        probable.max(axis=1),
    )  # fmt: skip
    return {
        "arch": ARCH,
        "folds": folds,
        "epochs": epochs,
        "seed": seed,
        "out_of_fold_accuracy": float((crossed.logits.argmax(axis=1) == labels).mean()),
        "suspects": [
            row | {"forgotten": int(crossed.forgotten[row["index"]])} for row in _rows(found, names)
        ],
        "forgotten": {
            "suspects": _mean(crossed.forgotten[is_suspect]),
            "others": _mean(crossed.forgotten[~is_suspect]),
            "never_forgotten": int((crossed.learned & (crossed.forgotten == 0)).sum()),
            "never_learned": int((~crossed.learned).sum()),
            "never_learned_suspects": int((~crossed.learned & is_suspect).sum()),
        },
        "test_accuracy": accuracies,
        "ensemble_test_accuracy": float(right.mean()),
        "ensemble_test_accuracy_without_doubted": _mean(right[own >= DOUBTED]),
        "doubted_below": DOUBTED,
        "doubted_test_images": _rows(in_doubt, names),
    }


def _rows(found: suspects.Suspects, names: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {
            "index": int(index),
            "label": names[given],
            "taken_for": names[other],
            "label_probability": float(given_probability),
            "other_probability": float(other_probability),
        }
        for index, given, other, given_probability, other_probability in zip(*found, strict=True)
    ]


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


if __name__ == "__main__":
    sys.exit(main())
