"""The optimizers against Keras, the schedules against optax."""

import functools

import chex
import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest

import fmnist_jax as fm
from fmnist_jax.errors import ConfigError
from tests.small import Linear
from tests.train.test_step import make_batch

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


def muon_in_float64(matrix):
    """Three Newton-Schulz steps with the coefficients of Jordan et al. 2024."""
    x = matrix / np.linalg.norm(matrix)
    for _ in range(3):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x


def test_muon_is_the_published_update():
    rng = np.random.default_rng(0)
    shapes = {"kernel": (3, 3, 2, 5), "wide": (1, 1, 4, 9), "dense": (6, 3), "bias": (5,)}
    params = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    ours = jax.tree.map(lambda param: jnp.asarray(param, jnp.float32), params)
    tx = fm.create_optimizer("muon")
    opt_state, learning_rate = tx.init(ours), 0.1
    momentum = jax.tree.map(np.zeros_like, params)
    for step in range(5):
        grads = {name: rng.normal(size=shape) for name, shape in shapes.items()}
        updates, opt_state = tx.update(
            jax.tree.map(lambda grad: jnp.asarray(grad, jnp.float32), grads),
            opt_state, ours, learning_rate=learning_rate,
        )  # fmt: skip
        ours = optax.apply_updates(ours, updates)
        for name, grad in grads.items():
            if grad.ndim == 4:
                # Means with bias correction, as in optax; the scale has no effect.
                momentum[name] = 0.6 * momentum[name] + 0.4 * grad
                direction = 0.6 * momentum[name] / (1 - 0.6 ** (step + 2))
                direction += 0.4 * grad / (1 - 0.6 ** (step + 1))
                filters = direction.reshape(-1, grad.shape[-1]).T
                param = params[name] * np.sqrt(grad.shape[-1]) / np.linalg.norm(params[name])
                direction = muon_in_float64(filters).T.reshape(grad.shape)
                params[name] = param - learning_rate * direction
            else:
                momentum[name] = 0.85 * momentum[name] + grad
                rate = learning_rate * (0.1 if grad.ndim == 2 else 1)
                params[name] = params[name] - rate * (grad + 0.85 * momentum[name])
    chex.assert_trees_all_close(ours, params, rtol=1e-4, atol=1e-5)


def test_muon_makes_the_singular_values_alike():
    tx, rng = fm.create_optimizer("muon"), np.random.default_rng(0)
    grad = jnp.asarray(rng.normal(size=(3, 3, 4, 8)), jnp.float32)
    params = {"kernel": jnp.ones_like(grad) / 6}  # of norm sqrt(8): not rescaled
    updates, _ = tx.update({"kernel": grad}, tx.init(params), params, learning_rate=1.0)
    left, before, right = np.linalg.svd(np.asarray(grad).reshape(36, 8), full_matrices=False)
    after = np.diag(left.T @ -np.asarray(updates["kernel"]).reshape(36, 8) @ right.T)
    assert before.max() / before.min() > 2
    assert 0.6 < after.min() <= after.max() < 1.3


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
        ("linear", lambda total: optax.linear_schedule(0.5, 0.0, total)),
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
    with pytest.raises(ConfigError, match="adam has no learning rate; set learning_rate"):
        tx.update(params, tx.init(params), params)


PARAMS = {"kernel": jnp.array([[1.0, -2.0], [0.5, 3.0]]), "bias": jnp.array([0.1, 0.2])}
GRADS = jax.tree.map(lambda param: 0.3 * param + 0.1, PARAMS)


@pytest.mark.parametrize(
    ("factory", "options", "scalars"),
    [
        (optax.adam, {"b1": 0.8}, {"learning_rate": 0.02}),
        (optax.sgd, {"momentum": 0.9, "nesterov": True}, {"learning_rate": 0.02}),
        (optax.adamw, {"mask": {"kernel": True, "bias": False}},
         {"learning_rate": 0.02, "weight_decay": 0.3}),
        (optax.lion, {}, {"learning_rate": 0.02}),
        (functools.partial(optax.adamw, b1=0.5), {}, {"learning_rate": 0.02}),
    ],
)  # fmt: skip
def test_a_factory_of_optax_takes_traced_scalars(factory, options, scalars):
    ours = fm.with_learning_rate(factory, **options)
    expected = factory(**options, **scalars)
    state, expected_state = ours.init(PARAMS), expected.init(PARAMS)
    update = jax.jit(ours.update)
    for _ in range(3):
        updates, state = update(GRADS, state, PARAMS, **scalars)
        expected_updates, expected_state = expected.update(GRADS, expected_state, PARAMS)
        chex.assert_trees_all_close(updates, expected_updates, rtol=1e-6)


def test_a_schedule_acts_on_a_factory_of_optax(tiny):
    config = fm.StepConfig(
        model=Linear(), tx=fm.with_learning_rate(optax.sgd), schedule=fm.create_schedule("linear")
    )
    state, batch = fm.create_train_state(jax.random.key(0), config), make_batch(tiny, 8)
    moves = []
    for step in (0, 5, 10):
        after, _ = fm.train_step(
            state._replace(step=jnp.int32(step)), batch, jax.random.key(0),
            fm.Hyperparams(0.1, total_steps=10), config=config,
        )  # fmt: skip
        moves.append(optax.tree.norm(jax.tree.map(jnp.subtract, after.params, state.params)))
    np.testing.assert_allclose(moves, np.array([1, 0.5, 0]) * moves[0], rtol=1e-4)


@pytest.mark.parametrize(
    ("tx", "hyperparams", "refused"),
    [
        (optax.adam(1e-3), fm.Hyperparams(1e-3), "learning_rate"),
        (optax.adamw(1e-3), fm.Hyperparams(weight_decay=0.1), "weight_decay"),
        (optax.inject_hyperparams(optax.sgd)(learning_rate=0.1), fm.Hyperparams(1e-3),
         "learning_rate"),
        (fm.with_learning_rate(optax.sgd), fm.Hyperparams(1e-3, weight_decay=0.1), "weight_decay"),
        (optax.adam(1e-3), fm.Hyperparams(), None),
        (fm.create_optimizer("adam"), fm.Hyperparams(1e-3, weight_decay=0.1), None),
        (optax.chain(optax.clip_by_global_norm(1.0), fm.create_optimizer("sgd")),
         fm.Hyperparams(1e-3), None),
        (fm.with_learning_rate(optax.adamw), fm.Hyperparams(1e-3, weight_decay=0.1), None),
    ],
)  # fmt: skip
def test_scalars_without_effect_are_refused(tx, hyperparams, refused, tiny):
    config = fm.StepConfig(model=Linear(), tx=tx)
    state, batch = fm.create_train_state(jax.random.key(0), config), make_batch(tiny, 8)
    if refused is None:
        fm.train_step(state, batch, jax.random.key(0), hyperparams, config=config)
        return
    with pytest.raises(ConfigError, match=f"{refused} has no effect on this optimizer"):
        fm.train_step(state, batch, jax.random.key(0), hyperparams, config=config)


def test_a_factory_without_a_learning_rate_is_refused():
    with pytest.raises(ConfigError, match="scale_by_adam has no parameter learning_rate"):
        fm.with_learning_rate(optax.scale_by_adam)
    tx = fm.with_learning_rate(optax.adam)
    with pytest.raises(ConfigError, match="adam has no learning rate"):
        tx.update(GRADS, tx.init(PARAMS), PARAMS)
