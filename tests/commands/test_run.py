"""run.py: train, resume, seeds, replay, and its exit statuses."""

import json
import re
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image

import fmnist_jax as fm
from fmnist_jax.commands import claims as claims_command
from fmnist_jax.commands import export as export_command
from fmnist_jax.commands import predict as predict_command
from fmnist_jax.commands import run as run_command
from fmnist_jax.commands import shell
from fmnist_jax.recipes import CLAIMS
from tests.commands.conftest import SMALL
from tests.conftest import ROOT
from tests.small import SMALL as SMALL_NET

RUN = [sys.executable, str(ROOT / "experiments" / "run.py")]


SLOW = ("valid_2x2", "same_3x3", "he_stack", "deep_augmented", "sprint_91")


@pytest.mark.parametrize(
    "arch",
    [
        "small_dropout",
        *(pytest.param(arch, marks=pytest.mark.slow) for arch in SLOW),
        pytest.param("resnet20", marks=pytest.mark.soak),  # it compiles for minutes
    ],
)
def test_every_network_trains(arch, tmp_path, capsys):
    flags = ["--image-size", "48"] if arch == "deep_augmented" else []
    command = ["--arch", arch, *SMALL, "--epochs", "2", *flags, "--workdir", str(tmp_path)]
    assert run_command.main(command) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["arch"], report["steps"]) == (fm.RECIPES[arch].arch, 4)
    assert report["data"]["classes"] == ["Bag", "Trouser"]
    assert sum(layer["params"] for layer in report["network"]) == report["params"]
    assert (tmp_path / "report.html").stat().st_size > 50_000
    output = capsys.readouterr().out
    for expected in ("Compiling", "epoch   2", "images/s", "test accuracy"):
        assert expected in output
    assert ("claim of the Keras project" in output) == (arch in CLAIMS)
    assert shell.SAMPLE_NOTE in output


OWN = ["--arch", str(ROOT / "tests" / "nets.py") + ":LinenNet", "--arch-options", "width=3"]


def test_a_network_of_a_file_goes_through_the_commands(tmp_path, monkeypatch, capsys):
    """Run, the same command again, replay, predict and export, from other folders."""
    monkeypatch.chdir(ROOT / "tests")
    workdir = tmp_path / "run"
    flags = ["--arch", "nets.py:LinenNet", "--arch-options", "width=3", *SMALL, "--patience", "2"]
    loss = ["--loss", "nets.py:focal_loss", "--optimizer", "optax:lion"]
    assert run_command.main([*flags, *loss, "--workdir", str(workdir)]) == 0
    page = (workdir / "report.html").read_text()
    assert "<h1>LinenNet</h1>" in page
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert run_command.main([*OWN, *flags[4:], *loss[2:], "--loss",
                             str(ROOT / "tests" / "nets.py") + ":focal_loss",
                             "--workdir", str(workdir)]) == 0  # fmt: skip
    assert "This run is finished" in capsys.readouterr().out
    data = ["--sample", "--workdir", str(workdir)]
    assert run_command.main(["--replay", "2", *data]) == 2
    assert "pass it yourself, as loss= or --loss" in capsys.readouterr().err
    monkeypatch.chdir(ROOT)
    assert run_command.main(["--replay", "2", *data, "--loss", "tests/nets.py:focal_loss"]) == 0
    picture = ROOT / "fmnist_jax/data/sample/t10k-images-idx3-ubyte.gz"
    assert predict_command.main([str(workdir), str(picture), "--json", "--quiet"]) == 0
    assert export_command.main([str(workdir), "--quiet"]) == 0


def test_a_folder_of_pictures_is_trained_on(tmp_path, capsys, error_line):
    rng = np.random.default_rng(0)
    for number, split in enumerate(("train", "val", "test") * 12):
        place = tmp_path / "set" / split / "ab"[number // 3 % 2]
        place.mkdir(parents=True, exist_ok=True)
        picture = Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8))
        picture.save(place / f"{number}.png")
    command = ["--arch", SMALL_NET, "--batch-size", "4", "--epochs", "1", "--no-tta",
               "--dataset", str(tmp_path / "set"), "--workdir", str(tmp_path / "run")]  # fmt: skip
    assert run_command.main([*command, "--resize", "8", "--class-weights", "balanced"]) == 0
    output = " ".join(capsys.readouterr().out.split())
    for expected in ("8 x 8 pixels, colour", "a 12, b 12", "12 validation (the split of the data)"):
        assert expected in output
    assert "claim" not in output
    # Other pictures, other sizes: another run.
    assert run_command.main([*command, "--class-weights", "balanced"]) == 2
    assert "data_sha256" in capsys.readouterr().err
    assert claims_command.main(["--dataset", str(tmp_path / "set")]) == 2
    assert "the claims are about Fashion-MNIST, but this is" in error_line()


def test_the_folder_of_a_run_is_named_by_the_network(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_command.main([*OWN, *SMALL, "--dry-run"]) == 0
    output = capsys.readouterr().out
    assert "runs/LinenNet-seed0-" in output
    assert "width 3" in output


def test_same_command_finds_the_finished_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = [*SMALL, "--arch", "valid_2x2"]
    assert run_command.main([*command, "--quiet"]) == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")
    (workdir,) = (tmp_path / "runs").iterdir()
    assert run_command.main(command) == 0
    assert "This run is finished" in capsys.readouterr().out
    assert list((tmp_path / "runs").iterdir()) == [workdir]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "resnet"], "unknown recipe 'resnet'"),
        (["--data-dir", "/nowhere"], "/nowhere: not a folder"),
        (["--dataset", "/nowhere"], "/nowhere is neither a file nor a folder"),
        (["--sample", "--resize", "8"], "--resize and --skip-unreadable are for --dataset"),
        (["--sample", "--classes", "hat,bag"], "unknown class 'hat'"),
        (["--sample", "--classes", ""], "unknown class ''"),
        (["--epochs", "0"], "epochs is 0"),
        (["--seed", "-1"], "seed is -1"),
        (["--learning-rate", "-1"], "learning_rate is -1.0"),
        (["--checkpoint-every", "5"], "checkpoint_every is '5'"),
        (["--keep-every", "60s"], "keep_every is '60s'"),
        (["--augmentation-strength", "1"], "augmentation is 'none'"),
        (["--sample", "--batch-size", "5401"], "only 5,400 training examples"),
        (["--sample", "--train-examples", "6000"], "only 5,400 training examples"),
        (["--sample", "--arch", "he_stack", "--dropout", "0.5"], "he_stack has no dropout"),
        (["--sample", "--image-size", "64"], "image_size"),
        (["--sample", "--seeds", "0"], "is 0"),
        (["--sample", "--devices", "9" * 20], f"devices is {'9' * 20}, but JAX has"),
        (["--sample", "--arch", "deep_augmented", "--image-size", "30", "--dry-run"], "too small"),
        (["--sample", "--replay", "1"], "--replay needs --workdir"),
        (["--sample", "--replay", "1", "--workdir", "nowhere"], "nowhere holds no run"),
        (["--exclude", "nowhere"], "nowhere"),
        (["--exclude", "/dev/null", "--classes", "0,1"], "leave --classes out"),
        (["--sample", "--workdir", "/dev/null"], "cannot be used"),
    ],
)
def test_bad_input_exits_with_2_and_one_line(arguments, message, error_line):
    assert run_command.main(arguments) == 2
    assert message in error_line()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--epochs", "many"], ["--unknown"], ["extra"],
        ["--sample", "--data-dir", "x"], ["--list", "--dry-run"],
    ],
)  # fmt: skip
def test_bad_usage_exits_with_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        run_command.main(arguments)
    assert caught.value.code == 2
    assert re.fullmatch("error: .*; --help shows all flags\n", capsys.readouterr().err)


def test_divergence_exits_with_3(tmp_path, capsys):
    flags = ["--arch", "valid_2x2", "--optimizer", "sgd", "--learning-rate", "1e30"]
    assert run_command.main([*SMALL, *flags, "--epochs", "5", "--workdir", str(tmp_path)]) == 3
    assert "diverged: the loss is not finite in epoch 1, step" in capsys.readouterr().err


def test_dry_run_shows_the_plan(tmp_path, capsys):
    workdir = tmp_path / "run"
    flags = ["--dropout", "0.25", "--label-smoothing", "0.1", "--weight-decay", "0.001"]
    assert run_command.main(["--sample", "--dry-run", *flags, "--workdir", str(workdir)]) == 0
    output = " ".join(capsys.readouterr().out.split())
    for expected in (
        "Conv_2 │ conv, add, relu │ 3 x 3 x 128 │ 73,856 │ 1,329,408", "241,546 │ 6,565,194",
        "on a CPU: 3 conv_general_dilated, 2 reduce_window_max, 2 dot_general.",
        "GFLOP", "MiB", "1,290, 43 per epoch",
        "dropout 0.25", "label smoothing 0.1", "weight decay 0.001",
    ):  # fmt: skip
        assert expected in output
    # Three times the forward pass, without the gradient of the images. A multiplication and an
    # addition count separately. On a CPU the second convolution has 5 x 5 tiles of 16 products.
    second = (5 * 5 * 16 if jax.default_backend() == "cpu" else 11 * 11 * 9) * 32 * 64
    forward = 26 * 26 * 9 * 32 + second + 3 * 3 * 9 * 64 * 128 + 1152 * 128 + 1280
    expected_flops = 2 * 128 * (3 * forward - 26 * 26 * 9 * 32)
    flops = float(output.split(" GFLOP")[0].split()[-1]) * 1e9
    np.testing.assert_allclose(flops, expected_flops, rtol=0.2)
    assert not workdir.exists()


def test_seeds_and_replay(tmp_path, capsys):
    command = [*SMALL, "--arch", "valid_2x2", "--seeds", "2", "--workdir", str(tmp_path)]
    assert run_command.main(command) == 0
    output = capsys.readouterr().out
    summary = json.loads((tmp_path / "seeds.json").read_text())
    assert f"{summary['test_accuracy']['mean']:.2%} (95% interval" in output
    assert re.search(rf"ensemble +{summary['ensemble']['accuracy']:.2%}", output)
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"seed-0", "seed-1"}
    assert (tmp_path / "seeds.html").stat().st_size > 20_000

    workdir = tmp_path / "seed-1"
    assert run_command.main(["--sample", "--replay", "2", "--workdir", str(workdir)]) == 0
    output = capsys.readouterr().out
    assert "Step 2: mean loss" in output
    assert "gradient norm" in output
    assert (workdir / "plots" / "replay-2.png").stat().st_size > 5_000


@pytest.mark.slow
def test_a_folder_may_have_the_name_of_markup(tmp_path, capsys):
    workdir = tmp_path / "x[/b]:bag:"
    command = [*SMALL, "--arch", "valid_2x2", "--workdir", str(workdir)]
    assert run_command.main(command) == 0
    page = workdir / "report.html"
    assert f"The report is {page}." in capsys.readouterr().out
    page.unlink()
    page.mkdir()  # the report cannot be written
    assert run_command.main(command) == 2
    captured = capsys.readouterr()
    assert "test accuracy" in captured.out
    assert captured.err.startswith("error: ")


@pytest.mark.slow
def test_training_ends_without_a_reader(tmp_path):
    flags = [*SMALL, "--arch", "valid_2x2", "--workdir", str(tmp_path / "run")]
    process = subprocess.Popen([*RUN, *flags], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=120) == 0
    assert (tmp_path / "run" / "report.html").exists()


def test_list_shows_recipes_and_claims(capsys):
    assert run_command.main(["--list"]) == 0
    output = capsys.readouterr().out
    assert all(name in output for name in fm.RECIPES)
    assert "91.33%" in output


def test_interrupt_before_training_ends_the_process(tmp_path):
    command = [*RUN, "--sample", "--arch", "valid_2x2", "--workdir", str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode in (-signal.SIGINT, 130)  # the latter if it trains already
    assert "Traceback" not in errors


def test_interrupt_saves_and_the_same_command_resumes(tmp_path, capsys):
    flags = [*SMALL, "--arch", "valid_2x2", "--epochs", "30", "--workdir", str(tmp_path)]
    process = subprocess.Popen(
        [*RUN, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert any(line.startswith("epoch   1") for line in iter(process.stdout.readline, ""))
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "The same command resumes the run." in " ".join(errors.split())
    assert "Traceback" not in errors

    assert run_command.main(flags) == 0
    assert "Resuming after step" in capsys.readouterr().out
    assert json.loads((tmp_path / "report.json").read_text())["steps"] == 60
