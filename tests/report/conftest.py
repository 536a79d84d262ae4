"""Small synthetic files of a run, and reading a page back."""

import dataclasses
import html
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import fmnist_jax as fm
from fmnist_jax.data.sources import PUBLISHED_SHA256
from fmnist_jax.digest import sha256_bytes
from fmnist_jax.runs import files

CLASSES = ("Bag", "Coat", "Dress")
PUBLISHED = sha256_bytes("".join(PUBLISHED_SHA256).encode())
NETWORK: list[dict[str, Any]] = [
    {"layer": "input", "inputs": [], "operations": [], "shape": [8, 8, 1], "params": 0, "flops": 0},
    {"layer": "Dense_0", "inputs": [0], "operations": ["dot", "add"], "shape": [3],
     "params": 56789, "flops": 98765},
]  # fmt: skip


def write_run(workdir: Path, *, augmented: bool = False, **changes: Any) -> dict[str, Any]:
    """Writes the files of a finished run and returns its report; all numbers are arbitrary."""
    rng = np.random.default_rng(len(str(workdir.name)))
    epochs = changes.get("epochs", 2)
    recipe = dataclasses.replace(fm.RECIPES["small_dropout"], epochs=epochs, dropout=0.25)
    n, side = 40, 8
    names = changes.get("data", {}).get("classes", CLASSES)
    report: dict[str, Any] = {
        "sample": False,
        "arch": "small_dropout",
        "recipe": dataclasses.asdict(recipe),
        "seed": 17,
        "epochs": epochs,
        "steps": 1234,
        "params": 56789,
        "network": NETWORK,
        "train_accuracy": 0.91234,
        "val_accuracy": 0.92344,
        "test_accuracy": 0.93456,
        "test_loss": 0.45678,
        "test_balanced_accuracy": 0.81234,
        "test_macro_f1": 0.71234,
        "test_auc": 0.98765,
        "test_intervals": {
            "test_balanced_accuracy": [0.80123, 0.82345],
            "test_macro_f1": [None, None],
            "test_auc": [0.97654, 0.99876],
        },
        "tta_accuracy": 0.94567,
        "calibration": {
            "ece": 0.01234, "ece_low": 0.00456, "ece_high": 0.02346, "aurc": 0.00789,
            "temperature": 1.35791, "ece_scaled": 0.00876, "loss_scaled": 0.34567,
        },
        "classes": [
            {"name": name, "precision": p, "recall": r, "f1": f, "support": int(s)}
            for name, (p, r, f), s in zip(
                names, rng.random((3, 3)).tolist(), rng.integers(1000, 9999, 3), strict=True
            )
        ],
        "confusion_matrix": rng.integers(1, 900, (3, 3)).tolist(),
        "compile_seconds": 9.87,
        "train_seconds": 4321.4,
        "images_per_second": 8765.4,
        "data": {
            "source": "somewhere", "sha256": PUBLISHED, "train": 11111, "val": 2222,
            "excluded": 333, "test": 4444, "classes": list(names),
        },
        "params_sha256": "b" * 64,
        "versions": {"jax": "1.2.3", "numpy": "4.5.6"},
        "device": "a processor",
    } | changes  # fmt: skip
    history = [
        {"split": split, "epoch": epoch, "loss": float(loss), "accuracy": float(accuracy)}
        for epoch in range(1, epochs + 1)
        for split in (("train", "val") if report["val_accuracy"] is not None else ("train",))
        for loss, accuracy in [rng.random(2)]
    ]
    images = rng.integers(0, 256, (6, side, side), np.uint8)
    examples = {
        "sample_images": images, "sample_labels": np.arange(6) % 3,
        "worst_images": images[:2], "worst_indices": np.array([705, 702]),
    }  # fmt: skip
    if augmented:
        examples |= {"originals": images[:1], "augmented": rng.random((1, 2, side, side))}
    workdir.mkdir(exist_ok=True)
    files.write_json(workdir / files.REPORT, report)
    files.write_lines(workdir / files.METRICS, history)
    files.write_arrays(
        workdir / files.PREDICTIONS, logits=rng.normal(size=(n, 3)), labels=rng.integers(0, 3, n),
        indices=np.arange(700, 700 + n),
    )  # fmt: skip
    files.write_arrays(workdir / files.EXAMPLES, **examples)
    return report


class Page(NamedTuple):
    """What a reader sees.

    Attributes:
      text: the HTML, its pictures left out.
      words: the text of the page, tags left out.
      title: as the browser shows it.
      pictures: the data URL of each.
      captions: alternative text of each.
      headings: of its sections.
      numbers: the large numbers by name.
      rows: the cells of each row of its tables.
    """

    text: str
    words: str
    title: str
    pictures: list[str]
    captions: list[str]
    headings: list[str]
    numbers: dict[str, str]
    rows: list[list[str]]

    def fact(self, name: str) -> str:
        (value,) = [row[1] for row in self.rows if row[0] == name]
        return value


def read_page(path: Path) -> Page:
    text = path.read_text()
    pictures = re.findall(r'src="([^"]*)"', text)
    text = re.sub(r'src="data:image/png;base64,[A-Za-z0-9+/=]+"', "", text)
    rows = re.findall(r"<tr>(.*?)</tr>", text, re.DOTALL)
    return Page(
        text,
        _plain(re.sub(r"<[^>]*>", " ", text)),
        _plain(re.findall(r"<title>(.*?)</title>", text)[0]),
        pictures,
        [_plain(alt) for alt in re.findall(r'alt="([^"]*)"', text)],
        [_plain(heading) for heading in re.findall(r"<h[12]>(.*?)</h[12]>", text)],
        {
            _plain(name): _plain(n)
            for n, name in re.findall(r"<b>(.*?)</b><span>(.*?)</span>", text)
        },
        [
            [_plain(cell) for cell in re.findall(r"<t[hd]>(.*?)</t[hd]>", row, re.DOTALL)]
            for row in rows
        ],
    )


def check_self_contained(page: Page) -> None:
    """Fails if a browser would load anything else to show the page."""
    assert page.pictures
    assert all(source.startswith("data:image/png;base64,") for source in page.pictures)
    for word in ("http:", "https:", "//", "src=", "href=", "url(", "@import", "<script", "<link"):
        assert word not in page.text


def _plain(text: str) -> str:
    return html.unescape(" ".join(text.split()))
