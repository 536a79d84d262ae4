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


def test_layers():
    layer = {"layer": "<Dense>", "operations": ["dot", "add"], "shape": [3, 10], "params": 7850}
    page = render_result(REPORT | {"sample": False, "network": [layer | {"flops": 15690}]}, LINES)
    rows = [[cell.text for cell in row] for row in ET.fromstring(page).iter("tr")]
    assert ["<Dense>", "dot, add", "3 x 10", "7,850", "15,690"] in rows
    assert rows[-1] == ["all", None, None, "7,850", "15,690"]


def test_name_of_a_network_of_the_user_is_short():
    page = render_result(REPORT | {"sample": False, "arch": "/home/me/nets.py:Net"}, LINES)
    assert ">Net, seed 3<" in page
