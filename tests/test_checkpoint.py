"""Checkpoints: what is saved comes back, what is not whole is not seen."""

import shutil

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import fmnist_jax as fm
from fmnist_jax.checkpoint import Checkpoints


@pytest.mark.parametrize("name", fm.ARCHS)
def test_a_train_state_comes_back_to_the_bit(name, tmp_path):
    tx = fm.create_optimizer("adam", 1e-3, schedule="cosine", total_steps=9)
    state = fm.create_train_state(jax.random.key(0), fm.create_model(name), tx)
    state = jax.tree.map(lambda x: x + jnp.ones_like(x), state)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(3, {"state": state}, {"note": 1.5})
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 3
        tree, meta = checkpoints.restore(3, jax.eval_shape(lambda: {"state": state}))
    assert isinstance(tree["state"], fm.TrainState)
    chex.assert_trees_all_equal(tree["state"], state)
    chex.assert_trees_all_equal_dtypes(tree["state"], state)
    assert meta == {"note": 1.5}


def test_the_two_newest_are_kept(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() is None
        for step in (1, 2, 5):
            checkpoints.save(step, {"x": jnp.full(2, step)}, {})
        checkpoints.save(5, {"x": jnp.zeros(2, int)}, {})  # stays as it is
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "5"]
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(5, {"x": jnp.zeros(2, int)})[0]["x"].tolist() == [5, 5]


def test_an_older_step_is_not_refused_in_silence(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(5, {"x": jnp.zeros(2)}, {})
        with pytest.raises(fm.CheckpointError, match="step 4 was refused: step 5 is newer"):
            checkpoints.save(4, {"x": jnp.zeros(2)}, {})


def test_unfinished_saves_are_not_seen(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": jnp.ones(2)}, {})
        checkpoints.save(2, {"x": jnp.ones(2)}, {})
    (tmp_path / "2" / "commit_success.txt").unlink()
    (tmp_path / "7").mkdir()
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.latest_step() == 1
        checkpoints.save(2, {"x": jnp.full(2, 3.0)}, {})
        assert checkpoints.restore(2, {"x": jnp.ones(2)})[0]["x"].tolist() == [3, 3]


def test_what_cannot_be_read_is_named(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"x": jnp.ones(2)}, {})
        with pytest.raises(fm.CheckpointError, match=f"step 1 in {tmp_path} cannot be read"):
            checkpoints.restore(1, {"y": jnp.ones(2)})
        shutil.rmtree(tmp_path / "1" / "tree")
        with pytest.raises(fm.CheckpointError, match="step 1"):
            checkpoints.restore(1, {"x": jnp.ones(2)})


def test_any_optax_state_can_be_saved(tmp_path):
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.cosine_decay_schedule(1, 9)))
    state = fm.create_train_state(jax.random.key(0), fm.create_model("same_3x3"), tx)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, state, {})
        chex.assert_trees_all_equal(checkpoints.restore(0, state)[0], state)
