"""Networks of NNX, Equinox and Haiku against their twin in Linen, and through the loop."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fmnist_jax as fm
from fmnist_jax.errors import ConfigError
from tests.conftest import train_step
from tests.nets import MOMENTUM, NETS, EquinoxNet, HaikuNet, LinenNet, NnxNet


def config_of(network, **options):
    model = fm.create_model(network, width=3, **options)
    return fm.StepConfig(model=model, tx=optax.sgd(1.0), batch_size=8)


# The parameters in the order and the layout of LinenNet: convolution, normalization, dense layer.
def as_linen(network, params):
    if network is LinenNet:
        parts = (params["Conv_0"], params["BatchNorm_0"], params["Dense_0"])
        return [(part.get("kernel", part.get("scale")), part["bias"]) for part in parts]
    if network is NnxNet:
        parts = (params["conv"], params["norm"], params["dense"])
        return [(part.get("kernel", part.get("scale")), part["bias"]) for part in parts]
    if network is HaikuNet:
        conv, norm, dense = (
            params[f"haiku_net/{name}"] for name in ("conv2_d", "batch_norm", "linear")
        )
        scale, offset = norm["scale"].ravel(), norm["offset"].ravel()
        return [(conv["w"], conv["b"]), (scale, offset), (dense["w"], dense["b"])]
    conv, dense = params.layers
    return [
        (conv.weight.transpose(2, 3, 1, 0), conv.bias[:, 0, 0]),
        (params.norm.weight, params.norm.bias),
        (dense.weight.T, dense.bias),
    ]


def from_linen(network, params, values):
    """Puts the values of LinenNet into the parameters of another network."""
    (kernel, bias), (scale, offset), (weights, dense_bias) = values
    if network is EquinoxNet:
        places = lambda p: [  # noqa: E731
            p.layers[0].weight, p.layers[0].bias, p.norm.weight, p.norm.bias,
            p.layers[1].weight, p.layers[1].bias,
        ]  # fmt: skip
        arrays = [kernel.transpose(3, 2, 0, 1), bias[:, None, None], scale, offset, weights.T,
                  dense_bias]  # fmt: skip
        import equinox as eqx

        return eqx.tree_at(places, params, arrays)
    if network is HaikuNet:
        return {
            "haiku_net/conv2_d": {"w": kernel, "b": bias},
            "haiku_net/batch_norm": jax.tree.map(
                lambda array: array.reshape(1, 1, 1, -1), {"scale": scale, "offset": offset}
            ),
            "haiku_net/linear": {"w": weights, "b": dense_bias},
        }
    names = ("conv", "norm", "dense")
    kinds = ("kernel", "scale", "kernel")
    return {
        name: {kind: value[0], "bias": value[1]}
        for name, kind, value in zip(names, kinds, values, strict=True)
    }


def batch_mean(network, model_state):
    """The mean of the batch, from the running mean after one step."""
    if network is LinenNet:
        return model_state["batch_stats"]["BatchNorm_0"]["mean"] / (1 - MOMENTUM)
    if network is NnxNet:
        return model_state["state"]["norm"]["mean"] / (1 - MOMENTUM)
    if network is HaikuNet:
        return model_state["state"]["haiku_net/batch_norm/~/mean_ema"]["average"].ravel()
    means = [leaf for leaf in jax.tree.leaves(model_state) if leaf.shape == (3,)]
    return means[0] / (1 - MOMENTUM)


@pytest.fixture
def batch():
    random = np.random.default_rng(0)
    images = jnp.asarray(random.random((8, 12, 12, 1), np.float32))
    return fm.Batch(images, jnp.arange(8) % 10, jnp.ones(8, bool))


@pytest.mark.parametrize("network", NETS[1:])
def test_a_step_is_that_of_the_twin(network, batch):
    """Loss, gradients and statistics, with the same weights and without dropout."""
    twin, config = config_of(LinenNet, rate=0.0), config_of(network, rate=0.0)
    key = jax.random.key(1)
    expected = fm.create_train_state(key, twin, image_shape=(12, 12))
    state = fm.create_train_state(key, config, image_shape=(12, 12))
    values = as_linen(LinenNet, expected.params)
    # Copies: the step of the twin donates its state.
    params = jax.tree.map(jnp.copy, from_linen(network, state.params, values))
    state = state._replace(params=params)
    expected, wanted = train_step(expected, batch, key, config=twin)
    state, metrics = train_step(state, batch, key, config=config)
    np.testing.assert_allclose(metrics.loss, wanted.loss, rtol=1e-5)
    # Learning rate 1: the parameters differ by the gradients.
    chex.assert_trees_all_close(
        as_linen(network, state.params), as_linen(LinenNet, expected.params), rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(
        batch_mean(network, state.model_state), batch_mean(LinenNet, expected.model_state),
        rtol=1e-4, atol=1e-6,
    )  # fmt: skip


@pytest.mark.parametrize("network", NETS)
def test_dropout_follows_its_key_and_is_off_in_evaluation(network, batch):
    config = config_of(network, rate=0.5)
    variables = fm.create_train_state(jax.random.key(0), config, image_shape=(12, 12)).variables
    mutable = sorted(set(variables) - {"params"})

    @jax.jit
    def train(key):
        rngs = {"dropout": key}
        return config.model.apply(variables, batch.images, train=True, rngs=rngs, mutable=mutable)[
            0
        ]

    first, again, other = (train(jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, other)
    evaluated = config.model.apply(variables, batch.images, train=False)
    chex.assert_shape(evaluated, (8, 10))
    # No image depends on the others.
    alone = config.model.apply(variables, batch.images[:1], train=False)
    np.testing.assert_allclose(evaluated[:1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "network", [NnxNet, EquinoxNet, pytest.param(HaikuNet, marks=pytest.mark.slow)]
)
def test_seeds_in_vmap_shards_and_one_program(network, tiny):
    model = fm.create_model(network, width=3)
    assert model == fm.create_model(network, width=3)
    assert hash(model) == hash(fm.create_model(network, width=3))
    assert model != fm.create_model(network, width=4)

    def train(seed, config):
        streams = fm.create_streams(seed)
        hyperparams = fm.Hyperparams(0.01)
        inputs = fm.TrainInputs(tiny.train_images, tiny.train_labels, streams, hyperparams)
        state = fm.create_train_state(streams.init, config)
        return fm.train_steps(state, inputs, 2, config=config)

    config = fm.StepConfig(model=model, tx=fm.create_optimizer("adam"), batch_size=16)
    together = jax.jit(jax.vmap(lambda seed: train(seed, config)[1].loss))(jnp.arange(2))
    alone = [float(train(seed, config)[1].loss) for seed in range(2)]
    np.testing.assert_allclose(together, alone, rtol=1e-4)
    before = fm.train_steps._outer(is_bfloat16=False)._cache_size()
    train(3, fm.StepConfig(model=fm.create_model(network, width=3), tx=config.tx, batch_size=16))
    assert fm.train_steps._outer(is_bfloat16=False)._cache_size() == before
    sharded = fm.StepConfig(model=model, tx=config.tx, batch_size=16, layout=fm.Shards(2))
    assert np.isfinite(float(train(0, sharded)[1].loss))


@pytest.mark.parametrize("network", NETS)
def test_unknown_options_are_refused(network):
    with pytest.raises(ConfigError, match=r"takes no such option: widht; it takes num_classes"):
        fm.create_model(network, widht=3)
