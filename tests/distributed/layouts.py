"""Trains on several numbers of devices and prints hashes: python layouts.py RECIPE DEVICES...

A line for each number of devices: the number, the SHA-256 of the parameters, of the summed metrics
and of logits. RECIPE "small" is a network that compiles quickly. With JAX_COORDINATOR_ADDRESS the
devices of all processes are used, and the first process prints.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import dataclasses
import hashlib
import tempfile

import jax
import numpy as np

import fmnist_jax as fm
from fmnist_jax.digest import params_sha256
from fmnist_jax.distributed import processes
from fmnist_jax.runs.plan import create_plan
from fmnist_jax.train.loop import train_epoch
from fmnist_jax.train.predict import predict
from tests.small import SMALL

SHARDS = 8


def main(name: str, devices: list[str]) -> None:
    if "JAX_COORDINATOR_ADDRESS" in os.environ:
        processes.start()
    dataset = fm.load_fashion_mnist(sample=True)
    if name == "small":
        recipe = fm.Recipe(arch=SMALL, epochs=1, batch_size=64, augmentation="keras")
    else:
        recipe = fm.RECIPES[name]
        augmentation = "keras" if recipe.augmentation == "none" else recipe.augmentation
        recipe = dataclasses.replace(recipe, batch_size=64, augmentation=augmentation)
        if name == "deep_augmented":
            recipe = dataclasses.replace(recipe, image_size=96)
    recipe = dataclasses.replace(recipe, shards=SHARDS, microbatch_size=None)
    for num_devices in devices:
        run = fm.Run(
            recipe=recipe,
            workdir=Path(tempfile.gettempdir()),  # nothing is written
            devices=num_devices,
            train_examples=200,  # the last of four batches is padded
        )
        plan = create_plan(run, dataset)
        calls = train_epoch(
            plan.create_state(), plan.inputs, config=plan.config,
            next_num_steps=lambda _, left: min(left, 3),
        )  # fmt: skip
        *_, (state, metrics) = calls
        images = dataset.test_images[:200]
        logits = predict(
            state.variables, images, model=plan.model, batch_size=16, layout=plan.config.layout
        )
        hashes = [params_sha256({"params": state.params, "rest": state.model_state})]
        for value in (metrics, logits):
            leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(value)]
            hashes.append(hashlib.sha256(b"".join(leaf.tobytes() for leaf in leaves)).hexdigest())
        if processes.is_first():
            print(num_devices, *(sha256[:16] for sha256 in hashes), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
