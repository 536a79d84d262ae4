"""The training loop as one program that outlives the process."""

import contextlib
import dataclasses
import functools
import hashlib
import importlib
import os
import pickle
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fmnist_jax as fm
from fmnist_jax.nn import models
from fmnist_jax.runs import environment, files, program
from fmnist_jax.runs.plan import create_plan
from fmnist_jax.train import loop as train
from fmnist_jax.xla.cache import enable_compilation_cache
from fmnist_jax.xla.jit import platform_jit

# `fm.fit` is the function.
fit_module = importlib.import_module("fmnist_jax.runs.fit")

# Two updates an epoch.
RECIPE = dataclasses.replace(
    fm.RECIPES["valid_2x2"], epochs=2, batch_size=30, optimizer="rmsprop", val_fraction=0.2
)


def make_plan(workdir, dataset, seed=0, checkpoint_every="1ep", **changes):
    recipe = dataclasses.replace(RECIPE, **changes)
    run = fm.Run(recipe=recipe, workdir=workdir, seed=seed, checkpoint_every=checkpoint_every)
    return create_plan(run, dataset)


def fit(plan, progress=None):
    return fit_module.fit_plan(plan, progress=progress or fm.Silence())


class Listener(fm.Silence):
    def __init__(self):
        self.texts = []

    def say(self, text):
        self.texts.append(text)

    @property
    def compiled(self):
        return any("Compiling" in text for text in self.texts)


@pytest.fixture(scope="module")
def expected(tmp_path_factory, tiny):
    """The same runs with nothing kept, by their batch size."""
    return {
        size: fit(make_plan(tmp_path_factory.mktemp("expected"), tiny, batch_size=size))
        for size in (30, 48)
    }


@pytest.fixture
def kept(tmp_path):
    """Programs are kept here, as for a new process."""
    return enable_compilation_cache(tmp_path / "kept")


def loops(folder):
    return sorted(folder.glob("loop-*"))


def test_a_kept_loop_is_found_and_makes_the_same_bits(kept, expected, tmp_path, tiny, monkeypatch):
    first = Listener()
    result = fit(make_plan(tmp_path / "first", tiny), first)
    assert first.compiled
    assert len(loops(kept)) == 1
    chex.assert_trees_all_equal(result.state, expected[30].state)

    monkeypatch.setattr(program, "compile_loop", None)
    monkeypatch.setattr(fit_module, "train_steps", None)
    second = Listener()
    result = fit(make_plan(tmp_path / "second", tiny), second)
    assert not second.compiled
    chex.assert_trees_all_equal(result.state, expected[30].state)
    assert len(files.read_json(tmp_path / "second" / files.ENVIRONMENT)) == 1
    # Seed, rate and length are data.
    other = make_plan(tmp_path / "third", tiny, seed=7, learning_rate=0.01, epochs=1)
    assert fit(other).report["steps"] == 2


class Diverging(models.Valid2x2):
    def __call__(self, images, *, train, dropout=None):
        return super().__call__(images, train=train, dropout=dropout) * jnp.nan


@pytest.mark.parametrize(
    ("wrong", "checkpoint_every", "batch_size"),
    [("sgd", "1st", 30), ("sgd", "1ep", 30), ("sgd", "2ep", 48), ("diverging", "1ep", 30)],
)
def test_a_wrong_loop_is_seen_before_anything_is_saved(
    wrong, checkpoint_every, batch_size, kept, expected, tmp_path, tiny, monkeypatch
):
    changes = {"checkpoint_every": checkpoint_every, "batch_size": batch_size}
    plan = make_plan(tmp_path / "run", tiny, **changes)
    path = program._path(plan)
    # Something else of the same shapes, under this plan's name.
    with monkeypatch.context() as patch:
        patch.setattr(program, "_path", lambda _: path)
        if wrong == "diverging":
            patch.setattr(models, "ARCHS", {**models.ARCHS, "valid_2x2": Diverging})
        else:
            changes["optimizer"] = wrong
        program.keep_program(make_plan(tmp_path / "wrong", tiny, **changes))
    stored = program.load_program(plan)
    assert stored is not None
    assert stored.sha256 != program.program_sha256(plan)

    listener = Listener()
    result = fit(plan, listener)
    assert listener.compiled
    chex.assert_trees_all_equal(result.state, expected[batch_size].state)
    losses = [[line["loss"] for line in one.history] for one in (result, expected[batch_size])]
    assert losses[0] == losses[1]
    (entry,) = files.read_json(plan.run.workdir / files.ENVIRONMENT)
    assert entry["program"] == program.program_sha256(plan)
    # It was exchanged for the right one.
    stored = program.load_program(plan)
    assert stored is not None
    assert stored.sha256 == program.program_sha256(plan)


@pytest.mark.parametrize("damage", ["emptied", "cut", "a bit", "no pickle", "another pickle"])
def test_what_cannot_be_read_is_compiled_anew(damage, kept, tmp_path, tiny):
    plan = make_plan(tmp_path / "run", tiny)
    program.keep_program(plan)
    (path,) = loops(kept)
    content = path.read_bytes()

    def signed(body):
        return hashlib.sha256(body).digest() + body

    path.write_bytes(
        {
            "emptied": b"",
            "cut": content[: len(content) // 2],
            "a bit": content[:1000] + bytes([content[1000] ^ 1]) + content[1001:],
            "no pickle": signed(b"none"),
            "another pickle": signed(pickle.dumps(("", b"", None, None))),
        }[damage]
    )
    assert program.load_program(plan) is None
    program.keep_program(plan)
    assert program.load_program(plan) is not None


def test_the_newest_are_kept(kept, tmp_path, tiny):
    kept.mkdir(parents=True)
    for age in range(60):
        (kept / f"loop-{age:02}").touch()
        os.utime(kept / f"loop-{age:02}", (1e9 - age, 1e9 - age))
    plan = make_plan(tmp_path / "run", tiny)
    program.keep_program(plan)
    assert program.load_program(plan) is not None
    names = [path.name for path in loops(kept) if len(path.name) == len("loop-00")]
    assert names == [f"loop-{age:02}" for age in range(49)]


def test_what_goes_into_the_loop_is_in_its_name(kept, tmp_path, tiny, monkeypatch):
    def name(**changes):
        path = program._path(make_plan(tmp_path / "run", tiny, **changes))
        assert path is not None
        assert path.parent == kept
        return path.name

    here = name()
    assert name(seed=3, learning_rate=0.3, epochs=7) == here
    others = [
        name(arch="same_3x3"),
        name(batch_size=29),
        name(optimizer="sgd"),
        name(schedule="constant"),
        name(dtype="bfloat16"),
        name(augmentation="geometric"),
        name(label_smoothing=0.1),
        name(weight_decay=0.1),
        name(val_fraction=0.5),
    ]
    versions = environment.versions()
    with monkeypatch.context() as patch:
        patch.setattr(environment, "versions", lambda: versions | {"flax": "0.99"})
        others.append(name())
    with monkeypatch.context() as patch:
        patch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=false")
        others.append(name())
    read_bytes = Path.read_bytes
    with monkeypatch.context() as patch:
        patch.setattr(
            Path, "read_bytes", lambda path: read_bytes(path) + b"#" * (path.stem == "ops")
        )
        others.append(name())
    with jax.numpy_rank_promotion("warn"):
        others.append(name())
    assert len({here, *others}) == 1 + len(others)


def test_constants_are_part_of_what_is_computed(tmp_path, tiny, monkeypatch):
    def sha256(constant):
        class Scaled(models.Valid2x2):
            def __call__(self, images, *, train, dropout=None):
                return super().__call__(images, train=train, dropout=dropout) * constant

        monkeypatch.setattr(models, "ARCHS", {**models.ARCHS, "valid_2x2": Scaled})
        return program.program_sha256(make_plan(tmp_path / "run", tiny))

    ramp = np.arange(10, dtype=np.float32).reshape(1, 10)
    assert sha256(ramp) == sha256(ramp.copy()) != sha256(ramp + 1)
    # A program within a program has its own.
    nested = jax.jit(lambda x: jax.jit(lambda y: y * ramp)(x)).trace(ramp).jaxpr
    assert not nested.consts
    (found,) = program._constants(nested)
    np.testing.assert_array_equal(found, ramp)


def test_nothing_is_kept_without_a_folder_or_with_calls_to_python(
    tmp_path, tiny, monkeypatch, request
):
    assert program.keep_program(make_plan(tmp_path / "run", tiny)) is None
    assert program.load_program(make_plan(tmp_path / "run", tiny)) is None

    class Calling(models.Valid2x2):
        def __call__(self, images, *, train, dropout=None):
            jax.debug.callback(lambda: None)
            return super().__call__(images, train=train, dropout=dropout)

    folder = request.getfixturevalue("kept")
    monkeypatch.setattr(models, "ARCHS", {**models.ARCHS, "valid_2x2": Calling})
    assert program.keep_program(make_plan(tmp_path / "run", tiny)) is None
    assert not loops(folder)


def test_a_folder_that_cannot_be_written_costs_time_alone(tmp_path, tiny, expected):
    (tmp_path / "file").write_text("")
    enable_compilation_cache(tmp_path / "file" / "below")
    with pytest.warns(UserWarning, match="persistent compilation cache"):
        result = fit(make_plan(tmp_path / "run", tiny))
    chex.assert_trees_all_equal(result.state, expected[30].state)


@pytest.mark.parametrize("careful", [True, False])
def test_what_jax_has_kept_does_not_spoil_what_is_kept(
    careful, kept, expected, tmp_path, tiny, monkeypatch
):
    def forget():
        # As in a new process: the same function to JAX's cache, another to `jit`.
        loop = train.train_steps
        again = functools.wraps(loop._function)(
            lambda *args, **kwargs: loop._function(*args, **kwargs)
        )
        static = loop._static_argnames
        steps = platform_jit(static_argnames=static, donate_argnames=("state",))(again)
        monkeypatch.setattr(program, "train_steps", steps)

    if not careful:
        monkeypatch.setattr(program, "_without_cache", contextlib.nullcontext)
    plan = make_plan(tmp_path / "run", tiny)
    forget()
    program.compile_loop(plan)
    forget()
    program.keep_program(plan)
    assert len(loops(kept)) == 1
    listener = Listener()
    result = fit(plan, listener)
    # XLA's own fault, which is why care is taken; if this fails, it may be mended by now.
    assert listener.compiled != careful
    chex.assert_trees_all_equal(result.state, expected[30].state)
