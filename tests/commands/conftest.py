"""A finished run, and flags of the smallest one."""

import pytest

from fmnist_jax.commands import run
from tests.export.conftest import colour_classifier as colour_classifier
from tests.export.conftest import colour_workdir as colour_workdir
from tests.export.conftest import colours as colours

# 8 training, 12 validation and 200 test images. All tests share its compiled program.
SMALL = (
    "--sample", "--classes", "bag,trouser", "--train-examples", "8", "--batch-size", "4",
    "--epochs", "1", "--val-fraction", "0.01", "--no-tta",
)  # fmt: skip


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The folder of a run with the classes T-shirt/top and Trouser."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    command = [*SMALL, "--arch", "valid_2x2", "--quiet", "--workdir", str(workdir)]
    assert run.main(command) == 0
    return workdir


@pytest.fixture
def error_line(capsys):
    """Returns the error that a command printed, which is one line."""

    def read():
        captured = capsys.readouterr()
        assert captured.err.startswith("error: ")
        assert len(captured.err.splitlines()) == 1
        return captured.err

    return read
