"""`fmnist-jax predict`: classifies pictures with a trained network.

    fmnist-jax predict runs/mine photo.png folder/
    fmnist-jax predict runs/mine folder/ --json > predictions.jsonl

Reads PNG, JPEG and WebP of any size and colour, and IDX files. Pictures are resized to the training
images. For a network that was trained on Fashion-MNIST, the article is cut out of a plain
background, light or dark, and reduced to its format. A contact sheet shows the input of the
network. A file that cannot be read is reported, and the others are classified.

Exit status: 0 done, 1 a file could not be read, 2 bad usage or bad input.
"""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from fmnist_jax.commands import flags, shell
from fmnist_jax.data.pictures import SUFFIXES, Picture
from fmnist_jax.errors import ConfigError, DataError
from fmnist_jax.runs import files
from fmnist_jax.runs.classifier import Classifier, classify_files

# A contact sheet with more pictures is slow to draw and hard to read.
MAX_SHOWN = 60

NUM_TOP = 3

# Longer names of classes are wrapped in the table, so that the file names keep some space, and cut
# in the contact sheet.
_MAX_NAME = 12


def create_parser() -> argparse.ArgumentParser:
    """Creates the parser of the command line."""
    parser = flags.Parser(description="Classifies pictures with a trained network.")
    flags.add_network_arguments(parser)
    parser.add_argument("paths", type=Path, nargs="+", metavar="FILE", help="files and folders")
    parser.add_argument("--json", action="store_true", help="print a JSON object for each picture")
    parser.add_argument(
        "--sheet", type=Path, metavar="PNG", help="contact sheet; default: sheet.png in RUN"
    )
    parser.add_argument(
        "--batch-size", type=int, metavar="N", default=256, help="pictures in memory (%(default)s)"
    )
    flags.add_output_flags(parser)
    return parser


def _run(arguments: argparse.Namespace, console: Console) -> int:
    if arguments.batch_size < 1:
        raise ConfigError(f"--batch-size is {arguments.batch_size}; expected at least 1")
    if arguments.sheet is not None and arguments.sheet.suffix.lower() != ".png":
        raise ConfigError(f"--sheet is {arguments.sheet}; expected a name that ends in .png")
    classifier = flags.load_classifier(arguments)
    paths, num_skipped = _files(arguments.paths)
    if not paths:
        raise ConfigError(f"no picture was found; expected files that end in {', '.join(SUFFIXES)}")
    errors = shell.CommandConsole(stderr=True, highlight=False)
    output = _Output(arguments, classifier, errors)
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
        for picture, outcome in classify_files(
            classifier, paths, arguments.batch_size, lambda: progress.advance(task)
        ):
            output.add(picture, outcome)
    if output.table.row_count:
        console.print(output.table, highlight=False)
    if output.shown and (arguments.sheet is not None or not arguments.json):
        note = _write_sheet(output.shown, arguments)
        # The standard output of --json has objects only.
        notes = errors if arguments.json else console
        if not arguments.quiet:
            notes.print(note, highlight=False, soft_wrap=True)
    if (output.num_errors or num_skipped) and not arguments.json:
        console.print(
            f"Pictures classified: {output.num_pictures:,}; unreadable files: "
            f"{output.num_errors:,}; files of other types, skipped: {num_skipped:,}.",
            soft_wrap=True,
        )
    return 1 if output.num_errors else 0


class _Output:
    """Prints objects and errors as they come; collects the table and the contact sheet."""

    def __init__(
        self, arguments: argparse.Namespace, classifier: Classifier, errors: Console
    ) -> None:
        self._json, self._errors, self._classifier = arguments.json, errors, classifier
        self._base = os.path.commonpath(
            [
                path.absolute() if path.is_dir() else path.absolute().parent
                for path in arguments.paths
            ]
        )
        self.table = Table(box=None, padding=(0, 2, 0, 0))
        self.table.add_column("file", overflow="fold", min_width=20)
        places = range(2, min(NUM_TOP, len(classifier.class_names)) + 1)
        last = ("inverted",) if classifier.prepares_articles else ()
        is_short = all(len(name) <= _MAX_NAME for name in classifier.class_names)
        for heading in ("class", *(f"{place}." for place in places), *last):
            self.table.add_column(heading, no_wrap=is_short, overflow="fold")
        self.shown: list[tuple[Picture, str]] = []
        self.num_pictures = self.num_errors = 0

    def add(self, picture: Picture | Path, outcome: np.ndarray | DataError) -> None:
        """Adds a picture with its probabilities, or a file with its error."""
        if isinstance(outcome, DataError):
            self.num_errors += 1
            error = str(outcome).removeprefix(f"{picture}: ")
            if self._json:
                print(json.dumps({"file": str(picture), "error": error}))
            else:
                self._errors.print(f"error: {picture}: {error}", style="red", soft_wrap=True)
            return
        assert isinstance(picture, Picture)
        self.num_pictures += 1
        top = np.argsort(-outcome, kind="stable")[:NUM_TOP]
        names = [(self._classifier.class_names[index], float(outcome[index])) for index in top]
        if self._json:
            print(json.dumps(_json(picture, names)))
        else:
            cells = [f"{name} {probability:.0%}" for name, probability in names]
            name = Text(os.path.relpath(picture.name, self._base))
            inverted = ["yes" if picture.inverted else "no"] * self._classifier.prepares_articles
            self.table.add_row(name, *cells, *inverted)
        if len(self.shown) < MAX_SHOWN:
            self.shown.append((picture, f"{names[0][0][:_MAX_NAME]} {names[0][1]:.0%}"))


def _json(picture: Picture, names: list[tuple[str, float]]) -> dict[str, Any]:
    return {
        "file": picture.name,
        "class": names[0][0],
        "probability": names[0][1],
        "top": [{"class": name, "probability": probability} for name, probability in names],
        "inverted": picture.inverted,
    }


def _files(paths: Sequence[Path]) -> tuple[list[Path], int]:
    """Returns the files themselves, the pictures in folders, and the number of other files there.

    Folders are searched with their subfolders and with those that they link to, each once. A folder
    or a link that cannot be read is returned as a picture, so that its error is shown.
    """
    chosen, unreadable, seen = [], [], set()
    num_skipped = 0

    def note(error: OSError) -> None:
        unreadable.append(Path(error.filename))

    for path in paths:
        if not path.is_dir():
            chosen.append(path)
            continue
        found = []
        for folder, subfolders, names in os.walk(path, onerror=note, followlinks=True):
            identity = os.path.realpath(folder)
            if identity in seen:
                subfolders.clear()
            else:
                found += [Path(folder, name) for name in names]
            seen.add(identity)
        pictures = [file for file in found if file.name.lower().endswith(SUFFIXES)]
        chosen += sorted(pictures)
        num_skipped += len(found) - len(pictures)
    return chosen + unreadable, num_skipped


def _write_sheet(shown: Sequence[tuple[Picture, str]], arguments: argparse.Namespace) -> str:
    """Draws a contact sheet; returns a note about it."""
    from fmnist_jax.analysis import plots  # matplotlib takes a second to import

    path = arguments.sheet or arguments.run / "sheet.png"
    images = np.array([picture.image for picture, _ in shown])
    titles = [f"{Path(picture.name).name}\n{label}" for picture, label in shown]
    try:
        files.make_folder(path.absolute().parent)
        files.write_bytes(path, plots.encode(plots.contact_sheet(images, titles)))
    except OSError as error:
        if arguments.sheet is not None:
            raise
        return f"The contact sheet was not written: {path}: {error.strerror}."
    first = f" of the first {MAX_SHOWN} pictures" if len(shown) == MAX_SHOWN else ""
    return f"{path} shows the input of the network{first}."


main = shell.main_of(_run, create_parser)
