"""report.html and plots/: made from files alone, complete, self-contained."""

import json

import numpy as np
import pytest

import fmnist_jax as fm
from fmnist_jax.recipes import CLAIMS
from fmnist_jax.report import run
from fmnist_jax.runs import files
from fmnist_jax.runs.replay import Replay
from tests.report.conftest import CLASSES, PUBLISHED, check_self_contained, read_page, write_run


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """A run with augmentation and its report."""
    place = tmp_path_factory.mktemp("report") / "run"
    write_run(place, augmented=True)
    run.write_report(place)
    return place


@pytest.fixture(scope="module")
def page(workdir):
    return read_page(workdir / "report.html")


@pytest.fixture(scope="module")
def report(workdir):
    return files.read_json(workdir / files.REPORT)


def test_headline_numbers_are_those_of_the_file(page):
    assert page.numbers == {
        "Test accuracy": "93.46%",
        "Test accuracy with test-time augmentation": "94.57%",
        "Validation accuracy": "92.34%",
        "Training accuracy, last epoch": "91.23%",
        "Test loss (nats)": "0.457",
        "Training images/s": "8,765",
    }
    assert page.title == "small_dropout: test accuracy 93.46%"
    assert page.headings[0] == "small_dropout"
    assert (
        "Fashion-MNIST, 3 classes; 56,789 parameters. 2 epochs on 11,111 training images; 2,222 "
        "validation images. Evaluated once, after training, on 4,444 test images. Seed 17."
    ) in page.words


def test_means_over_classes_are_those_of_the_file(page, tmp_path):
    assert (
        "Means over classes, test: balanced accuracy 81.23% (80.12% to 82.34%); F1 71.23%; area "
        "under the ROC curve 98.77% (97.65% to 99.88%). In brackets are 95% confidence intervals "
        "over images."
    ) in page.words
    report = write_run(tmp_path, test_auc=None)
    report["test_intervals"]["test_auc"] = [None, None]
    files.write_json(tmp_path / files.REPORT, report)
    assert "area under the ROC curve none." in read_page(run.write_report(tmp_path)).words


def test_reports_of_earlier_versions_have_no_means_over_classes(tmp_path):
    report = write_run(tmp_path)
    for name in ("test_balanced_accuracy", "test_macro_f1", "test_auc", "test_intervals"):
        del report[name]
    files.write_json(tmp_path / files.REPORT, report)
    page = read_page(run.write_report(tmp_path))
    assert "Means over classes" not in page.words
    assert page.numbers["Test accuracy"] == "93.46%"


def test_tables_are_those_of_the_file(page, report):
    for row in report["classes"]:
        cells = [f"{row[key]:.3f}" for key in ("precision", "recall", "f1")]
        assert [row["name"], *cells, f"{row['support']:,}"] in page.rows
    matrix = np.array(report["confusion_matrix"])
    for i, j in ((0, 1), (0, 2), (1, 2)):
        errors = matrix[i, j] + matrix[j, i]
        assert [f"{CLASSES[i]} and {CLASSES[j]}", f"{errors:,}"] in page.rows


def test_facts_are_those_of_the_file(page):
    expected = {
        "Expected calibration error": "1.23% (95% confidence interval 0.46% to 2.35%; 15 bins)",
        "Area under the risk-coverage curve": "0.0079",
        "Temperature scaling": "temperature 1.358, fitted on the validation set; expected "
        "calibration error 0.88%, test loss 0.346 nats",
        "Batch size": "128",
        "Learning rate": "0.001",
        "Dropout": "0.25",
        "Seed": "17",
        "Steps": "1,234",
        "Excluded training images": "333",
        "Training time": "4,321 s, and 9.9 s of compilation",
        "Device": "a processor",
        "Data": f"somewhere, SHA-256 {PUBLISHED}",
        "Network": "small_dropout",
        "SHA-256 of the parameters": "b" * 64,
        "Versions": "jax 1.2.3, numpy 4.5.6",
    }
    assert {name: page.fact(name) for name in expected} == expected


def test_claim_and_changed_settings_are_shown(page):
    claim = CLAIMS["small_dropout"]
    assert page.fact("Keras project") == claim.source
    assert page.fact("Reported accuracy") == claim.text
    assert page.fact("This run") == "test 93.46%, validation 92.34%, training 91.23%"
    assert page.fact("Choices the project left open") == claim.open_choices
    assert page.fact("Changed settings") == "epochs 2 (recipe: 30); dropout 0.25 (recipe: none)"


def test_page_is_self_contained_and_plots_are_its_pictures(workdir, page):
    check_self_contained(page)
    names = {path.stem for path in (workdir / "plots").iterdir()}
    assert names == {
        "loss", "accuracy", "network", "confusion", "samples", "augmented", "worst", "reliability",
        "risk",
    }  # fmt: skip
    assert len(page.pictures) == len(set(page.pictures)) == len(names)
    assert page.captions == [
        "Loss", "Accuracy", "Layers of the network", "Reliability diagram, test set",
        "Risk-coverage curve, test set", "Confusion matrix of the test images",
        "Test images with the highest loss", "Training images by class",
        "Originals and augmented images of the first epochs",
    ]  # fmt: skip
    for caption in (*page.captions[:2], *page.captions[3:5]):
        assert f"<figcaption>{caption}</figcaption>" in page.text
    assert 'class="warning"' not in page.text


def test_optional_parts_are_left_out(tmp_path):
    calibration = {
        "ece": 0.1, "ece_low": 0.1, "ece_high": 0.1, "aurc": 0.1,
        "temperature": None, "ece_scaled": None, "loss_scaled": None,
    }  # fmt: skip
    write_run(
        tmp_path, arch="own", sample=True, tta_accuracy=None, val_accuracy=None,
        calibration=calibration, epochs=1,
    )  # fmt: skip
    page = read_page(run.write_report(tmp_path))
    assert " 1 epoch on 11,111 training images;" in page.words
    assert page.numbers["Validation accuracy"] == "none"
    assert not any("test-time augmentation" in name for name in page.numbers)
    assert not any("Temperature" in row[0] for row in page.rows)
    assert "Comparison with the Keras project" not in page.headings
    assert not any("Augmented" in heading for heading in page.headings)
    assert len(page.pictures) == 8
    assert page.text.count("Trained on the embedded sample; these accuracies are not results") == 1


def test_why_a_claim_is_not_comparable_is_shown(tmp_path):
    write_run(tmp_path, arch="deep_augmented")
    page = read_page(run.write_report(tmp_path))
    assert page.fact("Not comparable because") == CLAIMS["deep_augmented"].not_comparable


def test_layers_and_their_totals_are_shown(page):
    start = page.rows.index(["Layer", "Operations", "Output shape", "Parameters", "FLOP per image"])
    assert page.rows[start + 1 : start + 4] == [
        ["input", "", "8 x 8 x 1", "0", "0"],
        ["Dense_0", "dot, add", "3", "56,789", "98,765"],
        ["all", "", "", "56,789", "98,765"],
    ]


def test_run_of_a_version_without_layers(tmp_path):
    report = write_run(tmp_path)
    del report["network"]
    (tmp_path / files.REPORT).write_text(json.dumps(report))
    page = read_page(run.write_report(tmp_path))
    assert "Network" not in page.headings
    assert "Layers of the network" not in page.captions
    assert page.fact("Network") == "small_dropout"


def test_other_data_are_not_compared_with_a_claim(tmp_path):
    data = {
        "source": "my arrays", "sha256": "a" * 64, "train": 1, "val": 1, "excluded": 1, "test": 1,
        "classes": CLASSES,
    }  # fmt: skip
    write_run(tmp_path, data=data)
    page = read_page(run.write_report(tmp_path))
    assert " my arrays, 3 classes;" in page.words
    assert "Fashion-MNIST" not in page.words
    assert "Comparison with the Keras project" not in page.headings


def test_sample_is_compared_with_the_claim(tmp_path):
    data = fm.load_fashion_mnist(sample=True)
    fields = {"source": data.source, "sha256": data.sha256, "classes": CLASSES}
    write_run(tmp_path, data=dict.fromkeys(("train", "val", "excluded", "test"), 1) | fields)
    page = read_page(run.write_report(tmp_path))
    assert " Fashion-MNIST, 3 classes;" in page.words
    assert "Comparison with the Keras project" in page.headings


@pytest.mark.parametrize("arch", ["/home/me/nets.py:Net", "my.package:Net"])
def test_heading_of_a_network_of_the_user_is_short(arch, tmp_path):
    options = {"arch_options": {"width": 64, "depth": 3}, "optimizer_options": None}
    write_run(tmp_path, arch=arch, recipe={"arch": arch, "loss": "focal"} | options)
    page = read_page(run.write_report(tmp_path))
    assert page.title == "Net: test accuracy 93.46%"
    assert page.headings[0] == "Net"
    assert page.fact("Network") == arch
    assert page.fact("Loss") == "focal"
    assert page.fact("Arch options") == "width 64, depth 3"
    assert not any(row[0] == "Optimizer options" for row in page.rows)


def test_hostile_text_is_escaped(tmp_path):
    hostile = '"><script>$\\frac{{ 7 * 7 }}'
    data = {
        "source": hostile, "sha256": hostile, "train": 1, "val": 1, "excluded": 1, "test": 1,
        "classes": [hostile, "b", "c"],
    }  # fmt: skip
    write_run(
        tmp_path, data=data, arch=hostile, device=hostile, params_sha256=hostile,
        versions={hostile: hostile}, recipe={hostile: hostile},
    )  # fmt: skip
    page = read_page(run.write_report(tmp_path))
    check_self_contained(page)
    assert page.rows.count([f"{hostile} and b", page.fact(f"{hostile} and b")]) == 1
    assert page.fact("Device") == hostile
    assert "49" not in page.text


def test_unfinished_run_has_no_report(tmp_path):
    with pytest.raises(fm.errors.DamagedFileError, match=r"report\.json is missing"):
        run.write_report(tmp_path)


@pytest.mark.parametrize("name", [files.REPORT, files.METRICS, files.PREDICTIONS, files.EXAMPLES])
@pytest.mark.parametrize("damage", ["missing", "empty", "truncated"])
def test_damaged_file_is_named(name, damage, tmp_path):
    write_run(tmp_path)
    path = tmp_path / name
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: 0 if damage == "empty" else 40])
    with pytest.raises(fm.errors.DamagedFileError, match=name):
        run.write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize("content", ["[]", "null", "7"])
def test_report_that_is_no_object_is_damaged(content, tmp_path):
    write_run(tmp_path)
    (tmp_path / files.REPORT).write_text(content)
    with pytest.raises(fm.errors.DamagedFileError, match=r"report\.json"):
        run.write_report(tmp_path)


@pytest.mark.parametrize("name", ["data", "tta_accuracy"])
def test_missing_value_is_named(name, tmp_path):
    report = write_run(tmp_path)
    del report[name]
    (tmp_path / files.REPORT).write_text(json.dumps(report))
    with pytest.raises(fm.errors.DamagedFileError, match=name):
        run.write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_missing_array_is_named(tmp_path):
    write_run(tmp_path)
    files.write_arrays(tmp_path / files.PREDICTIONS, labels=np.zeros(3, int))
    with pytest.raises(fm.errors.DamagedFileError, match="logits"):
        run.write_report(tmp_path)


def test_most_confused_pairs():
    matrix = [[5, 1, 0, 7], [2, 9, 0, 0], [0, 0, 9, 0], [1, 0, 4, 2]]
    report = {"data": {"classes": ["a", "b", "c", "d"]}, "confusion_matrix": matrix}
    assert run.most_confused(report) == [("a", "d", 8), ("c", "d", 4), ("a", "b", 3)]
    assert run.most_confused(report, num_pairs=1) == [("a", "d", 8)]


def test_replayed_batch_is_drawn(tmp_path):
    rng = np.random.default_rng(0)
    replay = Replay(12, np.arange(9), rng.random((9, 8, 8)), np.arange(9) % 3, rng.random(9), 1.0)
    path = run.write_replay(tmp_path, replay, CLASSES)
    assert path == tmp_path / "plots" / "replay-12.png"
    plain = path.read_bytes()
    assert plain.startswith(b"\x89PNG")
    # The watermark of the sample.
    assert run.write_replay(tmp_path, replay, CLASSES, sample=True).read_bytes() != plain


def write_other(workdir, num_classes, shape):
    """Files of a run on other data, with images in colour and long names of classes."""
    rng = np.random.default_rng(0)
    names = [f"{'long ' * 20}{number}" for number in range(num_classes)]
    rows = [
        {"name": name, "precision": 0.5, "recall": 0.5, "f1": (7 * i % num_classes) / num_classes,
         "support": 5}
        for i, name in enumerate(names)
    ]  # fmt: skip
    data = {
        "source": "a folder",
        "sha256": "0" * 64,
        "train": 9,
        "val": 0,
        "excluded": 0,
        "test": 9,
    }
    write_run(workdir, data=data | {"classes": CLASSES})
    report = files.read_json(workdir / files.REPORT)
    report |= {
        "data": data | {"classes": names}, "classes": rows,
        "confusion_matrix": rng.integers(0, 2, (num_classes, num_classes)).tolist(),
    }  # fmt: skip
    files.write_json(workdir / files.REPORT, report)
    n = 2 * num_classes
    files.write_arrays(
        workdir / files.PREDICTIONS, logits=rng.normal(size=(n, num_classes)),
        labels=np.arange(n) % num_classes, indices=np.arange(n),
    )  # fmt: skip
    images = rng.integers(0, 256, (6, *shape), np.uint8)
    files.write_arrays(
        workdir / files.EXAMPLES, sample_images=images, sample_labels=np.arange(6) % num_classes,
        worst_images=images[:3], worst_indices=np.arange(3), originals=images[:2],
        augmented=rng.random((2, 3, *shape)),
    )  # fmt: skip
    return rows


@pytest.mark.parametrize("num_classes", [2, 100])
def test_pages_of_other_data(num_classes, tmp_path):
    rows = write_other(tmp_path / "run", num_classes, (8, 12, 3))
    page = read_page(run.write_report(tmp_path / "run"))
    check_self_contained(page)
    assert "a folder," in page.words
    assert "Fashion-MNIST" not in page.text
    if num_classes > 20:
        rows = sorted(rows, key=lambda row: row["f1"])
    names = [row["name"] for row in rows]
    assert [row[0] for row in page.rows if row[-1] == "5"] == names
    # Not inverted in dark mode: worst, samples and augmented.
    assert page.text.count('class="wide photo"') == 3
    assert ("Per-class metrics, test set, lowest F1 first" in page.headings) == (num_classes > 20)


def test_a_page_in_grey_has_no_photos(page):
    assert "photo" not in page.text.split("</style>")[1]
    assert "Per-class metrics, test set" in page.headings
    assert "square root" not in page.words
