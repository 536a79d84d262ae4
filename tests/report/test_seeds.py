"""seeds.html: every number is that of seeds.json."""

import json

import pytest

import fmnist_jax as fm
from fmnist_jax.report.seeds import write_seeds_report
from fmnist_jax.runs import files
from tests.report.conftest import check_self_contained, read_page, write_run


def metric(base, n):
    """Distinct numbers, as `fit_seeds` writes them."""
    keys = ("mean", "std", "low", "high")
    values = {key: base + 0.0123 * i for i, key in enumerate(keys)}
    if n == 1:
        values = {key: base if key == "mean" else None for key in keys}
    return values | {"n": n, "values": [base + 0.001 * i for i in range(n)]}


def write_seeds(workdir, n=3, **changes):
    runs = [f"seed-{5 + i}" for i in range(n)]
    report = {}
    for run in runs:
        report = write_run(workdir / run)
    summary = {
        "sample": False,
        "arch": "small_dropout",
        "recipe": report["recipe"],
        "data": {"test": 10_000, "source": "the set <b>"},
        "test_accuracy": metric(0.81, n),
        "val_accuracy": metric(0.72, n),
        "train_accuracy": metric(0.63, n),
        "tta_accuracy": metric(0.54, n),
        "test_loss": metric(1.4, n),
        "test_balanced_accuracy": metric(0.45, n),
        "test_macro_f1": metric(0.36, n),
        "test_auc": metric(0.27, n),
        "ensemble": {
            "accuracy": 0.91234,
            "loss": 0.56789,
            "calibration": {"ece": 0.01234, "ece_low": 0.00456, "ece_high": 0.02346},
        },
        "runs": runs,
        "params_sha256": [f"{i:064x}"[::-1] for i in range(n)],
    } | changes
    files.write_json(workdir / files.SEEDS, summary)
    return summary


def test_numbers_are_those_of_the_file(tmp_path):
    summary = write_seeds(tmp_path)
    page = read_page(write_seeds_report(tmp_path))
    check_self_contained(page)
    assert 'class="warning"' not in page.text
    assert page.title == "small_dropout: 3 seeds"
    assert "Data: the set &lt;b&gt;." in page.text
    mean = summary["test_accuracy"]["mean"]
    assert f"{(mean * (1 - mean)) ** 0.5:.2f} percentage points" in page.text  # of 10,000 images
    assert page.headings[0] == "small_dropout, 3 seeds"
    assert "2 epochs, batch size 128, adam. Each run" in page.words
    assert list(page.numbers.values()) == ["81.00%", "83.46% to 84.69%", "82.23", "91.23%"]
    for key, name in (
        ("test_accuracy", "Test accuracy"),
        ("val_accuracy", "Validation accuracy"),
        ("train_accuracy", "Training accuracy, last epoch"),
        ("tta_accuracy", "Test accuracy with test-time augmentation"),
        ("test_balanced_accuracy", "Balanced accuracy, test"),
        ("test_macro_f1", "Macro F1, test"),
        ("test_auc", "Area under the ROC curve, test"),
    ):
        value = summary[key]
        assert [
            name,
            f"{value['mean']:.2%}",
            f"{value['low']:.2%} to {value['high']:.2%}",
            f"{100 * value['std']:.2f} points",
        ] in page.rows
    loss = ["Test loss (nats)", "1.4000", "1.4246 to 1.4369", "1.4123"]
    assert loss in page.rows
    for i, run in enumerate(summary["runs"]):
        assert [run, f"{0.81 + 0.001 * i:.2%}", summary["params_sha256"][i][:16]] in page.rows
    assert ["Test accuracy", "91.23%"] in page.rows  # of the ensemble
    assert page.fact("Test loss") == "0.568 nats"
    assert page.fact("Expected calibration error") == (
        "1.23% (95% confidence interval 0.46% to 2.35%)"
    )


def test_one_seed_has_no_intervals_and_no_ensemble(tmp_path):
    write_seeds(tmp_path, n=1, val_accuracy=None, tta_accuracy=None, sample=True)
    page = read_page(write_seeds_report(tmp_path))
    assert page.headings[0] == "small_dropout, 1 seed"
    assert page.numbers == {"Mean test accuracy": "81.00%"}
    assert ["Test accuracy", "81.00%", "", ""] in page.rows
    assert not any("None" in cell or "none" in cell for row in page.rows for cell in row)
    assert not any("Ensemble" in heading for heading in page.headings)
    assert not any("augmentation" in row[0] for row in page.rows)
    assert page.text.count("Trained on the embedded sample; these accuracies are not results") == 1


def test_summaries_of_earlier_versions_have_no_means_over_classes(tmp_path):
    summary = write_seeds(tmp_path, test_auc=None)
    for name in ("test_balanced_accuracy", "test_macro_f1"):
        del summary[name]
    files.write_json(tmp_path / files.SEEDS, summary)
    page = read_page(write_seeds_report(tmp_path))
    assert not any(word in row[0] for row in page.rows for word in ("Balanced", "F1", "ROC"))
    assert page.rows[1][:2] == ["Test accuracy", "81.00%"]


def test_hostile_text_is_escaped(tmp_path):
    hostile = "<script>alert(1)</script>"
    write_seeds(tmp_path, n=1, arch=hostile, params_sha256=[hostile])
    check_self_contained(read_page(write_seeds_report(tmp_path)))


def test_unfinished_seeds_have_no_page(tmp_path):
    with pytest.raises(fm.errors.DamagedFileError, match=r"seeds\.json is missing"):
        write_seeds_report(tmp_path)


@pytest.mark.parametrize("name", ["seeds.json", "seed-6/metrics.jsonl"])
@pytest.mark.parametrize("content", [None, "", '{"split"'])
def test_damaged_file_is_named(name, content, tmp_path):
    write_seeds(tmp_path)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(content)
    with pytest.raises(fm.errors.DamagedFileError, match=name):
        write_seeds_report(tmp_path)


@pytest.mark.parametrize("name", ["runs", "ensemble"])
def test_missing_value_is_named(name, tmp_path):
    summary = write_seeds(tmp_path)
    del summary[name]
    (tmp_path / files.SEEDS).write_text(json.dumps(summary))
    with pytest.raises(fm.errors.DamagedFileError, match=name):
        write_seeds_report(tmp_path)
