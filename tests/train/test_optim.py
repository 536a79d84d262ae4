"""The optimizers against Keras, the schedules against optax."""

import chex
import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest

import fmnist_jax as fm
from fmnist_jax.errors import ConfigError

KERAS = {
    "adam": lambda: keras.optimizers.Adam(1e-3),
    "rmsprop": lambda: keras.optimizers.RMSprop(1e-3),
    "sgd": lambda: keras.optimizers.SGD(1e-3, momentum=0.9),
}


@pytest.mark.parametrize("name", KERAS)
def test_thirty_steps_are_bitwise_those_of_keras(name):
    rng = np.random.default_rng(0)
    start = rng.normal(size=200).astype(np.float32)
    # Gradients over six orders of magnitude, where the place of epsilon shows.
    scales = np.logspace(-6, 0, 200)
    grads = [(scales * rng.normal(size=200)).astype(np.float32) for _ in range(30)]

    variable, reference = keras.Variable(start), KERAS[name]()
    tx = fm.create_optimizer(name)
    params, opt_state = jnp.asarray(start), tx.init(jnp.asarray(start))
    for grad in grads:
        reference.apply([jnp.asarray(grad)], [variable])
        updates, opt_state = tx.update(jnp.asarray(grad), opt_state, params, learning_rate=1e-3)
        params = optax.apply_updates(params, updates)
    moved = np.asarray(variable.value) - start
    assert np.abs(moved).max() > 1e-3
    np.testing.assert_array_equal(np.asarray(params), np.asarray(variable.value))


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_weight_decay_follows_keras(name):
    rng = np.random.default_rng(0)
    start = {"bias": rng.normal(size=5), "kernel": rng.normal(size=(8, 5))}
    params = {leaf: jnp.asarray(value, jnp.float32) for leaf, value in start.items()}
    variables = [keras.Variable(value, name=leaf) for leaf, value in params.items()]
    reference = KERAS[name]()
    reference.weight_decay = 0.2
    reference.exclude_from_weight_decay(var_list=[variables[0]])
    tx = fm.create_optimizer(name)
    opt_state = tx.init(params)
    for _ in range(20):
        grads = {
            leaf: jnp.asarray(rng.normal(size=p.shape), jnp.float32) for leaf, p in params.items()
        }
        reference.apply(list(grads.values()), variables)
        updates, opt_state = tx.update(
            grads, opt_state, params, learning_rate=1e-3, weight_decay=0.2
        )
        params = optax.apply_updates(params, updates)
    for value, variable in zip(params.values(), variables, strict=True):
        np.testing.assert_allclose(value, variable.value, rtol=1e-5, atol=1e-6)
    # Without weight decay the kernel would differ by more than the tolerance.
    assert 20 * 1e-3 * 0.2 * np.abs(start["kernel"]).max() > 1e-3


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("cosine", lambda total: optax.cosine_decay_schedule(0.5, total)),
        ("one_cycle", lambda total: optax.cosine_onecycle_schedule(total, 0.5)),
    ],
)
def test_schedules_follow_optax(name, reference):
    expected = reference(200)
    schedule = fm.create_schedule(name)
    assert schedule is not None
    for step in (0, 1, 30, 59, 60, 61, 100, 199, 200):
        np.testing.assert_allclose(
            0.5 * schedule(jnp.float32(step / 200)), expected(step), rtol=1e-5, atol=1e-7
        )


def test_one_program_serves_every_learning_rate():
    @chex.assert_max_traces(n=1)
    def step(params, opt_state, learning_rate, tx):
        updates, opt_state = tx.update(params, opt_state, params, learning_rate=learning_rate)
        return optax.apply_updates(params, updates), opt_state

    compiled = jax.jit(step, static_argnums=3)
    results = set()
    for learning_rate in (0.1, 0.2, 0.3):
        tx = fm.create_optimizer("adam")
        params, _ = compiled(jnp.ones(()), tx.init(jnp.ones(())), learning_rate, tx)
        results.add(float(params))
    assert len(results) == 3


def test_learning_rates_can_be_vmapped():
    tx = fm.create_optimizer("sgd")

    def train(learning_rate):
        params = jnp.ones(())
        updates, _ = tx.update(jnp.ones(()), tx.init(params), params, learning_rate=learning_rate)
        return optax.apply_updates(params, updates)

    np.testing.assert_allclose(jax.vmap(train)(jnp.array([0.1, 0.5])), [0.9, 0.5], rtol=1e-6)


def test_unknown_names_and_missing_learning_rates_are_refused():
    with pytest.raises(ConfigError, match="unknown optimizer 'lion'; choose one of adam"):
        fm.create_optimizer("lion")
    with pytest.raises(ConfigError, match="unknown schedule 'step'; choose one of constant"):
        fm.create_schedule("step")  # type: ignore[arg-type]
    tx = fm.create_optimizer("adam")
    params = jnp.ones(())
    with pytest.raises(ConfigError, match="adam has no learning rate; pass Hyperparams"):
        tx.update(params, tx.init(params), params)
