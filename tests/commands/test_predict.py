"""Pictures are classified from the command line."""

import dataclasses
import errno
import gzip
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fmnist_jax as fm
from fmnist_jax.commands import predict as predict_command
from fmnist_jax.data.pictures import prepare
from tests.data.idx_files import write_idx


@pytest.fixture(scope="module")
def pictures(tmp_path_factory, sample):
    """Two pictures in a subfolder, an IDX file of three images, and another file."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "sub").mkdir()
    for number in range(2):
        large = np.kron(sample.test_images[number], np.ones((5, 5), np.uint8))
        Image.fromarray(255 - np.pad(large, 20)).save(folder / "sub" / f"{number}.png")
    write_idx(folder / "images-idx3-ubyte.gz", sample.test_images[:3])
    (folder / "notes.txt").write_text("not a picture")
    return folder


def json_lines(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_table_and_a_contact_sheet(finished, pictures, tmp_path, capsys):
    sheet = tmp_path / "new" / "sheet.png"
    assert predict_command.main([str(finished), str(pictures), "--sheet", str(sheet)]) == 0
    output = capsys.readouterr().out
    assert re.search(r"^sub/1\.png ", output, re.MULTILINE)
    assert len(re.findall("yes *$", output, re.MULTILINE)) == 2
    assert "Trouser" in output
    assert "classified: 5; unreadable files: 0; files of other types, skipped: 1." in output
    with Image.open(sheet) as picture:
        assert picture.size[0] > 500


@pytest.mark.parametrize("batch_size", ["2", "256"])
def test_json_has_the_probabilities_of_the_network(
    batch_size, finished, pictures, sample, tmp_path, capsys
):
    command = [str(finished), str(pictures), "--json", "--batch-size", batch_size]
    assert predict_command.main([*command, "--sheet", str(tmp_path / "sheet.png")]) == 0
    lines = json_lines(capsys)
    names = [f"{pictures}/images-idx3-ubyte.gz[{number}]" for number in range(3)]
    assert [line["file"] for line in lines] == [
        *names, f"{pictures}/sub/0.png", f"{pictures}/sub/1.png"
    ]  # fmt: skip
    classifier = fm.load_classifier(finished)
    expected = classifier.probabilities(sample.test_images[:3])
    for line in lines[3:]:
        with Image.open(line["file"]) as file:
            image, _ = prepare(np.asarray(file))
        both = classifier.probabilities(np.stack([image, image[:, ::-1]]))
        expected = np.concatenate([expected, both.mean(axis=0, keepdims=True)])
    for line, row in zip(lines, expected, strict=True):
        top = {entry["class"]: entry["probability"] for entry in line["top"]}
        assert top == pytest.approx(dict(zip(classifier.class_names, row, strict=True)))
        assert line["probability"] == pytest.approx(max(row))
        assert line["class"] == classifier.class_names[row.argmax()]
    assert (tmp_path / "sheet.png").exists()


def test_a_bad_file_is_reported_and_the_others_are_classified(finished, pictures, tmp_path, capsys):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    files = [str(tmp_path / "bad.png"), str(pictures / "sub"), str(tmp_path / "missing.png")]
    assert predict_command.main([str(finished), *files, "--json"]) == 1
    lines = json_lines(capsys)
    assert ["error" in line for line in lines] == [True, False, False, True]
    assert predict_command.main([str(finished), *files, "--quiet"]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert errors[0] == f"error: {files[0]}: is not a PNG, JPEG, WebP or IDX file"


def test_a_default_sheet_that_cannot_be_written_is_reported(finished, pictures, tmp_path, capsys):
    run = shutil.copytree(finished, tmp_path / "run")
    (run / "sheet.png").unlink(missing_ok=True)
    (run / "sheet.png").mkdir()
    assert predict_command.main([str(run), str(pictures)]) == 0
    output = " ".join(capsys.readouterr().out.split())
    assert f"The contact sheet was not written: {run}/sheet.png: Is a directory." in output
    assert predict_command.main([str(run), str(pictures), "--sheet", f"{run}/sheet.png"]) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--which", "newest"], "--which is 'newest'; expected latest, best or a step"),
        (["--which", "7"], "has no checkpoint 7"),
        (["--batch-size", "0"], "--batch-size is 0"),
        (["--sheet", "sheet.txt"], "expected a name that ends in .png"),
    ],
)
def test_bad_input_is_refused(flags, message, finished, pictures, error_line):
    assert predict_command.main([str(finished), str(pictures), *flags]) == 2
    assert message in error_line()


def test_folders_without_pictures_or_run_are_refused(finished, tmp_path, error_line):
    assert predict_command.main([str(finished), str(tmp_path)]) == 2
    assert "no picture was found" in error_line()
    assert predict_command.main([str(tmp_path), str(tmp_path)]) == 2
    assert "is not the folder of a run" in error_line()


def test_nothing_in_a_folder_vanishes(finished, pictures, tmp_path, capsys):
    folder = tmp_path / "all"
    folder.mkdir()
    (folder / "linked").symlink_to(pictures / "sub")
    (folder / "again").symlink_to(folder)
    (folder / "gone.png").symlink_to(tmp_path / "nothing.png")
    content = gzip.decompress((pictures / "images-idx3-ubyte.gz").read_bytes())
    (folder / "t10k-images-idx3-ubyte").write_bytes(content)
    (folder / "backup.tar.gz").write_bytes(gzip.compress(b"other"))
    os.mkfifo(folder / "pipe")
    assert predict_command.main([str(finished), str(folder)]) == 1
    captured = capsys.readouterr()
    assert "classified: 5; unreadable files: 1; files of other types, skipped: 2." in captured.out
    assert captured.err.startswith(f"error: {folder}/gone.png: cannot be read (No such file")


def test_a_folder_that_cannot_be_read_is_reported(
    finished, pictures, tmp_path, monkeypatch, capsys
):
    scandir, closed = os.scandir, pictures / "sub"

    def refuse(path):
        if Path(path) == closed:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    sheet = tmp_path / "sheet.png"
    assert predict_command.main([str(finished), str(pictures), "--sheet", str(sheet)]) == 1
    captured = capsys.readouterr()
    assert "classified: 3; unreadable files: 1;" in captured.out
    assert captured.err.startswith(f"error: {closed}: ")


def test_pictures_for_a_network_in_colour(
    colour_workdir, colour_classifier, colours, tmp_path, capsys
):
    for number, image in enumerate(colours.test_images[:3]):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    assert predict_command.main([str(colour_workdir), str(tmp_path), "--json"]) == 0
    lines = json_lines(capsys)
    expected = colour_classifier.probabilities(colours.test_images[:3])
    assert [list(line) for line in lines] == [
        ["file", "class", "probability", "top", "inverted"]
    ] * 3
    for line, row in zip(lines, expected, strict=True):
        found = {entry["class"]: entry["probability"] for entry in line["top"]}
        assert found == pytest.approx(dict(zip(colours.class_names, row, strict=True)), abs=1e-6)
        assert line["inverted"] is False
    assert predict_command.main([str(colour_workdir), str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert output.splitlines()[0].split() == ["file", "class", "2.", "3."]
    assert "sheet.png shows the input" in " ".join(output.split())


def test_names_of_classes_are_text_and_leave_room_for_files(
    colour_classifier, colours, tmp_path, monkeypatch, capsys
):
    names = tuple(f"[bold]{letter}" + " and a long name" * 3 for letter in "abc")
    changed = dataclasses.replace(colour_classifier, class_names=names)
    monkeypatch.setattr(predict_command.flags, "load_classifier", lambda _: changed)
    Image.fromarray(colours.test_images[0]).save(tmp_path / "photo.png")
    command = ["run", str(tmp_path / "photo.png"), "--sheet", str(tmp_path / "sheet.png")]
    assert predict_command.main(command) == 0
    output = capsys.readouterr().out
    assert "photo.png" in output
    assert all(f"[bold]{letter}" in output for letter in "abc")
