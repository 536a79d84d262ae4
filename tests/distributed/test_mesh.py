"""A batch that devices share: the same bits on any number of devices and processes."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fmnist_jax as fm
from fmnist_jax.distributed.mesh import create_mesh, on_each_device
from fmnist_jax.distributed.shards import sum_shards
from tests.flags import alike

LAYOUTS = Path(__file__).parent / "layouts.py"


def start(name, devices, *, num_devices=8, **variables):
    """Starts a process of so many CPU devices, with eight threads in every layout."""
    environment = alike() | {"JAX_NUM_CPU_DEVICES": str(num_devices), "NPROC": "8"}
    return subprocess.Popen(
        [sys.executable, str(LAYOUTS), name, *map(str, devices)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment, **variables},
    )


def start_processes(name, num_processes, num_devices):
    """Starts processes of so many devices each, and returns the output of the first."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    children = [
        start(
            name,
            ["all"],
            num_devices=num_devices,
            JAX_COORDINATOR_ADDRESS=address,
            JAX_NUM_PROCESSES=str(num_processes),
            JAX_PROCESS_ID=str(number),
        )
        for number in range(num_processes)
    ]
    first, *_ = [output(child) for child in children]
    return first


def output(process):
    text, _ = process.communicate(timeout=600)
    assert process.returncode == 0
    # Gloo prints lines of its own.
    return re.findall(r"^(?:\d|all)(?: [0-9a-f]{16}){3}$", text, re.MULTILINE)


def hashes(lines):
    return {line.partition(" ")[2] for line in lines}


def test_small_network_has_the_same_bits_on_one_and_four_devices():
    lines = output(start("small", [1, 4]))
    assert len(lines) == 2
    assert len(hashes(lines)) == 1, lines


@pytest.mark.slow
def test_small_network_has_the_same_bits_on_every_layout():
    lines = output(start("small", [1, 2, 4, 8]))
    assert [line.split()[0] for line in lines] == ["1", "2", "4", "8"]
    lines += start_processes("small", 4, 1)
    assert len(lines) == 5
    assert len(hashes(lines)) == 1, lines


# sprint_94 is sprint_93 with other epochs; sprint_91 has the same layers with half the filters.
NAMES = [name for name in fm.RECIPES if name != "sprint_94"]
SLOW = ("sprint_91",)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in SLOW else pytest.mark.soak)
        for name in NAMES
    ],
)
def test_recipe_has_the_same_bits_on_devices_and_processes(name):
    lines = output(start(name, [1, 8]))
    lines += start_processes(name, 2, 2)
    print(*lines, sep="\n")
    assert len(lines) == 3
    assert len(hashes(lines)) == 1, lines


@pytest.mark.soak
@pytest.mark.parametrize("name", NAMES)
def test_recipe_has_the_same_bits_on_four_processes(name):
    lines = [*output(start(name, [1])), *start_processes(name, 4, 1)]
    assert len(lines) == 2
    assert len(hashes(lines)) == 1, lines


def test_shards_are_summed_in_the_order_of_a_binary_tree():
    rng = np.random.default_rng(0)
    tree = {
        "w": rng.normal(size=(8, 3, 5)).astype(np.float32),
        "b": rng.normal(size=(8,)).astype(np.float32),
    }

    def expected(rows):
        first, second = np.split(rows, 2) if len(rows) > 1 else (rows[0], None)
        return first if second is None else expected(first) + expected(second)

    for mesh in (None, create_mesh(1)):
        total = lambda tree, mesh=mesh: sum_shards(tree, mesh)  # noqa: E731
        if mesh is not None:
            total = on_each_device(total, mesh)
        found = jax.jit(total)(jax.tree.map(jnp.asarray, tree))
        for name, rows in tree.items():
            np.testing.assert_array_equal(found[name], expected(rows))
    # The test can fail: another order gives other bits.
    assert any(np.any(expected(rows) != np.sum(rows, axis=0)) for rows in tree.values())
