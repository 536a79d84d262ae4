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
import html
import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cli
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import track
from scipy.special import softmax

import fmnist_jax as fm
from fmnist_jax.analysis import duplicates
from fmnist_jax.report import page
from fmnist_jax.runs import files
from fmnist_jax.studies import label_issues as suspects

ARCH = "small_dropout"  # the fastest of the networks that reach 91%
NUM_SEEDS = 3  # trainings with and without the suspects
# A test label with less than this probability in the mean of the folds' networks is doubted.
DOUBTED = 0.01
SHOWN = 60  # pictures a section of the page


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
    files.write_bytes(workdir / "audit.html", draw(audit, dataset, matches).encode())
    console.print(f"Written: {workdir / 'audit.html'}", highlight=False, soft_wrap=True)
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


_CARDS = """
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(8.6rem, 1fr)); gap: .8rem;
  margin-top: 1rem; }
.cards figure { margin: 0; font-size: .8rem; line-height: 1.35; }
.cards div { display: flex; gap: .3rem; margin-bottom: .3rem; }
.cards img { width: 4.2rem; height: 4.2rem; margin: 0; image-rendering: pixelated; }
"""


def draw(audit: dict[str, Any], dataset: fm.Dataset, matches: dict[str, duplicates.Matches]) -> str:
    """The page."""
    splits, near, labels = audit["splits"], audit["near_duplicates"], audit["labels"]
    numbers = [
        ("", f"{splits['train']['images']:,}", "training images"),
        ("", f"{splits['test']['images']:,}", "test images"),
        ("main", f"{len(audit['exact_duplicates']):,}", "groups of exact duplicates"),
        ("main", f"{len(near['pairs']):,}", "test images nearly in training"),
    ]
    if labels:
        numbers += [
            ("main", f"{len(labels['suspects']):,}", "suspected training labels"),
            ("", f"{labels['out_of_fold_accuracy']:.2%}", "right out of fold"),
        ]
    parts = [
        '<p class="warning">This is the embedded sample of Fashion-MNIST (6,000 and 1,000 images); '
        "positions are those in the sample.</p>"
        if dataset.sample
        else "",
        "<h1>A look at the data</h1>",
        f'<p class="soft">Fashion-MNIST from {html.escape(dataset.source)}.</p>',
        page.figures(numbers),
        page.section("Classes and pixels", _split_table(audit) + _mean_images(dataset)),
        page.section("Exact duplicates", _exact_cards(audit, dataset)),
        page.section("Near-duplicates of test and training images", _near(audit, dataset, matches)),
    ]
    if labels:
        parts += [
            page.section("Suspected training labels", _suspect_cards(audit, dataset)),
            page.section("Test images whose label is doubted", _doubted_cards(audit, dataset)),
            page.section("Accuracy with and without the suspects", _accuracies(labels)),
        ]
    data = page.facts({"Data": f"{dataset.source}, SHA-256 {dataset.sha256}"})
    return page.page("A look at the data", [*parts, page.section("Source", data)], css=_CARDS)


def _split_table(audit: dict[str, Any]) -> str:
    train, test = audit["splits"]["train"], audit["splits"]["test"]
    tests = {row["name"]: row["images"] for row in test["by_class"]}
    rows = [
        [row["name"], f"{row['images']:,}", f"{tests.get(row['name'], 0):,}"]
        + [f"{row[key]:.3f}" for key in ("mean", "std", "zero_share")]
        for row in train["by_class"]
    ]
    for name, split in (("all, training", train), ("all, test", test)):
        counts = [f"{split['images']:,}", ""] if split is train else ["", f"{split['images']:,}"]
        rows.append(
            [name, *counts, *(f"{split[key]:.3f}" for key in ("mean", "std", "zero_share"))]
        )
    headings = ["class", "training", "test", "mean pixel", "std", "zeros"]
    text = "Pixels are in [0, 1], those of the classes from training. Below, the mean images."
    return _text(text) + page.table(headings, rows)


def _cards(cards: Sequence[tuple[Sequence[np.ndarray], Sequence[str]]]) -> str:
    """Pictures with a few lines of text each."""
    if not cards:
        return '<p class="soft">None.</p>'
    figures = [
        "<figure><div>"
        + "".join(page.image(page.thumbnail(pixels), lines[0]) for pixels in pictures)
        + f"</div><figcaption>{'<br>'.join(map(html.escape, lines))}</figcaption></figure>"
        for pictures, lines in cards
    ]
    return f'<div class="cards">{"".join(figures)}</div>'


def _text(text: str) -> str:
    return f"<p>{html.escape(text)}</p>"


def _mean_images(dataset: fm.Dataset) -> str:
    cards = []
    for label, name in enumerate(dataset.class_names):
        members = dataset.train_images[dataset.train_labels == label]
        if len(members):
            mean = np.round(members.mean(axis=0)).astype(np.uint8)
            cards.append(([mean], [name]))
    return _cards(cards)


def _exact_cards(audit: dict[str, Any], dataset: fm.Dataset) -> str:
    images = {"train": dataset.train_images, "test": dataset.test_images}
    return _cards(
        [
            (
                [images[member["split"]][member["index"]] for member in group[:2]],
                [f"{member['split']} {member['index']}: {member['label']}" for member in group],
            )
            for group in audit["exact_duplicates"][:SHOWN]
        ]
    )


def _near(
    audit: dict[str, Any], dataset: fm.Dataset, matches: dict[str, duplicates.Matches]
) -> str:
    near = audit["near_duplicates"]
    text = (
        f"Each test image and its mirror was compared with every training image. "
        f"{len(near['pairs']):,} come nearer than {near['threshold']:g} of their own norm, "
        f"{near['with_another_label']:,} of them with another label. Of the first "
        f"{near['compared_within_training']:,} training images, "
        f"{near['near_within_training']:,} come as near to the other training images."
    )
    cards = [
        (
            [dataset.test_images[pair["test"]], dataset.train_images[pair["train"]]],
            [
                f"test {pair['test']}: {pair['test_label']}",
                f"train {pair['train']}: {pair['train_label']}",
                f"distance {pair['distance']:.3f}{', mirrored' if pair['mirrored'] else ''}",
            ],
        )
        for pair in near["pairs"][:SHOWN]
    ]
    picture = page.image(_histogram(matches), "Distances to the nearest training image")
    return _text(text) + picture + _cards(cards)


def _histogram(matches: dict[str, duplicates.Matches]) -> bytes:
    buffer = io.BytesIO()
    with mpl.rc_context(page.STYLE):
        figure = Figure(figsize=(5.6, 3.2), layout="constrained")
        axes = figure.subplots()
        for name, color in (("test", "#2563eb"), ("train", "#ea7317")):
            axes.hist(
                matches[name].distances, bins=np.linspace(0, 1, 51).tolist(), histtype="step",
                color=color, linewidth=1.5, label=f"{name} images",
            )  # fmt: skip
        axes.axvline(duplicates.NEAR, color=page.INK, linewidth=1, linestyle="--")
        axes.set_yscale("log")
        axes.set_xlabel("distance to the nearest training image, share of the norm")
        axes.set_ylabel("images")
        axes.legend(frameon=False)
        figure.savefig(buffer, dpi=110)
    return buffer.getvalue()


def _verdicts(rows: Sequence[dict[str, Any]], images: np.ndarray, split: str) -> str:
    return _cards(
        [
            (
                [images[row["index"]]],
                [
                    f"{split} {row['index']}",
                    f"{row['label']} {row['label_probability']:.1%}",
                    f"taken for {row['taken_for']} {row['other_probability']:.1%}",
                    *([f"forgotten {row['forgotten']} times"] if row.get("forgotten") else []),
                ],
            )
            for row in rows[:SHOWN]
        ]
    )


def _suspect_cards(audit: dict[str, Any], dataset: fm.Dataset) -> str:
    labels = audit["labels"]
    forgotten = labels["forgotten"]
    text = (
        f"{labels['folds']} networks of {labels['arch']}, {labels['epochs']} epochs each, "
        f"classified the images that they had not seen. {len(labels['suspects']):,} labels are "
        "less probable than is usual for their class, while another class is as probable as is "
        f"usual for that one. {forgotten['never_learned']:,} images were never right in training, "
        f"{forgotten['never_learned_suspects']:,} of them suspects. A suspect went from right to "
        f"wrong {forgotten['suspects'] or 0:.2f} times, another image "
        f"{forgotten['others'] or 0:.2f} times, all networks together. The most suspect are "
        "shown; suspects.txt names all."
    )
    return _text(text) + _verdicts(labels["suspects"], dataset.train_images, "train")


def _doubted_cards(audit: dict[str, Any], dataset: fm.Dataset) -> str:
    labels = audit["labels"]
    without = labels["ensemble_test_accuracy_without_doubted"]
    text = (
        f"{len(labels['doubted_test_images']):,} test images have a label of less than {DOUBTED:g} "
        f"probability in the mean of the folds' networks, which is right on "
        f"{labels['ensemble_test_accuracy']:.2%} of all test images and on "
        f"{'none' if without is None else f'{without:.2%}'} of the others. That second number is "
        "too high by construction: all that were left out are mistakes of these very networks, "
        "whether the label is wrong or not."
    )
    return _text(text) + _verdicts(labels["doubted_test_images"], dataset.test_images, "test")


def _accuracies(labels: dict[str, Any]) -> str:
    accuracies = labels["test_accuracy"]
    rows = [
        [str((labels["seed"] + number) % 2**32), f"{a:.2%}", f"{b:.2%}", f"{100 * (b - a):+.2f}"]
        for number, (a, b) in enumerate(zip(accuracies["with"], accuracies["without"], strict=True))
    ]
    a, b = np.mean(accuracies["with"]), np.mean(accuracies["without"])
    rows.append(["mean", f"{a:.2%}", f"{b:.2%}", f"{100 * (b - a):+.2f}"])
    text = (
        f"Test accuracy after {labels['epochs']} epochs on all training images, and on those that "
        "are no suspects; all test images count."
    )
    return _text(text) + page.table(["seed", "with", "without", "difference, points"], rows)


if __name__ == "__main__":
    sys.exit(main())
