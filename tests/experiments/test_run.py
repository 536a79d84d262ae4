"""The command line, as a person calls it."""

import json
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import fmnist_jax as fm
from tests.conftest import ROOT

FEW = ["--sample", "--classes", "bag,trouser", "--train-examples", "8", "--batch-size", "4"]


@pytest.mark.parametrize("arch", fm.ARCHS)
def test_every_network_trains(arch, run_py, tmp_path, capsys):
    workdir = tmp_path / "run"
    arguments = ["--arch", arch, *FEW, "--epochs", "2", "--val-fraction", "0.01"]
    assert run_py.main([*arguments, "--workdir", str(workdir)]) == 0
    report = json.loads((workdir / "report.json").read_text())
    assert (report["arch"], report["steps"]) == (arch, 4)
    assert report["data"]["classes"] == ["Bag", "Trouser"]
    assert (workdir / "report.html").stat().st_size > 50_000
    output = capsys.readouterr().out
    for expected in ("Compiling", "epoch   2", "images/s", "test accuracy", "the original's claim"):
        assert expected in output

    # The same command again finds the run complete.
    assert run_py.main([*arguments, "--workdir", str(workdir)]) == 0
    assert "This run is complete" in capsys.readouterr().out


def test_the_default_folder_belongs_to_the_settings(run_py, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = [*FEW, "--arch", "valid_2x2", "--epochs", "1", "--quiet"]
    assert run_py.main(command) == 0
    assert run_py.main(command) == 0
    assert len(list((tmp_path / "runs").iterdir())) == 1
    assert run_py.main([*command, "--seed", "1"]) == 0
    assert run_py.main([*command, "--optimizer", "sgd", "--learning-rate", "0.1"]) == 0
    assert len(list((tmp_path / "runs").iterdir())) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "resnet"], "unknown architecture 'resnet'"),
        (["--data-dir", "/nowhere"], "/nowhere: not a folder"),
        (["--sample", "--classes", "hat,bag"], "unknown class 'hat'"),
        (["--sample", "--epochs", "0"], "epochs is 0"),
        (["--sample", "--batch-size", "5401"], "only 5,400 training examples"),
        (["--sample", "--train-examples", "6000"], "only 5,400 training examples"),
        (["--sample", "--val-fraction", "1.5"], "val_fraction is 1.5"),
        (["--sample", "--learning-rate", "-1"], "learning_rate is -1.0"),
        (["--sample", "--classes", ""], "unknown class ''"),
        (["--sample", "--schedule", "step"], "schedule is 'step'"),
        (["--sample", "--arch", "he_stack", "--dropout", "0.5"], "he_stack has no dropout"),
        (["--sample", "--image-size", "64"], "small_dropout takes no such option: image_size"),
        (["--sample", "--arch", "deep_augmented", "--image-size", "0"], "image_size is 0"),
        (["--sample", "--label-smoothing", "1"], "label_smoothing is 1.0"),
        (["--sample", "--weight-decay", "-1"], "weight_decay is -1.0"),
        (["--sample", "--augmentation-strength", "1"], "there is no augmentation"),
        (["--sample", "--seeds", "0"], "count is 0"),
        (
            ["--sample", "--augmentation", "keras", "--augmentation-strength", "5"],
            "below 5 the zoom leaves something",
        ),
        (["--sample", "--replay", "1"], "--replay needs --workdir"),
        (["--sample", "--replay", "1", "--workdir", "nowhere"], "nowhere holds no run"),
        (["--sample", "--exclude", "nowhere"], "nowhere"),
        (["--exclude", "nowhere", "--classes", "0,1"], "does not go with --classes"),
        (["--sample", "--optimizer", "lion"], "optimizer is 'lion'"),
        (["--sample", "--seed", "-1"], "seed is -1"),
        (["--sample", "--workdir", "/dev/null"], "cannot be used"),
        (["--sample", "--checkpoint-every", "5"], "checkpoint_every is '5'"),
        (["--sample", "--keep-every", "60s"], "keep_every is '60s'"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, run_py, capsys):
    assert run_py.main(arguments) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("error: ")
    assert len(captured.err.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments", [["--epochs", "many"], ["--unknown"], ["extra"], ["--sample", "--data-dir", "x"]]
)
def test_bad_usage_is_status_2(arguments, run_py, capsys):
    with pytest.raises(SystemExit) as caught:
        run_py.main(arguments)
    assert caught.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_divergence_is_status_3(run_py, tmp_path, capsys):
    arguments = [*FEW, "--optimizer", "sgd", "--learning-rate", "1e30", "--epochs", "5"]
    assert run_py.main([*arguments, "--workdir", str(tmp_path)]) == 3
    assert "diverged: the loss is not finite in epoch 1, step" in capsys.readouterr().err


def test_dry_run_says_what_it_would_do(run_py, tmp_path, capsys):
    workdir = tmp_path / "run"
    given = ["--dropout", "0.25", "--label-smoothing", "0.1", "--weight-decay", "0.001"]
    assert run_py.main(["--sample", "--dry-run", *given, "--workdir", str(workdir)]) == 0
    output = capsys.readouterr().out
    for expected in ("241,546", "Conv_2/kernel", "3 x 3 x 64 x 128", "GFLOP", "MiB", "updates"):
        assert expected in output
    assert dict(re.findall(r"^ *(dropout|label smoothing|weight decay) +(\S+)", output, re.M)) == {
        "dropout": "0.25",
        "label smoothing": "0.1",
        "weight decay": "0.001",
    }
    # Three times the forward pass, less the gradient of the images; MACs count twice. On a CPU the
    # second convolution is 5 x 5 tiles of 16 products.
    second = (5 * 5 * 16 if jax.default_backend() == "cpu" else 11 * 11 * 9) * 32 * 64
    forward = 26 * 26 * 9 * 32 + second + 3 * 3 * 9 * 64 * 128 + 1152 * 128 + 1280
    expected_flops = 2 * 128 * (3 * forward - 26 * 26 * 9 * 32)
    flops = float(output.split(" GFLOP")[0].split()[-1]) * 1e9
    np.testing.assert_allclose(flops, expected_flops, rtol=0.2)
    assert not workdir.exists()


def test_many_seeds_and_replay(run_py, tmp_path, capsys):
    workdir = tmp_path / "many"
    arguments = [*FEW, "--arch", "valid_2x2", "--epochs", "1", "--val-fraction", "0.01"]
    several = [*arguments, "--seeds", "2", "--workdir", str(workdir)]
    assert run_py.main(several) == 0
    output = capsys.readouterr().out
    for expected in ("Seed 1, 2 of 2", "95% interval", "ensemble"):
        assert expected in output
    folders = {path.name for path in workdir.iterdir() if path.is_dir()}
    assert folders == {"seed-0", "seed-1"}
    assert (workdir / "seeds.html").stat().st_size > 20_000

    replay = ["--sample", "--replay", "2", "--workdir", str(workdir / "seed-1")]
    assert run_py.main(replay) == 0
    output = capsys.readouterr().out
    assert "Update 2: mean loss" in output
    assert "gradient norm" in output
    assert (workdir / "seed-1" / "plots" / "replay-2.png").stat().st_size > 5_000


def test_excluded_images_are_in_no_split(run_py, tmp_path, capsys):
    listed = tmp_path / "listed.txt"
    listed.write_text("# doubted\n" + "".join(f"{number}  # so\n" for number in range(3000)))
    arguments = ["--sample", "--arch", "valid_2x2", "--epochs", "1", "--train-examples", "64"]
    workdir = tmp_path / "run"
    assert run_py.main([*arguments, "--exclude", str(listed), "--workdir", str(workdir)]) == 0
    with np.load(workdir / "predictions.npz") as predictions:
        assert len(predictions["val_indices"]) == 300
        assert predictions["val_indices"].min() >= 3000
    report = json.loads((workdir / "report.json").read_text())
    assert report["data"]["excluded"] == 3000
    listed.write_text("12\nabout 13\n")
    assert run_py.main([*arguments, "--exclude", str(listed), "--workdir", str(workdir)]) == 2
    assert "has the line 'about 13'" in capsys.readouterr().err.replace("\n", " ")
    listed.write_text(f"# data SHA-256 {'0' * 64}\n12\n")
    assert run_py.main([*arguments, "--exclude", str(listed), "--workdir", str(workdir)]) == 2
    assert "lists images of other data" in capsys.readouterr().err.replace("\n", " ")


def test_list_shows_every_recipe(run_py, capsys):
    assert run_py.main(["--list"]) == 0
    output = capsys.readouterr().out
    assert all(name in output for name in fm.RECIPES)


def test_quiet_prints_nothing(run_py, tmp_path, capsys):
    arguments = [*FEW, "--arch", "valid_2x2", "--epochs", "1", "--quiet"]
    assert run_py.main([*arguments, "--workdir", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


@pytest.mark.parametrize("seconds", [0.1, 0.5, 1.0, 2.0])
def test_an_early_interrupt_is_quiet(seconds, tmp_path):
    command = [
        sys.executable, str(ROOT / "experiments" / "run.py"), "--sample", "--train-examples", "500",
        "--epochs", "9", "--workdir", str(tmp_path / "run"),
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    # Ended by the signal, or saved and stopped: a shell shows 130 for both. In the first moments
    # Python has not read the script's first line yet and raises its own KeyboardInterrupt.
    assert process.returncode in (-signal.SIGINT, 130)
    if seconds >= 1:
        assert "Traceback" not in errors


def test_an_interrupt_saves_and_the_same_command_goes_on(tmp_path):
    command = [
        sys.executable, str(ROOT / "experiments" / "run.py"), "--sample", "--arch", "valid_2x2",
        "--epochs", "3", "--batch-size", "8", "--workdir", str(tmp_path / "run"),
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lines = iter(process.stdout.readline, "")
    assert any(line.startswith("epoch   1") for line in lines)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "the same command goes on from there" in errors
    assert "Traceback" not in errors
    assert any((tmp_path / "run" / "checkpoints").iterdir())

    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert "Going on after step" in result.stdout
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["steps"] == 3 * 675
