"""A replayed step is bitwise that of the training."""

import dataclasses
import shutil

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fmnist_jax as fm
from fmnist_jax.errors import ConfigError, DamagedFileError
from fmnist_jax.runs import files
from fmnist_jax.runs.plan import create_plan
from fmnist_jax.train.loop import with_microbatch_size
from tests.conftest import train_step
from tests.small import Small

RECIPE = dataclasses.replace(
    fm.RECIPES["small_dropout"], epochs=3, batch_size=16, augmentation="keras", val_fraction=0.0,
    label_smoothing=0.1, augmentation_strength=0.5, dropout=0.4,
)  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny):
    """A run of twelve steps, and the pixels that the network saw in each."""
    seen = []

    class Watched(Small):
        @nn.compact
        def __call__(self, images, *, train, dropout=None):
            if train:
                jax.debug.callback(
                    lambda pixels: seen.append(np.asarray(pixels)), images, ordered=True
                )
            return super().__call__(images, train=train, dropout=dropout)

    workdir, model = tmp_path_factory.mktemp("replay") / "run", Watched()
    run = fm.Run(recipe=RECIPE, workdir=workdir, tta=False)
    fm.fit(run, tiny, hooks=(), model=model)
    jax.effects_barrier()
    assert len(seen) == 12
    return workdir, list(seen), model


# Compiled as in production: other flags round the two programs differently.
@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 2, 4, 5, 11, 12])
def test_the_batch_is_that_of_the_training(step, trained, tiny):
    workdir, seen, model = trained
    shown = fm.replay(workdir, tiny, step, model=model)
    count = 12 if step % 4 == 0 else 16  # 60 images: the last batch of an epoch is shorter
    assert shown.images.shape == (count, 28, 28)
    np.testing.assert_array_equal(shown.images, seen[step - 1][:count, ..., 0])
    np.testing.assert_array_equal(shown.labels, tiny.train_labels[shown.examples])


def test_every_example_is_in_one_step_of_an_epoch(trained, tiny):
    workdir, _, model = trained
    examples = [fm.replay(workdir, tiny, step, model=model).examples for step in (5, 6, 7, 8)]
    np.testing.assert_array_equal(np.sort(np.concatenate(examples)), np.arange(60))


def test_losses_and_gradient_are_those_of_the_step(trained, tiny, tmp_path):
    workdir, _, model = trained
    # The same without a checkpoint to start from.
    bare = shutil.copytree(workdir, tmp_path / "bare", ignore=lambda *_: ["checkpoints"])
    near, far = (fm.replay(place, tiny, 11, model=model) for place in (workdir, bare))
    np.testing.assert_array_equal(near.losses, far.losses)
    assert near.gradient_norm == far.gradient_norm

    plan = create_plan(fm.Run(recipe=RECIPE, workdir=workdir), tiny, model=model)
    sgd = dataclasses.replace(plan.config, tx=optax.sgd(1.0), schedule=None)
    tree = fm.load_checkpoint(workdir, 8).arrays
    params = jax.tree.map_with_path(
        lambda path, _: jnp.asarray(
            tree["state.params." + ".".join(str(entry.key) for entry in path)]
        ),
        plan.abstract_state.params,
    )
    # Step 9, by the definition of the step.
    shown = fm.replay(workdir, tiny, 9, model=model)
    batch = fm.Batch(
        jnp.asarray(shown.images[..., None]), jnp.asarray(shown.labels), jnp.ones(16, bool)
    )
    state = fm.TrainState(jnp.int32(8), params, {}, sgd.tx.init(params))
    after, metrics = train_step(
        state, batch, jax.random.fold_in(plan.streams.dropout, 8),
        plan.hyperparams._replace(learning_rate=None),
        config=with_microbatch_size(sgd, state, plan.inputs),
    )  # fmt: skip
    np.testing.assert_allclose(shown.losses.sum(), metrics.loss, rtol=1e-5)
    moved = jax.tree.map(jnp.subtract, params, after.params)  # the gradient, at rate 1
    norm = np.sqrt(sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(moved)))
    np.testing.assert_allclose(shown.gradient_norm, norm, rtol=1e-4)


@pytest.mark.parametrize("step", [0, 13, -1, 1.0, True])
def test_other_steps_are_refused(step, trained, tiny):
    with pytest.raises(ConfigError, match=r"step is .*; the run in .* has 1 to 12"):
        fm.replay(trained[0], tiny, step, model=trained[2])


def test_a_folder_without_run_and_other_data_are_refused(trained, tiny, sample, tmp_path):
    with pytest.raises(ConfigError, match="holds no run"):
        fm.replay(tmp_path, tiny, 1)
    with pytest.raises(ConfigError, match="data_sha256"):
        fm.replay(trained[0], sample, 1, model=trained[2])
    broken = shutil.copytree(trained[0], tmp_path / "broken")
    for content in (b"{", b'{"seed": "\xff"}', b"[" * 100_000):
        (broken / files.CONFIG).write_bytes(content)
        with pytest.raises(DamagedFileError, match=r"config\.json"):
            fm.replay(broken, tiny, 1)


def test_a_step_in_colour_has_the_augmented_colours(colour_workdir, colours):
    shown = fm.replay(colour_workdir, colours, 2)
    assert shown.images.shape == (20, 12, 20, 3)
    # Shifts move pixels by up to two and mirror; inside, the colours are those of the example.
    inside = shown.images[:, 2:-2, 2:-2].mean(axis=(1, 2))
    expected = colours.train_images[shown.examples].mean(axis=(1, 2)) / 255
    np.testing.assert_allclose(inside, expected, atol=0.04)
    examples = files.read_arrays(colour_workdir / files.EXAMPLES)
    assert examples["augmented"].shape == (6, 5, 12, 20, 3)
    assert examples["sample_images"].shape == (30, 12, 20, 3)
