"""Checkpoints: bits survive a round trip, and damage is detected."""

import errno
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import get_args

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

import fmnist_jax as fm
from fmnist_jax.config import OptimizerName
from fmnist_jax.errors import CheckpointError, CheckpointWarning
from fmnist_jax.runs import checkpoint as checkpoint_lib
from fmnist_jax.runs import files
from fmnist_jax.runs.checkpoint import Checkpoints
from tests.small import Small

GOLDEN = Path(__file__).parent / "golden"


def trees(*steps):
    """A tree for each step, no two alike."""
    return {
        step: {
            "kernel": jnp.arange(600, dtype=jnp.float32).reshape(20, 30) + step,
            "bias": jnp.full((5,), step, jnp.bfloat16),
            "count": jnp.int32(step),
            "none": jnp.zeros((0, 3)),
        }
        for step in steps
    }


def restore(checkpoints, like):
    restored = checkpoints.restore(like)
    assert restored is not None
    return restored


def save(directory, *steps, settings=None):
    checkpoints = Checkpoints(directory, settings)
    for step, tree in trees(*steps).items():
        checkpoints.save(step, tree, {"step": step}, score=step % 5 / 10)
    return checkpoints


def names(directory):
    """Names of all files but the record that something was saved."""
    return {path.name for path in directory.iterdir()} - {".saved"}


LIKE = jax.eval_shape(lambda: trees(0)[0])


def restored_step(directory):
    """The step that is restored; warnings of damage are ignored."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CheckpointWarning)
        tree, meta = restore(Checkpoints(directory), LIKE)
    chex.assert_trees_all_equal(tree, trees(meta["step"])[meta["step"]])
    chex.assert_trees_all_equal_shapes_and_dtypes(tree, LIKE)
    return meta["step"]


@pytest.mark.parametrize(
    "tx",
    [
        *map(fm.create_optimizer, get_args(OptimizerName)),
        optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.cosine_decay_schedule(1, 9))),
    ],
)
def test_a_round_trip_of_any_train_state_is_bitwise(tx, tmp_path):
    config = fm.StepConfig(model=Small(), tx=tx)
    state = fm.create_train_state(jax.random.key(0), config)
    state = jax.tree.map(lambda x: x + jnp.ones_like(x), state)
    Checkpoints(tmp_path).save(3, {"state": state}, {"note": 1.5})
    like = jax.eval_shape(lambda: {"state": state})
    tree, meta = restore(Checkpoints(tmp_path), like)
    assert isinstance(tree["state"], fm.TrainState)
    chex.assert_trees_all_equal(tree["state"], state)
    chex.assert_trees_all_equal_shapes_and_dtypes(tree["state"], state)
    assert meta == {"note": 1.5}


def test_the_latest_two_the_best_and_the_multiples_are_retained(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_every=4)
    assert checkpoints.steps() == []
    assert checkpoints.restore({"x": jnp.zeros(2)}) is None
    for step, score in ((1, 0.5), (2, None), (3, 0.9), (4, float("nan")), (5, 0.9), (6, 0.1)):
        checkpoints.save(step, {"x": jnp.full(2, float(step))}, {}, score)
    checkpoints.save(6, {"x": jnp.zeros(2)}, {})  # stays as it is
    assert checkpoints.steps() == [3, 4, 5, 6]
    assert names(tmp_path) == {"3", "4", "5", "6"}
    assert restore(checkpoints, {"x": jnp.zeros(2)})[0]["x"].tolist() == [6, 6]


def test_load_checkpoint_needs_no_model(tmp_path):
    save(tmp_path / "checkpoints", 1, 4, 6, settings={"seed": 3})
    latest, best, first = (fm.load_checkpoint(tmp_path, which) for which in ("latest", "best", 4))
    assert (latest.step, best.step, first.step) == (6, 4, 4)
    assert latest.meta == {"step": 6}
    assert latest.settings == {"seed": 3}
    assert best.score == 0.4
    expected = {name: np.asarray(leaf) for name, leaf in trees(6)[6].items()}
    chex.assert_trees_all_equal(latest.arrays, expected)
    assert all(type(array) is np.ndarray for array in latest.arrays.values())
    assert latest.arrays["bias"].dtype == ml_dtypes.bfloat16
    with pytest.raises(CheckpointError, match=r"no checkpoint 7; it has the steps \[4, 6\]"):
        fm.load_checkpoint(tmp_path, 7)


def test_a_checkpoint_of_the_first_format_can_be_read():
    # Written by format 1 and never since.
    checkpoint = fm.load_checkpoint(GOLDEN)
    assert (checkpoint.step, checkpoint.score) == (12, 0.75)
    assert checkpoint.meta == {"note": "golden"}
    assert checkpoint.settings == {"seed": 5}
    np.testing.assert_array_equal(
        checkpoint.arrays["params.kernel"], np.arange(12, dtype=np.float32).reshape(3, 4) / 8
    )
    np.testing.assert_array_equal(checkpoint.arrays["step"], np.int32(12))
    like = {"params": {"kernel": jnp.zeros((3, 4))}, "step": jnp.int32(0)}
    tree, meta = Checkpoints(GOLDEN / files.CHECKPOINTS, {"seed": 5}).restore_step(12, like)
    assert (tree["step"], tree["params"]["kernel"][2, 3], meta) == (12, 11 / 8, {"note": "golden"})


def test_a_newer_format_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_lib, "FORMAT", 3)
    save(tmp_path, 1)
    monkeypatch.undo()
    with pytest.raises(CheckpointError, match="has format 3; this version reads 1 to 2"):
        Checkpoints(tmp_path).restore(LIKE)


def test_other_settings_shapes_and_dtypes_are_refused_and_listed(tmp_path):
    save(tmp_path, 1, settings={"seed": 0, "recipe": {"epochs": 3}})
    like = {"kernel": jnp.zeros((20, 31)), "bias": jnp.zeros(5), "weight": jnp.zeros(2)}
    with pytest.raises(CheckpointError, match="of another run or version") as caught:
        Checkpoints(tmp_path, {"seed": 1, "recipe": {"epochs": 3}}).restore(like)
    assert str(caught.value).splitlines()[1:] == [
        "  seed: 0 found, 1 requested",
        "  arrays.bias: bfloat16[5] found, float32[5] requested",
        "  arrays.count: int32[] found, absent requested",
        "  arrays.kernel: float32[20, 30] found, float32[20, 31] requested",
        "  arrays.none: float32[0, 3] found, absent requested",
        "  arrays.weight: absent found, float32[2] requested",
    ]
    assert names(tmp_path) == {"1"}


def test_unfinished_checkpoints_are_ignored_and_removed(tmp_path):
    save(tmp_path, 1, 2)
    (tmp_path / "2").rename(tmp_path / ".saving-2")
    (tmp_path / ".removing-0").mkdir()
    assert restored_step(tmp_path) == 1
    assert names(tmp_path) == {"1"}
    (tmp_path / ".removing-0").mkdir()
    save(tmp_path, 2)
    assert names(tmp_path) == {"1", "2"}


def test_a_damaged_checkpoint_is_reported_renamed_and_skipped(tmp_path):
    save(tmp_path, 1, 2)
    path = next(path for path in (tmp_path / "2").rglob("d/*") if path.stat().st_size > 1000)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.warns(CheckpointWarning, match=rf"step 2 is damaged \(arrays/.*{path.name} has"):
        _, meta = restore(Checkpoints(tmp_path), LIKE)
    assert meta == {"step": 1}
    assert names(tmp_path) == {"1", "damaged-2"}
    save(tmp_path, 2)
    (tmp_path / "2" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"manifest\.json is missing"):
        Checkpoints(tmp_path).restore_step(2, LIKE)
    assert restored_step(tmp_path) == 1
    assert names(tmp_path) == {"1", "damaged-2", "damaged-2.1"}


def test_restore_fails_if_all_checkpoints_are_damaged(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "1" / "manifest.json").write_text("{}")
    with (
        pytest.warns(CheckpointWarning, match="renamed to"),
        pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged"),
    ):
        Checkpoints(tmp_path).restore(LIKE)
    with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged"):
        Checkpoints(tmp_path).restore(LIKE)


def test_restore_fails_if_all_checkpoints_are_missing(tmp_path):
    save(tmp_path, 1)
    shutil.rmtree(tmp_path / "1")
    with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged or missing"):
        Checkpoints(tmp_path).restore(LIKE)


def test_a_checkpoint_with_unreadable_score_is_retained(tmp_path):
    save(tmp_path, 4, 5)  # of scores 0.4 and 0
    (tmp_path / "4" / "manifest.json").write_text("{}")
    save(tmp_path, 6, 7)
    assert Checkpoints(tmp_path).steps() == [4, 6, 7]


def test_restore_removes_old_checkpoints(tmp_path, monkeypatch):
    monkeypatch.setattr(Checkpoints, "_remove_old", lambda self: None)
    save(tmp_path, 1, 2, 3)
    monkeypatch.undo()
    assert restored_step(tmp_path) == 3
    assert names(tmp_path) == {"2", "3"}


def test_files_that_cannot_be_removed_do_not_prevent_saves(tmp_path, monkeypatch):
    def refuse(path, ignore_errors=False):
        if not ignore_errors:
            raise OSError(39, "Directory not empty", str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    save(tmp_path, 1, 2, 3, 5, 6)  # 3 is the best
    assert restored_step(tmp_path) == 6
    assert names(tmp_path) == {"3", "5", "6", ".removing-1", ".removing-2"}


def test_an_unreadable_folder_is_a_failed_save(tmp_path, monkeypatch):
    checkpoints = save(tmp_path, 1)

    def refuse(path):
        raise OSError(24, "Too many open files", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(CheckpointError, match=r"step 2 was not written .*Too many open files"):
        checkpoints.save(2, trees(2)[2], {"step": 2})


def test_a_failed_sync_of_the_name_is_repeated(tmp_path, monkeypatch):
    save(tmp_path, 1)
    synced = []

    def sync(path):
        if path == tmp_path:
            synced.append((tmp_path / "2").exists())
            if len(synced) == 1:
                raise OSError(5, "Input/output error")

    monkeypatch.setattr(files, "sync", sync)
    with pytest.raises(CheckpointError, match="step 2 was not written"):
        save(tmp_path, 2)
    save(tmp_path, 2)
    assert synced == [True, True]


def test_a_failed_save_leaves_no_trace(tmp_path, monkeypatch):
    checkpoints = save(tmp_path, 1, 2)

    def full(path):
        if path.name == "manifest.json":
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "sync", full)
    with pytest.raises(CheckpointError, match=r"step 3 was not written .*No space left"):
        checkpoints.save(3, trees(3)[3], {"step": 3})
    assert names(tmp_path) == {"1", "2"}
    monkeypatch.undo()
    save(tmp_path, 3)
    assert restored_step(tmp_path) == 3


def test_files_are_synced_before_the_rename(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(
        files, "sync", lambda path: synced.append((path, (tmp_path / "3").exists()))
    )
    save(tmp_path, 3)
    before = {path.relative_to(tmp_path / ".saving-3") for path, named in synced if not named}
    everything = {path.relative_to(tmp_path / "3") for path in (tmp_path / "3").rglob("*")}
    assert before == everything | {Path()}
    after = [path for path, named in synced if named]
    assert tmp_path in after
    assert {path.name for path in after} <= {tmp_path.name, "..saved.new"}


KINDS = ("flip", "cut", "empty", "delete", "swap", "grow", "folder")


def damages(directory, generator):
    """Damages the newest checkpoint of two in one way after the other, without an end."""
    newest = directory / "2"
    for kind in itertools.cycle(KINDS):
        paths = sorted(path for path in newest.rglob("*") if path.is_file())
        path = generator.choice(paths)
        content = path.read_bytes()
        if kind == "flip" and content:
            position, bit = generator.randrange(len(content)), generator.randrange(8)
            changed = bytearray(content)
            changed[position] ^= 1 << bit
            path.write_bytes(changed)
        elif kind == "cut" and content:
            path.write_bytes(content[: generator.randrange(len(content))])
        elif kind == "grow":
            path.write_bytes(content + b"\0")
        elif kind == "empty":
            path.write_bytes(b"")
        elif kind == "delete":
            path.unlink()
        elif kind == "swap":
            # The file at the same place of the other step: Orbax draws the names of its data files.
            others = sorted(p for p in (directory / "1").rglob("*") if p.is_file())
            path.write_bytes(others[paths.index(path) % len(others)].read_bytes())
        elif kind == "folder":
            path.unlink()
            path.mkdir()
        yield f"{kind} {path.relative_to(newest)}"


def sweep(tmp_path, count, seed):
    save(tmp_path / "good", 1, 2)
    original = {
        path.relative_to(tmp_path / "good"): path.read_bytes()
        for path in (tmp_path / "good").rglob("*")
        if path.is_file()
    }
    broken = tmp_path / "broken"
    skipped = 0
    shutil.copytree(tmp_path / "good", broken)
    for _, what in zip(range(count), damages(broken, random.Random(seed)), strict=False):
        changed = any(
            not (broken / path).is_file() or (broken / path).read_bytes() != content
            for path, content in original.items()
        )
        step = restored_step(broken)
        # Unchanged bytes are restored, changed ones are detected.
        assert step == (1 if changed else 2), what
        skipped += changed
        shutil.rmtree(broken)
        shutil.copytree(tmp_path / "good", broken)
    return skipped


def test_damages_of_each_kind_are_detected(tmp_path):
    assert sweep(tmp_path, 3 * len(KINDS), seed=0) > len(KINDS)


@pytest.mark.slow
def test_500_damages_are_detected(tmp_path):
    assert sweep(tmp_path, 500, seed=2) > 350


@pytest.mark.soak
def test_5000_damages_are_detected(tmp_path):
    print(sweep(tmp_path, 5000, seed=1), "of 5000 damages changed a byte; each was detected")


def test_exchanged_checkpoints_are_detected(tmp_path):
    save(tmp_path, 1, 2)
    for old, new in (("1", "x"), ("2", "1"), ("x", "2")):
        (tmp_path / old).rename(tmp_path / new)
    with (
        pytest.warns(CheckpointWarning, match="its manifest is of step"),
        pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged"),
    ):
        Checkpoints(tmp_path).restore(LIKE)


def test_a_checkpoint_of_four_devices_loads_on_one(tmp_path):
    program = f"""
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from pathlib import Path
from fmnist_jax.runs.checkpoint import Checkpoints

mesh = jax.make_mesh((4,), ("devices",))
split = NamedSharding(mesh, PartitionSpec("devices"))
x = jax.device_put(jnp.arange(8.0), split)
assert len(x.sharding.device_set) == 4
Checkpoints(Path({str(tmp_path)!r})).save(1, {{"x": x}}, {{}})
"""
    flags = "--xla_force_host_platform_device_count=4"
    subprocess.run(
        [sys.executable, "-c", program], check=True, env=os.environ | {"XLA_FLAGS": flags}
    )
    tree, _ = restore(Checkpoints(tmp_path), {"x": jnp.zeros(8)})
    assert tree["x"].tolist() == list(range(8))
    assert len(tree["x"].sharding.device_set) == 1


def test_the_manifest_lists_arrays_and_files(tmp_path):
    save(tmp_path, 7, settings={"seed": 1})
    manifest = json.loads((tmp_path / "7" / "manifest.json").read_text())
    content = manifest["content"]
    assert (content["format"], content["step"], content["settings"]) == (2, 7, {"seed": 1})
    assert content["arrays"]["bias"] == {"dtype": "bfloat16", "shape": [5]}
    there = {
        path.relative_to(tmp_path / "7").as_posix()
        for path in (tmp_path / "7").rglob("*")
        if path.is_file()
    }
    assert set(content["files"]) == there - {"manifest.json"}


@pytest.mark.parametrize("name", ["manifest.json", "arrays"])
def test_a_file_that_cannot_be_read_for_now_is_no_damage(name, tmp_path, monkeypatch):
    checkpoints = save(tmp_path, 1, 2)
    before = names(tmp_path)

    def refuse(path, *args, **kwargs):
        if name in path.parts:
            raise OSError(errno.ESTALE, "Stale file handle", str(path))
        return read_bytes(path, *args, **kwargs)

    read_bytes = Path.read_bytes
    with monkeypatch.context() as patch:
        if name == "arrays":
            patch.setattr(checkpoint_lib, "sha256_file", refuse)
        else:
            patch.setattr(Path, "read_bytes", refuse)
        with pytest.raises(CheckpointError, match="cannot be read: Stale file handle"):
            checkpoints.restore(LIKE)
    assert names(tmp_path) == before
    assert restore(checkpoints, LIKE)[1] == {"step": 2}


def test_a_full_disk_is_found_before_anything_is_written(tmp_path, monkeypatch):
    checkpoints = save(tmp_path, 1)
    usage = shutil.disk_usage(tmp_path)
    # The kernel alone has 2,400 bytes.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2000))
    monkeypatch.setattr(checkpoint_lib, "_write_arrays", None)
    with pytest.raises(OSError, match="No space left on device"):
        checkpoints.save(2, trees(2)[2], {"step": 2}, score=0.5)
    assert names(tmp_path) == {"1"}


@pytest.mark.parametrize("name", ["x[1]", "a*b?", "{a,b}", os.fsdecode(b"\xff")])
def test_a_folder_may_have_any_name(name, tmp_path):
    checkpoints = save(tmp_path / name, 1, 2)
    tree, meta = restore(checkpoints, trees(2)[2])
    chex.assert_trees_all_equal(tree, trees(2)[2])
    assert meta == {"step": 2}


def test_older_checkpoints_stay_if_a_new_one_cannot_be_read_back(tmp_path, monkeypatch):
    checkpoints = save(tmp_path, 1, 2)
    read = checkpoint_lib._read_arrays

    def other(path, described):
        return {name: array + 1 for name, array in read(path, described).items()}

    monkeypatch.setattr(checkpoint_lib, "_read_arrays", other)
    with pytest.raises(CheckpointError, match="Orbax reads other values than it has written"):
        checkpoints.save(3, trees(3)[3], {})
    assert checkpoints.steps() == [1, 2]
