"""`fmnist-jax audit`: examines class balance, pixels, duplicates and label issues.

Writes `audit.html`, `audit.json` and `label_issues.txt`, which `run --exclude` reads, into a
folder. Exit status: 0 done, 2 bad usage or bad input.
"""

import argparse
import functools
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

import fmnist_jax as fm
from fmnist_jax.commands import flags, shell
from fmnist_jax.data.sources import is_fashion_mnist
from fmnist_jax.report.audit import write_audit
from fmnist_jax.runs import files
from fmnist_jax.studies.audit import Track, audit_images, audit_labels


def create_parser() -> argparse.ArgumentParser:
    """Creates the parser of the command line."""
    parser = flags.Parser(
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
    flags.add_workdir_flag(parser, Path("runs/audit"), "folder of the files (%(default)s)")
    flags.add_output_flags(parser)
    flags.add_data_flags(parser)
    return parser


def _run(arguments: argparse.Namespace, console: Console) -> int:
    fm.create_streams(arguments.seed)  # refuses an invalid seed before any work
    dataset = flags.load_data(arguments, console)
    workdir = arguments.workdir
    with files.usable(workdir):
        files.make_folder(workdir)
    console.print(f"Data: {dataset.source}", highlight=False, soft_wrap=True)
    labels: dict[str, Any] | None = None
    if not arguments.skip_training:
        hooks = [fm.ConsoleProgress(console)]
        labels = audit_labels(dataset, arguments.folds, arguments.epochs, arguments.seed, hooks)

    def progress(text: str) -> Track:
        console.print(f"Comparing {text} ...", highlight=False)
        return functools.partial(
            track, description=text, console=console, transient=True,
            disable=not console.is_terminal,
        )  # fmt: skip

    audit, distances = audit_images(dataset, progress)
    audit["labels"] = labels
    if labels:
        is_published = is_fashion_mnist(dataset.sha256)
        source = "the published file" if is_published else "the training images"
        source = "the embedded sample" if dataset.sample else source
        lines = [
            f"# label issues of {len(dataset.train_labels)} training images: positions in "
            f"{source}, largest margin first; data SHA-256 {dataset.sha256}",
            *(str(issue["index"]) for issue in labels["issues"]),
        ]
        files.write_bytes(workdir / "label_issues.txt", ("\n".join(lines) + "\n").encode())
    files.write_json(workdir / "audit.json", audit)
    page = write_audit(workdir, audit, dataset, distances)
    console.print(f"The report is {page}.", highlight=False, soft_wrap=True)
    return 0


main = shell.main_of(_run, create_parser)
