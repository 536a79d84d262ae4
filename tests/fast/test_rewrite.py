"""Networks of many kinds, optimized and as they are, in float64."""

import functools
import re
from typing import Any

import chex
import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import fmnist_jax as fm
from fmnist_jax.fast.rewrite import explain_for_cpu, optimize_for_cpu
from tests.fast.comparison import compare, draw


def create_layer(name, features, *, train):
    """Creates a layer for float[batch, height, width, features]."""
    pool, conv = functools.partial, functools.partial(nn.Conv, kernel_size=(3, 3))
    layers = {
        "conv": lambda: nn.Conv(6, (3, 2), padding="VALID"),
        "strided": lambda: conv(8, strides=(2, 2)),
        "patches": lambda: nn.Conv(8, (2, 2), (2, 2)),
        "dilated": lambda: conv(5, kernel_dilation=2),
        "transposed": lambda: nn.ConvTranspose(4, (3, 3), (2, 2)),
        "grouped": lambda: conv(2 * features, feature_group_count=2 - features % 2),
        "depthwise": lambda: conv(2 * features, feature_group_count=features),
        "pointwise": lambda: nn.Conv(4, (1, 1), use_bias=False),
        "relu": lambda: nn.relu,
        "tanh": lambda: nn.tanh,
        "gelu": lambda: nn.gelu,
        "max_pool": lambda: pool(nn.max_pool, window_shape=(2, 2), strides=(2, 2)),
        "overlapping": lambda: pool(nn.max_pool, window_shape=(3, 3), strides=(2, 2)),
        "padded": lambda: pool(nn.max_pool, window_shape=(3, 2), strides=(1, 2), padding="SAME"),
        "avg_pool": lambda: pool(nn.avg_pool, window_shape=(3, 3), strides=(2, 2), padding="SAME"),
        "batch_norm": lambda: nn.BatchNorm(use_running_average=not train),
        "layer_norm": nn.LayerNorm,
        "group_norm": lambda: nn.GroupNorm(num_groups=1),
        "dense": lambda: nn.Dense(6),
        "dropout": lambda: nn.Dropout(0.3, deterministic=not train),
    }
    return layers[name]()


LAYERS = (
    "conv", "strided", "patches", "dilated", "transposed", "grouped", "depthwise", "pointwise",
    "relu", "tanh", "gelu", "max_pool", "overlapping", "padded", "avg_pool", "batch_norm",
    "layer_norm", "group_norm", "dense", "dropout",
)  # fmt: skip


class Generated(nn.Module):
    """Layers in a given order, then the mean over the pixels and a dense layer."""

    layers: tuple[str, ...]

    @nn.compact
    def __call__(self, x, *, train):
        """Maps float[batch, height, width, channels] to float[batch, 3]."""
        x = nn.Conv(4, (3, 3))(x)
        for layer in self.layers:
            x = create_layer(layer, x.shape[-1], train=train)(x)
        return nn.Dense(3)(x.mean((1, 2)))


@pytest.mark.parametrize(
    "seed", [*range(3), *(pytest.param(s, marks=pytest.mark.slow) for s in range(3, 24))]
)
def test_generated_networks(seed):
    generator = np.random.default_rng(seed)
    layers = tuple(generator.choice(LAYERS, size=5))
    # Few values, so that windows tie.
    pixels = generator.integers(-2, 3, size=(2, *generator.integers(9, 15, size=2), 3))
    with jax.enable_x64(True):
        model, images = Generated(layers), jnp.asarray(pixels, jnp.float64)
        keys = {"params": jax.random.key(seed), "dropout": jax.random.key(seed + 1)}
        variables = model.init(keys, images, train=False)
        variables = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), variables)
        stats = {name: leaf for name, leaf in variables.items() if name != "params"}

        def apply(params, images):
            return model.apply(
                {"params": params, **stats}, images, train=True, mutable=["batch_stats"],
                rngs={"dropout": keys["dropout"]},
            )  # fmt: skip

        compare(apply, variables["params"], images)
        unchanged = [
            op for op in explain_for_cpu(apply, variables["params"], images) if not op.replaced
        ]
        assert {op.name for op in unchanged} <= {"reduce_sum", "broadcast_in_dim"}


def every_framework():
    def body(conv, pool, dense):
        return lambda x: dense(pool(jax.nn.relu(conv(x))).ravel())

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.conv, self.dense = nnx.Conv(1, 4, (3, 3), rngs=rngs), nnx.Linear(144, 3, rngs=rngs)

        def __call__(self, x):
            pool = functools.partial(nnx.max_pool, window_shape=(2, 2), strides=(2, 2))
            return self.dense(pool(jax.nn.relu(self.conv(x))).reshape(len(x), -1))

    class Equinox(eqx.Module):
        conv: eqx.nn.Conv2d
        pool: eqx.nn.MaxPool2d
        dense: eqx.nn.Linear

        def __init__(self, key):
            self.conv = eqx.nn.Conv2d(1, 4, 3, padding=1, key=key)
            self.pool, self.dense = eqx.nn.MaxPool2d(2, 2), eqx.nn.Linear(144, 3, key=key)

        def __call__(self, x):
            return jax.vmap(body(self.conv, self.pool, self.dense))(x.transpose(0, 3, 1, 2))

    def haiku(x):
        x = jax.nn.relu(hk.Conv2D(4, 3)(x))
        return hk.Linear(3)(hk.max_pool(x, (2, 2, 1), (2, 2, 1), "VALID").reshape(len(x), -1))

    transformed: Any = hk.without_apply_rng(hk.transform(haiku))
    images = jnp.zeros((1, 12, 12, 1))
    nnx_graph, nnx_state = nnx.split(Nnx(nnx.Rngs(0)))
    params, static = eqx.partition(Equinox(jax.random.key(0)), eqx.is_array)
    return {
        "nnx": (lambda state, x: nnx.merge(nnx_graph, state)(x), nnx_state),
        "equinox": (lambda params, x: eqx.combine(params, static)(x), params),
        "haiku": (transformed.apply, transformed.init(jax.random.key(0), images)),
    }


@pytest.mark.parametrize("framework", ["nnx", "equinox", "haiku"])
def test_every_framework(framework):
    with jax.enable_x64(True):
        apply, params = every_framework()[framework]
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), params)
        compare(apply, params, draw(3, 12, 12, 1))
        names = {
            op.name for op in explain_for_cpu(apply, params, draw(3, 12, 12, 1)) if op.replaced
        }
    assert {"conv_general_dilated", "reduce_window_max"} <= names


def convolve(x, kernel):
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


@jax.custom_vjp
def clipped(x, kernel):
    return convolve(x, kernel)


def clipped_backward(residuals, cotangent):
    return jax.vjp(convolve, *residuals)[1](jnp.clip(cotangent, -0.5, 0.5))


clipped.defvjp(lambda x, kernel: (convolve(x, kernel), (x, kernel)), clipped_backward)


@jax.custom_jvp
def scaled(x, kernel):
    return convolve(x, kernel)


@scaled.defjvp
def _(arrays, tangents):
    return scaled(*arrays), 2 * jax.jvp(convolve, arrays, tangents)[1]


CALLS: dict[str, Any] = {
    "jit": jax.jit(convolve),
    "remat": jax.checkpoint(convolve),
    "scan": lambda x, k: lax.scan(lambda c, _: (jnp.tanh(convolve(c, k)), None), x, length=3)[0],
    "cond": lambda x, k: lax.cond(x.sum() > 0, convolve, lambda x, k: convolve(2 * x, k), x, k),
    "while": lambda x, k: lax.fori_loop(0, 3, lambda _, c: jnp.tanh(convolve(c, k)), x),
    "custom_vjp": clipped,
    "custom_jvp": scaled,
    "vmap": lambda x, k: jax.vmap(convolve, (None, 0))(x, jnp.stack([k, 2 * k])),
}


@pytest.mark.parametrize("name", CALLS)
def test_calls_are_entered(name):
    with jax.enable_x64(True):
        arrays = draw(2, 7, 7, 3), draw(3, 3, 3, 3)
        assert [op.replaced for op in explain_for_cpu(CALLS[name], *arrays)].count(True) >= 1
        function = optimize_for_cpu(CALLS[name])
        chex.assert_trees_all_close(function(*arrays), CALLS[name](*arrays), rtol=1e-11)
        gradient, plain = (
            jax.jit(jax.grad(lambda *a, f=f: jnp.sum(jnp.sin(f(*a))), argnums=(0, 1)))
            for f in (function, CALLS[name])
        )
        if name != "while":  # has no gradient
            chex.assert_trees_all_close(gradient(*arrays), plain(*arrays), rtol=1e-10, atol=1e-11)
        # The gradients of convolutions swap batch and channels unless they are rewritten.
        if name not in ("while", "custom_jvp"):
            assert "[f, 0, 1, b]" not in gradient.lower(*arrays).as_text()
            assert "[f, 0, 1, b]" in plain.lower(*arrays).as_text()


@pytest.mark.parametrize(
    "rule",
    [
        lambda x, t: t,
        # As near to the gradient of ReLU as can be.
        lambda x, t: lax.select(x > 0, jnp.zeros_like(t), t),
        lambda x, t: lax.select(x > 1, t, jnp.zeros_like(t)),
    ],
)
def test_a_gradient_of_its_own_is_kept(rule):
    @jax.custom_jvp
    def rectified(x):
        return jnp.maximum(x, 0)

    rectified.defjvp(lambda primals, tangents: (rectified(*primals), rule(*primals, *tangents)))

    @jax.custom_jvp
    def same(x):
        return x

    same.defjvp(lambda primals, tangents: (primals[0], 3 * tangents[0]))

    def apply(x, kernel):
        return nn.max_pool(same(rectified(convolve(x, kernel))), (2, 2), (2, 2))

    with jax.enable_x64(True):
        compare(apply, draw(2, 8, 8, 3), draw(3, 3, 3, 4))


def test_checkpoint_keeps_its_memory():
    def bytes_of(apply):
        shapes = (
            jax.ShapeDtypeStruct((2, 24, 24, 3), jnp.float32),
            jax.ShapeDtypeStruct((3, 3, 3, 3), jnp.float32),
        )
        residuals = jax.eval_shape(lambda *arrays: jax.vjp(apply, *arrays)[1], *shapes)
        return sum(leaf.size for leaf in jax.tree.leaves(residuals))

    def stack(block):
        return lambda x, kernel: block(block(block(x, kernel), kernel), kernel)

    def block(x, kernel):
        return jnp.tanh(convolve(jnp.tanh(convolve(x, kernel)), kernel))

    checkpointed = stack(jax.checkpoint(block))
    # A few constants more.
    assert bytes_of(optimize_for_cpu(checkpointed)) < 1.1 * bytes_of(checkpointed)
    assert bytes_of(checkpointed) < bytes_of(optimize_for_cpu(stack(block))) / 2


def test_other_devices_run_the_function_as_it_is(monkeypatch):
    model, images = fm.create_model("valid_2x2"), jnp.zeros((2, 28, 28, 1))
    variables = model.init(jax.random.key(0), images, train=False)

    def text(apply, platform):
        gradient = jax.grad(lambda v: jnp.sum(apply(v, images, train=False)))
        return jax.jit(gradient).trace(variables).lower(lowering_platforms=(platform,)).as_text()

    for platform in ("cuda", "tpu"):
        monkeypatch.setattr(jax, "default_backend", lambda name=platform: name)
        assert text(optimize_for_cpu(model.apply), platform) == text(model.apply, platform)
    monkeypatch.undo()
    assert text(optimize_for_cpu(model.apply), "cpu") != text(model.apply, "cpu")


def test_the_compiled_loop_has_only_convolutions_that_are_fast(sample):
    model = Generated(("max_pool", "strided", "batch_norm", "relu", "overlapping", "depthwise"))
    tx, streams = fm.create_optimizer("adam"), fm.create_streams(0)
    inputs = fm.TrainInputs(
        sample.train_images[:256], sample.train_labels[:256] % 3, streams, fm.Hyperparams(1e-3)
    ).checked()

    def compiled(optimize):
        config = fm.StepConfig(model=model, tx=tx, batch_size=64, optimize=optimize)
        state = fm.create_train_state(streams.init, config)
        lowered = fm.train_steps.lower(state, inputs, jnp.int32(2), config=config)
        forms = set(re.findall(r"dim_labels=(\S+?),? ", lowered.compile().as_text()))
        return forms, "select_and_scatter" in lowered.as_text()

    assert compiled(optimize=True) == ({"b01f_01io->b01f"}, False)
    forms, has_scatter = compiled(optimize=False)
    assert len(forms) > 1
    assert has_scatter


def test_errors_of_a_function_are_its_own():
    def fails(x):
        return x if x.sum() > 0 else -x

    with pytest.raises(jax.errors.TracerBoolConversionError):
        optimize_for_cpu(fails)(jnp.ones(3))
    with pytest.raises(ValueError, match="my own"):
        optimize_for_cpu(lambda x: (_ for _ in ()).throw(ValueError("my own")))(jnp.ones(3))


def test_what_is_no_array_passes():
    def apply(x, flag, *, name):
        return {"sum": x.sum() if flag else x, "name": name}

    result = optimize_for_cpu(apply)(jnp.ones(3), True, name="n")
    assert (float(result["sum"]), result["name"]) == (3.0, "n")
