"""A result shows itself in a notebook."""

import xml.etree.ElementTree as ET

from fmnist_jax.runs.html import describe_run

LINES = [
    {"split": split, "epoch": epoch, "loss": loss, "accuracy": 1 - loss}
    for epoch, (train, val) in enumerate([(0.9, 0.8), (0.5, 0.6), (0.3, 0.5)], 1)
    for split, loss in (("train", train), ("val", val))
]
REPORT = {
    "arch": "<small>", "seed": 3, "sample": True,
    "test_accuracy": 0.9123, "val_accuracy": None, "train_accuracy": 0.95,
}  # fmt: skip


def test_figures_and_curves():
    root = ET.fromstring(describe_run(REPORT, LINES))
    text = " ".join(root.itertext())
    for expected in ("<small>, seed 3", "91.23%", "none", "no results", "0.3 to 0.9"):
        assert expected in text
    loss, accuracy = (svg.findall("polyline") for svg in root.iter("svg"))
    points = [tuple(map(float, point.split(","))) for point in loss[0].attrib["points"].split()]
    assert [x for x, _ in points] == [0, 130, 260]
    heights = [y for _, y in points]
    assert heights == sorted(heights)  # a loss that falls goes down
    assert (heights[0], heights[-1]) == (0, 130)
    assert len(accuracy[1].attrib["points"].split()) == 3
