"""Classifies pictures with a trained network.

    python experiments/predict.py runs/mine photo.png folder/
    python experiments/predict.py runs/mine folder/ --json > predictions.jsonl

Reads PNG, JPEG and WebP of any size and colour, and IDX files. The article is cut out of a plain
background, light or dark, and reduced to the format of Fashion-MNIST. A contact sheet shows what
the network saw. A file that cannot be read is reported, and the others are classified.

Exit status: 0 done, 1 a file could not be read, 2 bad usage or bad input.
"""

import signal

# Nothing needs to be saved, so Ctrl-C ends the process.
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import argparse
import itertools
import json
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cli
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

import fmnist_jax as fm
from fmnist_jax.errors import ConfigError, DataError
from fmnist_jax.export.pictures import SIZE, SUFFIXES, Picture, read_pictures
from fmnist_jax.runs.files import make_folder

# A contact sheet with more pictures is slow to draw and hard to read.
MAX_SHOWN = 60

# Letters that fit over a picture of the contact sheet.
MAX_NAME = 18

NUM_TOP = 3


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status."""
    return cli.run(_run, create_parser().parse_args(argv))


def create_parser() -> argparse.ArgumentParser:
    """Creates the parser of the command line."""
    parser = cli.Parser(description="Classifies pictures with a trained network.")
    cli.add_network_arguments(parser)
    parser.add_argument("paths", type=Path, nargs="+", metavar="FILE", help="files and folders")
    parser.add_argument("--json", action="store_true", help="print a JSON object for each picture")
    parser.add_argument(
        "--sheet", type=Path, metavar="PNG", help="contact sheet; default: sheet.png in RUN"
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        metavar="int",
        default=256,
        help="pictures in memory at once (%(default)s)",
    )
    cli.add_output_flags(parser)
    return parser


def _run(arguments: argparse.Namespace, console: Console) -> int:
    if arguments.batch_size < 1:
        raise ConfigError(f"--batch-size is {arguments.batch_size}; expected at least 1")
    if arguments.sheet is not None and arguments.sheet.suffix.lower() != ".png":
        raise ConfigError(f"--sheet is {arguments.sheet}; expected a name that ends in .png")
    classifier = cli.load_classifier(arguments)
    paths, num_skipped = _files(arguments.paths)
    if not paths:
        raise ConfigError(f"there is no picture; expected files that end in {', '.join(SUFFIXES)}")

    base = os.path.commonpath(
        [path.absolute() if path.is_dir() else path.absolute().parent for path in arguments.paths]
    )
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("file", overflow="fold", min_width=20)
    for heading in ("class", *(f"{number}." for number in range(2, NUM_TOP + 1)), "inverted"):
        table.add_column(heading, no_wrap=True)
    shown: list[tuple[Picture, str]] = []
    num_pictures = num_errors = 0
    errors = cli.CommandConsole(stderr=True, highlight=False)
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=errors,
        transient=True,
        disable=arguments.quiet or len(paths) < arguments.batch_size,
    )
    with progress:
        task = progress.add_task("files", total=len(paths))
        results = _classify(classifier, paths, arguments.batch_size, lambda: progress.advance(task))
        for picture, outcome in results:
            if isinstance(outcome, DataError):
                num_errors += 1
                error = str(outcome).removeprefix(f"{picture}: ")
                if arguments.json:
                    print(json.dumps({"file": str(picture), "error": error}))
                else:
                    errors.print(f"error: {picture}: {error}", style="red", soft_wrap=True)
                continue
            assert isinstance(picture, Picture)
            num_pictures += 1
            top = np.argsort(-outcome, kind="stable")[:NUM_TOP]
            names = [(classifier.class_names[index], float(outcome[index])) for index in top]
            if arguments.json:
                print(json.dumps(_json(picture, names)))
            else:
                cells = [f"{name} {probability:.0%}" for name, probability in names]
                name = Text(os.path.relpath(picture.name, base))
                table.add_row(name, *cells, "yes" if picture.inverted else "no")
            if len(shown) < MAX_SHOWN:
                shown.append((picture, f"{names[0][0]} {names[0][1]:.0%}"))
    if table.row_count:
        console.print(table, highlight=False)
    if shown and (arguments.sheet is not None or not arguments.json):
        sheet = arguments.sheet or arguments.run / "sheet.png"
        note = f"{sheet} shows what the network saw" + (
            f" of the first {MAX_SHOWN} pictures." if len(shown) == MAX_SHOWN else "."
        )
        try:
            _draw(shown, sheet)
        except OSError as error:
            if arguments.sheet is not None:
                raise
            note = f"The contact sheet was not written: {sheet}: {error.strerror}."
        # The standard output of --json has objects only.
        notes = errors if arguments.json else console
        if not arguments.quiet:
            notes.print(note, highlight=False, soft_wrap=True)
    if (num_errors or num_skipped) and not arguments.json:
        console.print(
            f"{num_pictures:,} pictures were classified, {num_errors:,} files could not be read, "
            f"and {num_skipped:,} files of other types were skipped.",
            soft_wrap=True,
        )
    return 1 if num_errors else 0


def _files(paths: Sequence[Path]) -> tuple[list[Path], int]:
    """Returns the files themselves, the pictures in folders, and the number of other files there.

    Folders are searched with their subfolders.
    """
    chosen, num_skipped = [], 0
    for path in paths:
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.is_file())
            pictures = [file for file in files if file.name.lower().endswith(SUFFIXES)]
            chosen += pictures
            num_skipped += len(files) - len(pictures)
        else:
            chosen.append(path)
    return chosen, num_skipped


def _classify(
    classifier: fm.Classifier, paths: Sequence[Path], batch_size: int, on_file: Any
) -> Iterator[tuple[Picture | Path, np.ndarray | DataError]]:
    """Yields pictures with probabilities and files with errors, in order, batch by batch."""
    stream = _read(paths, on_file)
    while batch := list(itertools.islice(stream, batch_size)):
        pictures = [item for item, error in batch if error is None]
        # Batches of one size, so that one program serves all.
        size = batch_size if len(paths) > batch_size else len(pictures)
        images = np.zeros((size, SIZE, SIZE), np.uint8)
        for number, picture in enumerate(pictures):
            images[number] = picture.image
        probabilities = iter(_probabilities(classifier, images, pictures))
        for item, error in batch:
            yield item, next(probabilities) if error is None else error


def _probabilities(
    classifier: fm.Classifier, images: np.ndarray, pictures: Sequence[Picture]
) -> np.ndarray:
    """Returns the means over each picture and its mirror image; originals are left as they are.

    The shoes of Fashion-MNIST point to the left.
    """
    if not pictures:
        return np.zeros((0, len(classifier.class_names)), np.float32)
    plain = classifier.probabilities(images)[: len(pictures)]
    is_original = np.array([picture.is_original for picture in pictures])
    if is_original.all():
        return plain
    mirrored = classifier.probabilities(images[:, :, ::-1])[: len(pictures)]
    return np.where(is_original[:, None], plain, (plain + mirrored) / 2)


def _read(paths: Sequence[Path], on_file: Any) -> Iterator[tuple[Any, DataError | None]]:
    for path in paths:
        try:
            for picture in read_pictures(path):
                yield picture, None
        except DataError as error:
            yield path, error
        on_file()


def _json(picture: Picture, names: list[tuple[str, float]]) -> dict[str, Any]:
    return {
        "file": picture.name,
        "class": names[0][0],
        "probability": names[0][1],
        "top": [{"class": name, "probability": probability} for name, probability in names],
        "inverted": picture.inverted,
    }


def _draw(shown: Sequence[tuple[Picture, str]], path: Path) -> None:
    """Draws a contact sheet."""
    from matplotlib.figure import Figure  # it takes a second to import

    columns = min(len(shown), 10)
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(1.3 * columns, 1.6 * rows), layout="constrained")
    for axes in figure.subplots(rows, columns, squeeze=False).flat:
        axes.set_axis_off()
    for axes, (picture, label) in zip(figure.axes, shown, strict=False):
        axes.imshow(picture.image, cmap="gray", vmin=0, vmax=255)
        name = Path(picture.name).name
        name = name if len(name) <= MAX_NAME else f"…{name[1 - MAX_NAME :]}"
        name = name.encode(errors="replace").decode()  # not all bytes of a name are text
        axes.set_title(f"{name}\n{label}", fontsize=6, parse_math=False)
    make_folder(path.absolute().parent)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(path, dpi=144)


if __name__ == "__main__":
    sys.exit(main())
