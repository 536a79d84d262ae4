"""Commands survive failing output and report each error in one line."""

import argparse
import os
import pty
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from fmnist_jax.commands import run, shell
from fmnist_jax.errors import DataWarning
from tests.commands.conftest import SMALL
from tests.conftest import ROOT

RUN = [sys.executable, str(ROOT / "experiments" / "run.py"), *SMALL, "--arch", "valid_2x2"]


def environment(**variables):
    return os.environ | {"PYTHONPATH": str(ROOT)} | variables


@pytest.mark.slow
def test_training_ends_although_the_disk_of_the_log_is_full(tmp_path):
    with Path("/dev/full").open("w") as full:
        process = subprocess.run(
            [*RUN, "--workdir", str(tmp_path)], stdout=full, stderr=subprocess.PIPE, text=True,
            check=False,
        )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert "the output cannot be written (No space left on device)" in process.stderr
    assert (tmp_path / "report.html").exists()


@pytest.mark.slow
def test_training_ends_although_its_terminal_is_closed(tmp_path):
    leader, follower = pty.openpty()
    ignoring = ["sh", "-c", "trap '' HUP; exec \"$@\"", "sh"]  # SIGHUP, as nohup does
    process = subprocess.Popen(
        [*ignoring, *RUN, "--epochs", "20", "--workdir", str(tmp_path)],
        stdin=follower, stdout=follower, stderr=follower, start_new_session=True,
    )  # fmt: skip
    os.close(follower)
    seen = b""
    while b"Compiling" not in seen:
        seen += os.read(leader, 1000)
    os.close(leader)
    assert process.wait(timeout=120) == 0
    assert (tmp_path / "report.html").exists()


def test_a_table_on_a_full_disk_is_an_error(finished, tmp_path):
    Image.fromarray(np.eye(50, dtype=np.uint8) * 255).save(tmp_path / "a.png")
    command = [sys.executable, str(ROOT / "experiments" / "predict.py"), str(finished)]
    with Path("/dev/full").open("w") as full:
        process = subprocess.run(
            [*command, str(tmp_path), "--json"], stdout=full, stderr=subprocess.PIPE, text=True,
            check=False,
        )  # fmt: skip
    assert process.returncode == 2
    assert process.stderr == "error: the output cannot be written: No space left on device\n"


@pytest.mark.slow
def test_names_that_the_output_cannot_encode_are_escaped(finished, tmp_path):
    Image.fromarray(np.eye(50, dtype=np.uint8) * 255).save(tmp_path / "\u9774.png")
    command = [sys.executable, str(ROOT / "experiments" / "predict.py"), str(finished)]
    process = subprocess.run(
        [*command, str(tmp_path)], capture_output=True, text=True, check=False,
        env=environment(PYTHONIOENCODING="ascii"),
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert "\\u9774.png" in process.stdout


def test_a_long_warning_is_one_line(capsys):
    def command(_arguments, _console):
        warnings.warn("a path " * 50, DataWarning, stacklevel=2)
        return 0

    assert shell.run(command, argparse.Namespace(quiet=False, no_cache=True)) == 0
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("platform", ["cuda", "nothing"])
def test_a_platform_without_a_device_is_named(platform, tmp_path):
    process = subprocess.run(
        [*RUN, "--workdir", str(tmp_path)], capture_output=True, text=True, check=False,
        env=environment(JAX_PLATFORMS=platform),
    )  # fmt: skip
    assert process.returncode == 2
    assert process.stderr.startswith(
        f"error: JAX finds no device, with JAX_PLATFORMS={platform}; unset "
    )
    assert len(process.stderr.splitlines()) == 1


def test_a_variable_of_jax_that_has_no_such_value_is_named(tmp_path):
    process = subprocess.run(
        [*RUN, "--workdir", str(tmp_path)], capture_output=True, text=True, check=False,
        env=environment(JAX_ENABLE_X64="garbage"),
    )  # fmt: skip
    assert process.returncode == 2
    assert process.stderr.startswith("error: ")
    assert len(process.stderr.splitlines()) == 1


def test_settings_for_debugging_do_not_end_a_command(tmp_path):
    with jax.numpy_dtype_promotion("strict"), jax.transfer_guard("disallow"):
        assert run.main([*SMALL, "--arch", "valid_2x2", "--workdir", str(tmp_path)]) == 0


@pytest.mark.slow
def test_a_backend_and_settings_of_matplotlib_have_no_effect(tmp_path):
    unreadable = tmp_path / "matplotlibrc"
    unreadable.write_bytes(b"font.size: \xff\xfe")
    process = subprocess.run(
        [*RUN, "--workdir", str(tmp_path), "--quiet"], capture_output=True, text=True, check=False,
        env=environment(MPLBACKEND="missing", MATPLOTLIBRC=str(unreadable)),
    )  # fmt: skip
    assert (process.returncode, process.stderr) == (0, "")
    assert (tmp_path / "report.html").exists()


@pytest.mark.slow  # and only for root
@pytest.mark.parametrize("script", ["run", "sweep"])
def test_an_interrupt_ends_the_first_process_of_a_container(script, tmp_path):
    flags = ["--over", "learning_rate=1e-4:1e-2"] if script == "sweep" else ["--epochs", "1000000"]
    container = subprocess.Popen(
        ["unshare", "--pid", "--fork", "--mount-proc", sys.executable,
         str(ROOT / "experiments" / f"{script}.py"), *SMALL, "--arch", "valid_2x2", *flags,
         "--workdir", str(tmp_path)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert container.stdout is not None
    container.stdout.readline()
    children = subprocess.check_output(["pgrep", "-P", str(container.pid)], text=True)
    os.kill(int(children), signal.SIGINT)
    container.communicate(timeout=120)
    assert container.returncode == 130
