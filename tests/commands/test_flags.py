"""Flags, data and texts that the commands share."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import jax
import pytest
from rich.console import Console

import fmnist_jax as fm
from fmnist_jax.commands import flags, shell
from fmnist_jax.config import PARTS
from fmnist_jax.errors import ConfigError
from fmnist_jax.runs.plan import create_plan

# A value other than the default for each training flag.
RECIPE_VALUES: dict[str, Any] = {
    "epochs": 3, "batch_size": 8, "microbatch_size": 2, "shards": 4, "optimizer": "sgd",
    "learning_rate": 0.5, "schedule": "one_cycle", "weight_decay": 0.25, "dropout": 0.125,
    "label_smoothing": 0.5, "augmentation": "geometric", "augmentation_strength": 2.0,
    "dtype": "bfloat16", "image_size": 64, "val_fraction": 0.5, "patience": 4,
    "loss": "losses:focal", "matmul_precision": "bfloat16", "class_weights": "balanced",
} | {
    f"{part}_options": {"width": 3, "act": "relu", "sizes": [1, 2]} for part in PARTS
}  # fmt: skip
RUN_VALUES: dict[str, Any] = {
    "seed": 9, "train_examples": 5, "checkpoint_every": "3st", "keep_every": "2ep",
    "devices": "2",
}  # fmt: skip
SWITCHES: dict[str, Any] = {"tta": True, "log_grad_norms": True}


def parse(*given):
    parser = argparse.ArgumentParser()
    flags.add_training_flags(parser)
    return parser.parse_args(given)


def test_every_setting_has_a_flag():
    given = []
    for name, value in (RECIPE_VALUES | RUN_VALUES).items():
        given += [f"--{name.replace('_', '-')}"]
        given += [f"{k}={v}" for k, v in value.items()] if isinstance(value, dict) else [str(value)]
    options = parse(*given, "--tta", "--log-grad-norms")
    run = flags.create_run(options, "small_dropout", Path("w"))
    recipe = fm.Recipe(arch="small_dropout", **RECIPE_VALUES)
    assert run == fm.Run(recipe=recipe, workdir=Path("w"), **SWITCHES, **RUN_VALUES)
    described = {
        field.name
        for settings in (fm.Recipe, fm.Run)
        for field in dataclasses.fields(settings)
        if "help" in field.metadata
    }
    assert described == {*RECIPE_VALUES, *RUN_VALUES, *SWITCHES}


@pytest.mark.parametrize("arch", fm.RECIPES)
def test_without_flags_the_recipe_is_unchanged(arch):
    expected = fm.Run(recipe=fm.RECIPES[arch], workdir=Path("w"))
    assert flags.create_run(parse(), arch, Path("w")) == expected
    assert flags.given_settings(parse()) == {}


def test_a_network_selects_its_first_recipe():
    run = flags.create_run(parse("--train-examples", "40"), "sprint_wide", Path("b"))
    recipe = fm.RECIPES["sprint_945"]
    assert run == fm.Run(recipe=recipe, workdir=Path("b"), train_examples=40)


def test_excluded_images_are_in_no_split(sample, tmp_path):
    listed = tmp_path / "listed.txt"
    listed.write_text("# label issues\n\n" + "".join(f"{n}  # why\n" for n in range(3000)))
    arguments = parse("--sample", "--exclude", str(listed))
    assert flags.load_data(arguments, Console()).sha256 == sample.sha256
    plan = create_plan(flags.create_run(arguments, "valid_2x2", tmp_path), sample)
    assert min(plan.train_examples.min(), plan.val_examples.min()) == 3000

    listed.write_text("12\nabout 13\n")
    with pytest.raises(ConfigError, match="has the line 'about 13'"):
        flags.create_run(arguments, "valid_2x2", tmp_path)
    listed.write_text(f"# data SHA-256 {'0' * 64}\n12\n")
    with pytest.raises(ConfigError, match="lists images of other data"):
        flags.load_data(arguments, Console())


def test_folder_is_named_by_the_settings(sample):
    def name(*given, seeds=False, dataset=sample):
        run = flags.create_run(parse(*given), "valid_2x2", Path("unused"))
        return flags.name_workdir(Path("runs"), run, dataset, seeds=seeds)

    assert name() == name("--epochs", "10", "--checkpoint-every", "3st")
    names = {
        name(),
        name(seeds=True),
        name("--seed", "1"),
        name("--epochs", "11"),
        name("--train-examples", "9"),
        name(dataset=fm.select_classes(sample, "0,1")),
    }
    assert len(names) == 6
    assert all(path.parent == Path("runs") for path in names)


def test_out_of_memory_is_reported_in_one_line(capsys):
    def command(arguments, console):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nmany more lines")

    assert shell.run(command, argparse.Namespace(quiet=False, no_cache=False)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: out of memory; ")
    assert len(error.splitlines()) == 1
