"""The report: made from files alone, complete, self-contained."""

import dataclasses
import re
import shutil

import pytest

import fmnist_jax as fm
from fmnist_jax.report import run_page as report


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, tiny):
    recipe = dataclasses.replace(
        fm.RECIPES["small_dropout"], epochs=2, batch_size=16, augmentation="keras"
    )
    place = tmp_path_factory.mktemp("report") / "run"
    fm.fit(fm.Run(recipe=recipe, workdir=place), tiny, progress=fm.Silence())
    return place


def test_the_report_needs_the_files_and_nothing_else(workdir, tmp_path):
    moved = shutil.copytree(workdir, tmp_path / "moved", ignore=lambda *_: ["checkpoints"])
    page = report.write_report(moved)
    names = {path.name for path in (moved / "plots").iterdir()}
    assert names == {
        "loss.png", "accuracy.png", "confusion.png", "samples.png", "augmented.png", "worst.png",
        "reliability.png", "risk.png",
    }  # fmt: skip
    text = page.read_text()
    # Self-contained: no address but its own pictures, none of them missing.
    sources = re.findall(r'(?:src|href)="([^"]{0,40})', text)
    assert len(sources) == 8
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    for expected in (
        "small_dropout", "test 91.33%, validation 90.62%", "241,546", "T-shirt/top", "Ankle boot",
        "temperature", "six views", "precision", "recall", "Most confused pairs",
        "width=device-width",
    ):  # fmt: skip
        assert expected in text
    assert "no results" not in text


def test_a_run_on_the_sample_says_so(sample, tmp_path):
    recipe = dataclasses.replace(fm.RECIPES["valid_2x2"], epochs=1, batch_size=16)
    run = fm.Run(recipe=recipe, workdir=tmp_path, train_examples=32)
    fm.fit(run, fm.select_classes(sample, ["bag", "coat"]), progress=fm.Silence())
    text = report.write_report(tmp_path).read_text()
    assert "These accuracies are no results." in text
    assert not (tmp_path / "plots" / "augmented.png").exists()
    assert "2 classes of Fashion-MNIST" in text


def test_a_class_name_cannot_break_the_page(tiny, tmp_path):
    names = ("<script>alert(1)</script>", *fm.CLASS_NAMES[1:])
    recipe = dataclasses.replace(fm.RECIPES["valid_2x2"], epochs=1, batch_size=16)
    dataset = dataclasses.replace(tiny, class_names=names)
    fm.fit(fm.Run(recipe=recipe, workdir=tmp_path), dataset, progress=fm.Silence())
    text = report.write_report(tmp_path).read_text()
    assert "<script>" not in text
    assert "&lt;script&gt;" in text


def test_an_unfinished_run_has_no_report(tmp_path):
    with pytest.raises(fm.DamagedFileError, match="no finished run"):
        report.write_report(tmp_path)


@pytest.mark.parametrize(
    "name", ["report.json", "metrics.jsonl", "predictions.npz", "examples.npz"]
)
@pytest.mark.parametrize("length", [0, 40])
def test_damaged_files_are_named(name, length, workdir, tmp_path):
    moved = shutil.copytree(workdir, tmp_path / "moved", ignore=lambda *_: ["checkpoints"])
    content = (moved / name).read_bytes()
    (moved / name).write_bytes(content[:length] or b"{")
    with pytest.raises(fm.DamagedFileError, match=name):
        report.write_report(moved)


def test_most_confused_pairs():
    matrix = [[5, 1, 0, 7], [2, 9, 0, 0], [0, 0, 9, 0], [1, 0, 4, 2]]
    pairs = report.most_confused(
        {"data": {"classes": ["a", "b", "c", "d"]}, "confusion_matrix": matrix}
    )
    assert pairs == [("a", "d", 8), ("c", "d", 4), ("a", "b", 3)]
