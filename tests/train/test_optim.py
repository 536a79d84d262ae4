"""The optimizers against Keras, the schedules against optax."""

import chex
import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest

import fmnist_jax as fm
from fmnist_jax.train import optim

KERAS = {
    "adam": lambda: keras.optimizers.Adam(1e-3),
    "rmsprop": lambda: keras.optimizers.RMSprop(1e-3),
    "sgd": lambda: keras.optimizers.SGD(1e-3, momentum=0.9),
}


@pytest.mark.parametrize("name", KERAS)
def test_thirty_steps_follow_keras(name):
    rng = np.random.default_rng(0)
    start = rng.normal(size=200).astype(np.float32)
    # Gradients over six orders of magnitude, where the place of epsilon shows.
    scales = np.logspace(-6, 0, 200)
    gradients = [(scales * rng.normal(size=200)).astype(np.float32) for _ in range(30)]

    variable, reference = keras.Variable(start), KERAS[name]()
    tx = fm.create_optimizer(name, 1e-3)
    params, opt_state = jnp.asarray(start), tx.init(jnp.asarray(start))
    for gradient in gradients:
        reference.apply([jnp.asarray(gradient)], [variable])
        updates, opt_state = tx.update(jnp.asarray(gradient), opt_state, params)
        params = optax.apply_updates(params, updates)
    moved = np.asarray(variable.value) - start
    assert np.abs(moved).max() > 1e-3
    # To the bit: the same operations in the same order.
    np.testing.assert_array_equal(np.asarray(params), np.asarray(variable.value))


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("constant", lambda total: optax.constant_schedule(0.5)),
        ("cosine", lambda total: optax.cosine_decay_schedule(0.5, total)),
        ("one_cycle", lambda total: optax.cosine_onecycle_schedule(total, 0.5)),
    ],
)
def test_schedules_are_those_of_optax(name, reference):
    total = 200
    expected = reference(total)
    for step in (0, 1, 30, 59, 60, 61, 100, 199, 200, 250):
        schedule = optim.Schedule(jnp.int32(step), jnp.float32(0.5), jnp.int32(total))
        np.testing.assert_allclose(
            optim.learning_rate_at(schedule, name), expected(step), rtol=1e-5, atol=1e-7
        )


def test_the_schedule_advances_with_each_update():
    tx = fm.create_optimizer("sgd", 1.0, schedule="cosine", total_steps=4)
    opt_state = tx.init(jnp.zeros(()))
    rates = []
    for _ in range(4):
        rates.append(float(optim.learning_rate_at(opt_state.schedule, "cosine")))
        _, opt_state = tx.update(jnp.ones(()), opt_state)
    np.testing.assert_allclose(rates, [1, 0.853553, 0.5, 0.146447], rtol=1e-5)


def test_one_program_serves_every_learning_rate():
    @chex.assert_max_traces(n=1)
    def step(params, opt_state, tx):
        updates, opt_state = tx.update(params, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    compiled = jax.jit(step, static_argnums=2)
    results = set()
    for rate in (0.1, 0.2, 0.3):
        tx = fm.create_optimizer("adam", rate, schedule="cosine", total_steps=int(10 * rate))
        params, _ = compiled(jnp.ones(()), tx.init(jnp.ones(())), tx)
        results.add(float(params))
    assert len(results) == 3


def test_learning_rates_can_be_mapped_over():
    def trained(learning_rate):
        tx = fm.create_optimizer("sgd", learning_rate)
        params = jnp.ones(())
        updates, _ = tx.update(jnp.ones(()), tx.init(params), params)
        return optax.apply_updates(params, updates)

    np.testing.assert_allclose(jax.vmap(trained)(jnp.array([0.1, 0.5])), [0.9, 0.5], rtol=1e-6)


def test_optimizers_with_another_rule_differ():
    assert fm.create_optimizer("adam", 0.1) == fm.create_optimizer("adam", 0.2)
    assert fm.create_optimizer("adam", 0.1) != fm.create_optimizer("sgd", 0.1)
    cosine = fm.create_optimizer("adam", 0.1, schedule="cosine", total_steps=9)
    assert fm.create_optimizer("adam", 0.1) != cosine


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lion", {}, "choose one of adam"),
        ("adam", {"schedule": "step"}, "choose one of constant"),
        ("adam", {"schedule": "cosine"}, "the cosine schedule needs total_steps"),
    ],
)
def test_what_cannot_be_made_is_refused(name, options, message):
    with pytest.raises(fm.ConfigError, match=message):
        fm.create_optimizer(name, 0.1, **options)


@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_weight_decay_is_that_of_keras(name):
    rng = np.random.default_rng(0)
    start = {"bias": rng.normal(size=5), "kernel": rng.normal(size=(8, 5))}
    params = {leaf: jnp.asarray(value, jnp.float32) for leaf, value in start.items()}
    variables = [keras.Variable(value, name=leaf) for leaf, value in params.items()]
    reference = KERAS[name]()
    reference.weight_decay = 0.2
    reference.exclude_from_weight_decay(var_list=[variables[0]])
    tx = fm.create_optimizer(name, 1e-3, weight_decay=0.2)
    opt_state = tx.init(params)
    for _ in range(20):
        grads = {
            leaf: jnp.asarray(rng.normal(size=p.shape), jnp.float32) for leaf, p in params.items()
        }
        reference.apply(list(grads.values()), variables)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
    plain = fm.create_optimizer(name, 1e-3)
    assert plain == tx  # the decay is data
    for value, variable in zip(params.values(), variables, strict=True):
        np.testing.assert_allclose(value, variable.value, rtol=1e-5, atol=1e-6)
    # Without it the kernel would be elsewhere.
    assert 20 * 1e-3 * 0.2 * np.abs(start["kernel"]).max() > 1e-3
