"""audit.html: every number is that of audit.json."""

import base64
import dataclasses
import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

import fmnist_jax as fm
from fmnist_jax.report.audit import write_audit
from tests.report.conftest import CLASSES, check_self_contained, read_page


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (30, 8, 8), np.uint8)
    labels = np.arange(30) % 3
    return fm.Dataset(images[:20], labels[:20], images[20:], labels[20:], class_names=CLASSES)


DISTANCES = {"test": np.linspace(0.05, 0.9, 10), "train": np.linspace(0.1, 0.8, 10)}


def pixels(images, base):
    return {"images": images, "mean": base, "std": base + 0.1, "zero_share": base + 0.2}


def audit_of(data, *, labels=True):
    """The content of audit.json; all numbers are arbitrary."""
    issue: dict[str, Any] = {"label": "Bag", "predicted": "Coat"}
    issue |= {"label_probability": 0.0123, "other_probability": 0.9876}
    return {
        "data": {"source": data.source, "sha256": data.sha256, "sample": data.sample},
        "splits": {
            "train": pixels(11111, 0.11111)
            | {"by_class": [{"name": n} | pixels(100 + i, 0.1 * i) for i, n in enumerate(CLASSES)]},
            # No test image is a dress.
            "test": pixels(2222, 0.22222)
            | {"by_class": [{"name": n} | pixels(200, 0.5) for n in CLASSES[:2]]},
        },
        "exact_duplicates": [
            [
                {"split": "train", "index": 7, "label": "Bag"},
                {"split": "test", "index": 3, "label": "Coat"},
                {"split": "test", "index": 4, "label": "Dress"},
            ]
        ],
        "near_duplicates": {
            "threshold": 0.125,
            "pairs": [
                {
                    "test": test, "train": 8, "distance": 0.0625, "mirrored": test == 2,
                    "test_label": "Bag", "train_label": "Coat",
                }
                for test in (1, 2)
            ],
            "with_another_label": 22,
            "compared_within_training": 3333,
            "near_within_training": 44,
        },
        "labels": {
            "arch": "small_dropout",
            "folds": 4,
            "epochs": 5,
            "seed": 2**32 - 1,
            "out_of_fold_accuracy": 0.87654,
            "issues": [issue | {"index": i, "forgotten": i - 5} for i in (5, 6)],
            "forgotten": {
                "issues": 1.2345,
                "others": None,
                "never_learned": 555,
                "never_learned_issues": 66,
            },
            "test_accuracy": {"with": [0.8, 0.9], "without": [0.82, 0.89]},
            "ensemble_test_accuracy": 0.91234,
            "ensemble_test_accuracy_without_doubtful": 0.92345,
            "doubtful_below": 0.015625,
            "doubtful_test_images": [issue | {"index": 9}],
        }
        if labels
        else None,
    }  # fmt: skip


def test_numbers_are_those_of_the_file(data, tmp_path):
    page = read_page(write_audit(tmp_path, audit_of(data), data, DISTANCES))
    check_self_contained(page)
    assert 'class="warning"' not in page.text
    assert page.numbers == {
        "Training images": "11,111",
        "Test images": "2,222",
        "Groups of exact duplicates": "1",
        "Test images with a near-duplicate in training": "2",
        "Label issues in training": "2",
        "Out-of-fold accuracy": "87.65%",
    }
    for row in (
        ["Bag", "100", "200", "0.000", "0.100", "20.00%"],
        ["Coat", "101", "200", "0.100", "0.200", "30.00%"],
        ["Dress", "102", "0", "0.200", "0.300", "40.00%"],
        ["All, training", "11,111", "", "0.111", "0.211", "31.11%"],
        ["All, test", "", "2,222", "0.222", "0.322", "42.22%"],
        ["4294967295", "80.00%", "82.00%", "+2.00"],
        ["0", "90.00%", "89.00%", "-1.00"],
        ["Mean", "85.00%", "85.50%", "+0.50"],
        ["Data", "arrays"],
        ["SHA-256", data.sha256],
    ):
        assert row in page.rows
    text = " ".join(page.text.split())
    for expected in (
        "Data: arrays.",
        "train 7: Bag<br>test 3: Coat<br>test 4: Dress",
        "closer than 0.125 times their own norm: 2; pairs with different labels: 22.",
        "first 3,333 training images", "images: 44.",
        "test 1: Bag<br>train 8: Coat<br>distance 0.062<",
        "test 2: Bag<br>train 8: Coat<br>distance 0.062, mirrored<",
        "4-fold cross-validation: small_dropout, 5 epochs per fold. Label issues, whose",
        "the average of that class: 2 images.",
        "After 5 epochs on all training images",
        "Not classified correctly at the end of any epoch: 555 images, 66 of them",
        "1.23 for label issues, none for the other images",
        "train 5<br>Bag 1.2%<br>predicted Coat 98.8%<",
        "train 6<br>Bag 1.2%<br>predicted Coat 98.8%<br>forgetting events: 1<",
        "Doubtful: 1 test image whose label has a probability below 0.015625",
        "91.23% on all test images and 92.34% without the doubtful ones",
        "test 9<br>Bag 1.2%<br>predicted Coat 98.8%<",
    ):  # fmt: skip
        assert expected in text
    # Three means, one pair of exact and two of near-duplicates, a histogram, three issues.
    assert len(page.pictures) == 3 + 2 + 4 + 1 + 3


def test_audit_of_the_sample_says_so(data, tmp_path):
    sample = dataclasses.replace(data, sample=True)
    page = read_page(write_audit(tmp_path, audit_of(sample, labels=False), sample, DISTANCES))
    assert page.text.count("Audit of the embedded sample") == 1
    assert not any("abel" in heading for heading in page.headings)


def test_hostile_text_is_escaped(data, tmp_path):
    hostile = "<script>alert(1)</script>"
    data = dataclasses.replace(data, class_names=(hostile, "b", "c"), source=hostile)
    audit = audit_of(data)
    for row in (
        audit["exact_duplicates"][0][0], audit["labels"]["issues"][0],
        audit["labels"]["doubtful_test_images"][0], audit["splits"]["train"]["by_class"][0],
    ):  # fmt: skip
        row.update({key: hostile for key in ("label", "name", "predicted") if key in row})
    check_self_contained(read_page(write_audit(tmp_path, audit, data, DISTANCES)))


def test_audit_of_other_data_in_colour(tmp_path):
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (30, 100, 200, 3), np.uint8), np.arange(30) % 3
    other = fm.Dataset(
        images[:20], labels[:20], images[20:], labels[20:], class_names=CLASSES, source="a folder"
    )
    page = read_page(write_audit(tmp_path, audit_of(other), other, DISTANCES))
    check_self_contained(page)
    assert page.title == page.headings[0] == "Audit of a folder"
    assert "Fashion-MNIST" not in page.text
    assert page.text.count('class=" photo"') == len(page.pictures) - 1
    content = base64.b64decode(page.pictures[3].partition(",")[2])
    with Image.open(io.BytesIO(content)) as picture:
        assert (picture.mode, picture.size) == ("RGB", (136, 68))
        expected = images[7].mean(axis=(0, 1))
        np.testing.assert_allclose(np.asarray(picture).mean(axis=(0, 1)), expected, atol=2)


def test_grey_thumbnails_are_dark_on_white(data, tmp_path):
    page = read_page(write_audit(tmp_path, audit_of(data), data, DISTANCES))
    content = base64.b64decode(page.pictures[3].partition(",")[2])
    with Image.open(io.BytesIO(content)) as picture:
        np.testing.assert_array_equal(picture, 255 - data.train_images[7])


def test_fashion_mnist_is_named(data, tmp_path):
    sha256 = fm.load_fashion_mnist(sample=True).sha256
    named = dataclasses.replace(data, sha256=sha256, source="somewhere")
    page = read_page(write_audit(tmp_path, audit_of(named), named, DISTANCES))
    assert page.title == "Audit of Fashion-MNIST"


def test_means_of_many_classes_are_bounded(data, tmp_path):
    labels = np.arange(100)
    images = np.random.default_rng(0).integers(0, 256, (100, 8, 8), np.uint8)
    names = tuple(f"class {number}" for number in range(100))
    many = fm.Dataset(images, labels, images[:2], labels[:2], class_names=names)
    audit = audit_of(many, labels=False) | {"exact_duplicates": []}
    audit["near_duplicates"]["pairs"] = []
    page = read_page(write_audit(tmp_path, audit, many, DISTANCES))
    assert len(page.pictures) == 60 + 1
    assert "mean training image of the first classes" in page.words
