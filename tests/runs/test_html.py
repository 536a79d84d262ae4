"""A result shows itself in a notebook."""

import xml.etree.ElementTree as ET

import pytest

from fmnist_jax.runs.html import render_result

LINES = [{"split": "train", "epoch": epoch, "loss": 1 / epoch, "accuracy": 0.9} for epoch in (1, 2)]
REPORT = {
    "arch": "<small>", "seed": 3, "test_accuracy": 0.9123, "val_accuracy": None,
    "train_accuracy": 0.95,
}  # fmt: skip


@pytest.mark.parametrize("sample", [False, True])
def test_accuracies_and_curves(sample):
    root = ET.fromstring(render_result(REPORT | {"sample": sample}, LINES))
    text = " ".join(root.itertext())
    for expected in ("<small>, seed 3", "91.23%", "none", "95.00%"):
        assert expected in text
    assert ("embedded sample" in text) == sample
    pictures = [image.attrib for image in root.iter("img")]
    assert [picture["alt"] for picture in pictures] == ["loss by epoch", "accuracy by epoch"]
    assert all(picture["src"].startswith("data:image/png;base64,iVBO") for picture in pictures)
    assert len({picture["src"] for picture in pictures}) == 2
