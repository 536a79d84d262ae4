"""The command audit.py."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest

import fmnist_jax as fm
from fmnist_jax.commands import audit as audit_command
from fmnist_jax.data.dataset import CLASS_NAMES
from fmnist_jax.studies import audit
from fmnist_jax.studies.cross_validation import train_without
from tests.small import LINEAR, Linear


@pytest.fixture
def _small_training(monkeypatch):
    recipe = dataclasses.replace(fm.RECIPES[audit.ARCH], arch=LINEAR, batch_size=16)
    monkeypatch.setattr(audit, "RECIPES", {audit.ARCH: recipe})


@pytest.mark.usefixtures("_small_training")
def test_audit_end_to_end(tiny, tmp_path, monkeypatch, capsys):
    train = tiny.train_images.copy()
    train[7], train[20] = tiny.test_images[3], tiny.test_images[11][:, ::-1]
    labels = np.arange(60) % 10
    data = fm.Dataset(train, labels, tiny.test_images, tiny.test_labels)
    monkeypatch.setattr(fm, "load_fashion_mnist", lambda *_, **__: data)
    command = ["--folds", "2", "--epochs", "1", "--workdir", str(tmp_path / "a")]
    assert audit_command.main(command) == 0
    output = capsys.readouterr().out
    assert "fold 2 of 2, epoch 1 of 1" in output

    found_audit = json.loads((tmp_path / "a" / "audit.json").read_text())
    assert found_audit["data"]["sha256"] == data.sha256
    for name, images in (("train", train), ("test", tiny.test_images)):
        split, pixels = found_audit["splits"][name], images / 255
        found = [split[key] for key in ("images", "mean", "std", "zero_share")]
        np.testing.assert_allclose(
            found, [len(images), pixels.mean(), pixels.std(), (images == 0).mean()]
        )
    by_class = found_audit["splits"]["train"]["by_class"]
    assert [row["images"] for row in by_class] == [6] * 10
    np.testing.assert_allclose(by_class[4]["mean"], train[labels == 4].mean() / 255)
    (group,) = found_audit["exact_duplicates"]
    assert [(member["split"], member["index"]) for member in group] == [("train", 7), ("test", 3)]
    assert group[0]["label"] == "Sneaker"
    pairs = found_audit["near_duplicates"]["pairs"]
    assert sorted((p["test"], p["train"], p["mirrored"]) for p in pairs) == [
        (3, 7, False),
        (11, 20, True),
    ]

    found = found_audit["labels"]
    indices = [issue["index"] for issue in found["issues"]]
    margins = [s["label_probability"] - s["other_probability"] for s in found["issues"]]
    assert margins == sorted(margins)
    for issue in found["issues"]:
        assert issue["label"] == CLASS_NAMES[labels[issue["index"]]] != issue["predicted"]
    lines = (tmp_path / "a" / "label_issues.txt").read_text().splitlines()
    assert lines[0].startswith("# label issues of 60 training images")
    assert [int(line) for line in lines[1:]] == indices
    assert [len(values) for values in found["test_accuracy"].values()] == [3, 3]

    page = (tmp_path / "a" / "audit.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', page)
    assert len(sources) > 12
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    for expected in (
        "train 7: Sneaker",
        "distance 0.000, mirrored",
        "biased upward by construction",
    ):
        assert expected in page
    assert 'class="warning"' not in page


@pytest.mark.usefixtures("_small_training")
def test_accuracies_match_separate_training(tiny, monkeypatch):
    assert audit.ARCH in fm.ARCHS
    found = audit.audit_labels(tiny, 2, 1, 3)
    left = [issue["index"] for issue in found["issues"]]
    model = Linear()
    recipe = dataclasses.replace(audit.RECIPES[audit.ARCH], epochs=1)
    run = fm.Run(recipe=recipe, workdir=Path(), seed=4)
    for name, excluded in (("with", []), ("without", left)):
        (state,) = train_without(run, tiny, np.array(excluded, int))
        logits = np.asarray(fm.predict(state.variables, tiny.test_images, model=model))
        accuracy = (logits.argmax(axis=1) == tiny.test_labels).mean()
        np.testing.assert_allclose(found["test_accuracy"][name][1], accuracy)


def test_audit_without_training(tmp_path):
    arguments = ["--sample", "--skip-training", "--workdir", str(tmp_path)]
    assert audit_command.main(arguments) == 0
    found_audit = json.loads((tmp_path / "audit.json").read_text())
    assert found_audit["labels"] is None
    assert found_audit["exact_duplicates"] == []
    assert [split["images"] for split in found_audit["splits"].values()] == [6000, 1000]
    assert not (tmp_path / "label_issues.txt").exists()
    page = (tmp_path / "audit.html").read_text()
    assert "Audit of the embedded sample" in page
    assert "Label issues" not in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data-dir", "/nowhere"], "/nowhere: not a folder"),
        (["--sample", "--seed", "-1"], "seed is -1"),
        (["--sample", "--workdir", "/dev/null"], "workdir /dev/null cannot be used"),
        (["--sample", "--folds", "1"], "folds is 1"),
        (["--sample", "--epochs", "0"], "epochs is 0"),
    ],
)
def test_invalid_input_prints_one_line(arguments, message, tmp_path, capsys):
    workdir = [] if "--workdir" in arguments else ["--workdir", str(tmp_path)]
    assert audit_command.main([*arguments, *workdir]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("error: ")
    assert len(captured.err.splitlines()) == 1


@pytest.mark.usefixtures("_small_training")
def test_audit_of_other_data(colours, tmp_path, monkeypatch):
    train = colours.train_images.copy()
    train[7], train[9] = colours.test_images[3], colours.test_images[4][:, ::-1]
    data = fm.Dataset(
        train, colours.train_labels, colours.test_images, colours.test_labels,
        class_names=colours.class_names, source="colours",
    )  # fmt: skip
    monkeypatch.setattr(audit_command.flags, "load_data", lambda *_: data)
    monkeypatch.setattr(audit, "SMALL_SIDE", 1)
    command = ["--folds", "2", "--epochs", "1", "--workdir", str(tmp_path)]
    assert audit_command.main(command) == 0
    found = json.loads((tmp_path / "audit.json").read_text())
    ((first, second),) = found["exact_duplicates"]
    assert (first["split"], first["index"], second["index"]) == ("train", 7, 3)
    pairs = found["near_duplicates"]["pairs"]
    assert {(p["test"], p["train"], p["mirrored"]) for p in pairs} >= {(3, 7, False), (4, 9, True)}
    np.testing.assert_allclose(found["splits"]["train"]["mean"], (train / 255).mean())
    first_line = (tmp_path / "label_issues.txt").read_text().splitlines()[0]
    assert "positions in the training images" in first_line
    assert "Fashion-MNIST" not in (tmp_path / "audit.html").read_text()


def test_small_images_have_a_network_that_takes_them(monkeypatch):
    runs = []

    def stop(run, *_, **__):
        runs.append(run)
        raise ZeroDivisionError

    monkeypatch.setattr(audit, "cross_validate", stop)
    for side, count in ((8, 40), (17, 2000), (18, 2000)):
        images, labels = np.zeros((count, 18, side), np.uint8), np.arange(count) % 2
        data = fm.Dataset(images, labels, images, labels, class_names=("a", "b"))
        with pytest.raises(ZeroDivisionError):
            audit.audit_labels(data, 2, 1, 0)
    assert [run.recipe.arch for run in runs] == ["same_3x3", "same_3x3", "small_dropout"]
    usual = fm.RECIPES["small_dropout"].batch_size
    assert [run.recipe.batch_size for run in runs][::2] == [10, usual]
