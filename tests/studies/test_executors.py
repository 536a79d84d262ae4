"""Independent runs: one after the other, and on Ray with a killed worker."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fmnist_jax as fm
from fmnist_jax.errors import ConfigError
from fmnist_jax.runs import files
from fmnist_jax.studies.executors import RayExecutor
from tests.studies.ray_child import NUM_SEEDS, RECIPE

CHILD = Path(__file__).parent / "ray_child.py"


@pytest.mark.slow
def test_a_killed_ray_worker_is_retried_and_no_bit_changes(tmp_path):
    process = subprocess.run(
        [sys.executable, str(CHILD), str(tmp_path / "ray")],
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
        env=os.environ | {"RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"},
    )
    print(process.stdout)
    assert "os.fork" not in process.stderr
    lines = process.stdout.split("\n")
    assert sum(line.startswith("killed") for line in lines) == 1
    assert any("Resuming after step" in line for line in lines)
    for seed in range(NUM_SEEDS):
        assert sum(f"seed {seed}: epoch 12 of 12" in line for line in lines) == 1
    starts = [
        len(files.read_json(tmp_path / "ray" / f"seed-{seed}" / files.ENVIRONMENT))
        for seed in range(NUM_SEEDS)
    ]
    assert sorted(starts) == [1] * (NUM_SEEDS - 1) + [2]

    run = fm.Run(
        recipe=RECIPE, workdir=tmp_path / "here", train_examples=64, exclude=range(1000, 6000)
    )
    dataset = fm.load_fashion_mnist(sample=True)
    here = fm.fit_seeds(run, dataset, NUM_SEEDS, hooks=())
    hashes = next(line for line in lines if line.startswith("hashes")).split()[1:]
    assert hashes == here.report["params_sha256"]


def test_a_missing_ray_is_reported(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ConfigError, match="ray is not installed; pip install"):
        RayExecutor()


@pytest.mark.parametrize("address", ["127.0.0.1:9", "ray://127.0.0.1:9", "127.0.0.1:x"])
def test_a_cluster_that_cannot_be_reached_is_refused_at_once(address):
    with pytest.raises(ConfigError, match=f"the Ray cluster '{address}' cannot be reached"):
        RayExecutor(address)


def test_the_cluster_of_the_environment_is_checked(monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    with pytest.raises(ConfigError, match="the Ray cluster 'auto' cannot be reached"):
        RayExecutor("auto")
