"""The figures show the numbers they are given."""

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from matplotlib.text import Annotation

from fmnist_jax.analysis import calibration, plots
from tests.conftest import ROOT

HISTORY: list[dict[str, Any]] = [
    {"split": "train", "epoch": 1, "loss": 2.0, "accuracy": 0.3},
    {"split": "val", "epoch": 1, "loss": 1.5, "accuracy": 0.4},
    {"split": "train", "epoch": 2, "loss": 1.0, "accuracy": 0.6},
    {"split": "val", "epoch": 2, "loss": 0.5, "accuracy": 0.7},
]


def lines(figure, axes=0):
    """The curves of a figure by label."""
    return {line.get_label(): line.get_xydata().T for line in figure.axes[axes].lines}


@pytest.fixture
def predictions():
    rng = np.random.default_rng(0)
    return 3 * rng.normal(size=(500, 3)), rng.integers(0, 3, 500)


@pytest.mark.parametrize(
    ("metric", "train", "val"), [("loss", [2, 1], [1.5, 0.5]), ("accuracy", [0.3, 0.6], [0.4, 0.7])]
)
def test_learning_curve(metric, train, val):
    curves = lines(plots.learning_curve(HISTORY, metric))
    np.testing.assert_array_equal(curves["training"], [[1, 2], train])
    np.testing.assert_array_equal(curves["validation"], [[1, 2], val])


def test_learning_curve_without_validation():
    curves = lines(plots.learning_curve(HISTORY[::2], "loss"))
    assert list(curves) == ["training"]


@pytest.mark.parametrize("num_epochs", [1, 2, 30, 200])
def test_epoch_axis_has_whole_epochs_of_the_run(num_epochs):
    history = [HISTORY[0] | {"epoch": epoch} for epoch in range(1, num_epochs + 1)]
    for figure in (plots.learning_curve(history, "loss"), plots.seeds_curves([history], "train")):
        axes = figure.axes[0]
        low, high = axes.get_xlim()
        ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
        assert ticks
        assert set(ticks) <= set(range(1, num_epochs + 1))
        # A line through a single point is invisible.
        assert num_epochs > 1 or axes.lines[0].get_marker() == "o"


def test_seeds_curves_and_their_mean():
    other = [line | {"loss": line["loss"] + 1} for line in HISTORY]
    figure = plots.seeds_curves([HISTORY, other], "val")
    first, second, mean = (line.get_ydata() for line in figure.axes[0].lines)
    np.testing.assert_array_equal([first, second, mean], [[1.5, 0.5], [2.5, 1.5], [2, 1]])
    assert figure.axes[1].get_ylabel() == "validation accuracy"


def test_reliability_diagram_has_only_bins_of_ten_or_more(predictions):
    logits, labels = predictions
    curves = lines(plots.reliability_diagram(logits, labels, 2.0))
    for name, scale in (("uncalibrated", 1.0), ("temperature 2.00", 2.0)):
        bins = calibration.reliability(logits / scale, labels)
        shown = bins.num_examples >= 10
        assert 0 < shown.sum() < len(shown)
        np.testing.assert_array_equal(curves[name], [bins.confidence[shown], bins.accuracy[shown]])
    assert "temperature 2.00" not in lines(plots.reliability_diagram(logits, labels, None))


def test_risk_coverage_curve(predictions):
    curve = calibration.risk_coverage(*predictions)
    ((shown),) = lines(plots.risk_coverage_curve(*predictions)).values()
    np.testing.assert_array_equal(shown, [curve.coverage, curve.risk])


def test_confusion_matrix_has_labels_in_rows():
    axes = plots.confusion_matrix([[9, 1200], [0, 3]], ["a", "b"]).axes[0]
    texts = {tuple(text.get_position()): text.get_text() for text in axes.texts}
    assert texts == {(0, 0): "9", (1, 0): "1,200", (1, 1): "3"}
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("label", "prediction")


def test_worst_predictions_are_looked_up_by_index():
    predictions = {
        "logits": np.log([[0.9, 0.1], [0.2, 0.8]]), "labels": np.array([1, 0]),
        "indices": np.array([70, 71]),
    }  # fmt: skip
    examples = {"worst_images": np.zeros((2, 4, 4)), "worst_indices": np.array([71, 70])}
    figure = plots.worst_predictions(predictions, examples, ["a", "b"])
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == [
        "test image 71\na\npredicted b (80%)", "test image 70\nb\npredicted a (90%)", "", "", "",
    ]  # fmt: skip


def test_class_samples_are_sorted_by_class():
    images = np.arange(3, dtype=np.uint8)[:, None, None] * np.ones((1, 2, 2), np.uint8)
    figure = plots.class_samples(images, np.array([1, 0, 1]), ["a", "b"])
    shown = [
        [round(float(np.asarray(image.get_array())[0, 0]) * 255) for image in axes.images]
        for axes in figure.axes
    ]
    assert shown == [[1], [], [0], [2]]


def test_network_has_its_layers_from_top_to_bottom():
    figure = plots.network(LAYERS)
    boxes, params, flops = figure.axes
    texts = [text for text in boxes.texts if not isinstance(text, Annotation)]
    assert [text.get_text() for text in texts] == [
        "input", "28 x 28 x 1", "Conv_0", "26 x 26 x 8", "…lot/of/modules/Dense_with_a_$name", "10",
    ]  # fmt: skip
    assert [text.get_position()[1] for text in texts] == [0, 0, 1, 1, 2, 2]
    assert boxes.yaxis_inverted()
    for axes, values in ((params, [0, 80, 100]), (flops, [0, 2000, 30_000])):
        bars: Any = axes.patches
        assert [bar.get_width() for bar in bars] == values
        assert [bar.get_y() + bar.get_height() / 2 for bar in bars] == [0, 1, 2]
    assert [text.get_text() for text in flops.texts] == ["", "2,000", "30,000"]
    assert plots.encode(figure)


def test_network_has_an_arrow_from_each_input():
    arrows = [text for text in plots.network(LAYERS).axes[0].texts if isinstance(text, Annotation)]
    ends = [(round(arrow.xyann[1]), round(arrow.xy[1])) for arrow in arrows]
    assert ends == [(0, 1), (0, 2), (1, 2)]
    assert [arrow.xy[0] for arrow in arrows] == [0.5, 0, 0.5]  # one passes a layer on the left


def test_distance_histogram_counts_images_by_distance():
    distances = {"test": np.array([0.1, 0.505, 0.51]), "train": np.array([0.3])}
    axes = plots.distance_histogram(distances, 0.1).axes[0]
    steps = {
        patch.get_label(): np.asarray(patch.get_path().vertices)[:, 1] for patch in axes.patches
    }
    assert {name: heights.max() for name, heights in steps.items()} == {
        "test images": 2, "training images": 1,
    }  # fmt: skip
    assert axes.lines[0].get_xdata() == [0.1, 0.1]


def test_dollar_signs_in_class_names_are_plain_text():
    figure = plots.confusion_matrix([[1, 2], [3, 4]], ["$\\frac$", "$5"])
    assert plots.encode(figure, sample=False).startswith(b"\x89PNG")


def test_contact_sheet_has_the_ends_of_long_names():
    names = ["a.png", "/".join("abcdefghijklm") + ".png", "\udcff$\\frac.png", "日本😀.png"]
    images = np.arange(12, dtype=np.uint8)[:, None, None] * np.ones((1, 2, 2), np.uint8)
    figure = plots.contact_sheet(images, [f"{name}\nCoat 9%" for name in names] * 3)
    assert np.asarray(figure.axes[11].images[0].get_array()) * 255 == pytest.approx(11)
    assert [axes.get_title() for axes in figure.axes[:4]] == [
        "a.png\nCoat 9%", "…g/h/i/j/k/l/m.png\nCoat 9%", "?$\\frac.png\nCoat 9%",
        "日本😀.png\nCoat 9%",
    ]  # fmt: skip
    # A glyph that the font lacks warns.
    assert plots.encode(figure)


LAYERS: list[dict[str, Any]] = [
    {"layer": "input", "inputs": [], "shape": [28, 28, 1], "params": 0, "flops": 0},
    {"layer": "Conv_0", "inputs": [0], "shape": [26, 26, 8], "params": 80, "flops": 2000},
    {"layer": "path/of/a/lot/of/modules/Dense_with_a_$name", "inputs": [0, 1], "shape": [10],
     "params": 100, "flops": 30_000},
    {"layer": "unused", "inputs": [], "shape": [], "params": 5, "flops": 0},
]  # fmt: skip


TRIALS: list[dict[str, Any]] = [
    {"number": number, "state": state, "val_accuracy": accuracies,
     "params": {"learning_rate": rate, "optimizer": optimizer}}
    for number, (state, accuracies, rate, optimizer) in enumerate([
        ("COMPLETE", [0.3, 0.5], 0.001, "sgd"), ("PRUNED", [0.2], 0.1, "adam"),
        ("COMPLETE", [0.4], 0.01, "adam"), ("FAIL", [0.9], 0.02, "sgd"),
        ("PRUNED", [], 0.03, "sgd"), ("COMPLETE", [0.7], 0.002, "sgd"),
    ])
]  # fmt: skip
SPACE: dict[str, dict[str, Any]] = {
    "learning_rate": {"low": 0.001, "high": 0.1, "log": True, "choices": []},
    "optimizer": {"low": None, "high": None, "log": False, "choices": ["adam", "sgd"]},
}


def test_trial_history_marks_pruned_trials_and_the_best_so_far():
    curves = lines(plots.trial_history(TRIALS))
    np.testing.assert_array_equal(curves["completed"], [[0, 2, 5], [0.5, 0.4, 0.7]])
    np.testing.assert_array_equal(curves["pruned"], [[1], [0.2]])
    np.testing.assert_array_equal(curves["best so far"], [[0, 2, 5], [0.5, 0.5, 0.7]])


def test_trial_settings_have_the_scale_of_their_domain():
    figure = plots.trial_settings(TRIALS, SPACE)
    np.testing.assert_array_equal(lines(figure)["completed"][0], [0.001, 0.01, 0.002])
    np.testing.assert_array_equal(lines(figure, 1)["completed"], [[1, 0, 1], [0.5, 0.4, 0.7]])
    assert [axes.get_xscale() for axes in figure.axes] == ["log", "linear"]
    assert [axes.get_xlabel() for axes in figure.axes] == ["learning rate", "optimizer"]
    assert [label.get_text() for label in figure.axes[1].get_xticklabels()] == ["adam", "sgd"]


def test_largest_importance_is_on_top():
    axes = plots.importances({"a": 0.6, "b_c": 0.1, "d": 0.3}).axes[0]
    assert [text.get_text() for text in axes.texts] == ["10%", "30%", "60%"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["b c", "d", "a"]


def test_settings_of_the_user_have_no_effect(tmp_path):
    code = """
import hashlib
from fmnist_jax.analysis import plots
line = {"split": "train", "epoch": 1, "loss": 2.0}
print(hashlib.sha256(plots.encode(plots.learning_curve([line], "loss"))).hexdigest())
"""
    (tmp_path / "matplotlibrc").write_text("text.usetex: True\nfigure.dpi: 30\nfont.size: 30\n")
    plain = os.environ | {"MPLCONFIGDIR": str(tmp_path / "config")}
    changes = {"MATPLOTLIBRC": str(tmp_path), "MPLBACKEND": "module://missing", "PATH": ""}
    outputs = [
        subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, env=env, text=True)
        for env in (plain, plain | changes)
    ]
    assert outputs[0] == outputs[1]


RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (6, 5, 10, 3), np.uint8)


def shown_images(figure):
    return [np.asarray(axes.images[0].get_array()) for axes in figure.axes if axes.images]


def test_images_in_colour_are_shown_as_they_are():
    labels, names = np.arange(6) % 2, ["a", "b"]
    logits = -1.0 * np.eye(2)[labels]  # all wrong
    predictions = {"logits": logits, "labels": labels, "indices": np.arange(6)}
    examples = {"worst_images": COLOURS[[4, 2]], "worst_indices": np.array([4, 2])}
    augmented = COLOURS[:2, None].repeat(3, axis=1) / 255
    expected = {
        plots.class_samples(COLOURS, labels, names): COLOURS[[0, 2, 4, 1, 3, 5]],
        plots.contact_sheet(COLOURS, names * 3): COLOURS,
        plots.misclassified(COLOURS, labels, logits, names, 6): COLOURS,
        plots.worst_predictions(predictions, examples, names): COLOURS[[4, 2]],
        plots.replayed_batch(COLOURS / 255, labels, labels, labels, names): COLOURS / 255,
    }
    for figure, images in expected.items():
        np.testing.assert_array_equal(shown_images(figure), images)
    originals, *rest = shown_images(plots.augmented_samples(COLOURS[:2], augmented))[:4]
    np.testing.assert_array_equal(originals, COLOURS[0])
    np.testing.assert_array_equal(rest, augmented[0])


def test_cells_have_the_ratio_of_the_images():
    for images, ratio in ((COLOURS, 0.5), (COLOURS.swapaxes(1, 2), 2), (COLOURS[:, :1], 0.25)):
        width, height = plots.class_samples(images, np.arange(6) % 2, ["a", "b"]).get_size_inches()
        assert height / 2 == pytest.approx(ratio * (width - 1.3) / 3)


def test_only_large_images_are_smoothed():
    for side, interpolation in ((64, "nearest"), (65, "antialiased")):
        (axes,) = plots.contact_sheet(np.zeros((1, 8, side), np.uint8), ["a"]).axes
        assert axes.images[0].get_interpolation() == interpolation


@pytest.mark.parametrize("num_classes", [2, 20, 21, 100, 1000])
def test_a_confusion_matrix_of_many_classes_stays_readable(num_classes):
    counts = np.diag(np.arange(num_classes) % 7 + 1)
    counts[0, num_classes - 1] = 3  # three of four images of the first class
    names = [f"class number {number}" for number in range(num_classes)]
    figure = plots.confusion_matrix(counts.tolist(), names)
    (axes,) = figure.axes
    assert max(figure.get_size_inches()) < 12
    assert len(axes.texts) == (num_classes + 1 if num_classes <= 20 else 0)
    assert len(axes.get_xticks()) == len(axes.get_yticks()) <= 20
    for position, label in zip(axes.get_yticks(), axes.get_yticklabels(), strict=True):
        assert label.get_text() == f"class number {position:.0f}"[:13] + (
            names[int(position)][13:] if len(names[int(position)]) <= 14 else "…"
        )
    cells = np.asarray(axes.images[0].get_array())
    block = {1000: 5}.get(num_classes, 1)
    assert cells.shape == (num_classes // block, num_classes // block)
    assert cells[0, -1] == pytest.approx(0.75**0.5)
    assert cells[-1, 0] == 0
    np.testing.assert_array_equal(np.diag(cells)[1:], 1)
    assert cells[0, 0] == pytest.approx(0.5 if block == 1 else 1)
    left, right, bottom, top = axes.images[0].get_extent()
    assert (left, right, bottom, top) == (-0.5, num_classes - 0.5, num_classes - 0.5, -0.5)
    assert ("largest of 5 x 5" in axes.get_xlabel()) == (block == 5)


def test_cells_that_classes_share_cover_the_last_class():
    figure = plots.confusion_matrix(np.eye(401, dtype=int).tolist(), ["a"] * 401)
    (image,) = figure.axes[0].images
    np.testing.assert_array_equal(image.get_array(), np.eye(134))
    assert tuple(image.get_extent()) == (-0.5, 401.5, 401.5, -0.5)


def test_samples_of_many_classes_are_those_that_have_images():
    labels = np.repeat(np.arange(0, 100, 5), 2)
    names = [f"a long name of class {number}" for number in range(100)]
    figure = plots.class_samples(np.zeros((40, 4, 4), np.uint8), labels, names)
    assert len(shown_images(figure)) == 40
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert texts == ["a long name o…"] * 20
    assert max(figure.get_size_inches()) <= 14


def test_long_names_of_classes_fit_over_their_images():
    names = ["a name of more letters than an image has room for", "b\udcff"]
    figure = plots.misclassified(np.zeros((1, 4, 4)), np.array([1]), np.array([[9.0, 0]]), names, 1)
    assert figure.axes[0].get_title() == "b?\npredicted a name of mor… (100%)"
    assert plots.encode(figure)
