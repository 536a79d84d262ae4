"""Networks of other people, and ours, give the same results in ONNX Runtime as in JAX."""

import functools
import json
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
import pytest
from jax import export, lax

import fmnist_jax as fm
from fmnist_jax.data.batches import scale
from fmnist_jax.errors import ConfigError
from fmnist_jax.export import formats
from fmnist_jax.export.onnx_graph import to_onnx
from fmnist_jax.recipes import CLAIMS
from fmnist_jax.runs.classifier import Classifier


class Network(nn.Module):
    """Layers of Flax Linen between images and logits."""

    layers: Callable[[jax.Array], jax.Array]

    @nn.compact
    def __call__(self, images, *, train):
        del train
        x = self.layers(images)
        return nn.Dense(10)(x.reshape(len(x), -1))


def create_classifier(model: Any, height: int, width: int) -> Classifier:
    images = jnp.zeros((1, height, width, 1))
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))
    rng = np.random.default_rng(0)

    def draw(mean: float, leaf: Any) -> np.ndarray:
        return rng.normal(mean, 0.1, leaf.shape).astype(np.float32)

    # Also the biases and statistics, which start at 0 and 1.
    variables = {"params": jax.tree.map(functools.partial(draw, 0), shapes["params"])}
    if "batch_stats" in shapes:
        variables["batch_stats"] = jax.tree.map(functools.partial(draw, 1), shapes["batch_stats"])
    recipe, names = fm.Recipe(arch="small_dropout", epochs=1), tuple("abcdefghij")
    return Classifier(model, variables, names, 1.5, recipe, 1, (height, width))


def check(classifier: Classifier, images: np.ndarray, found: Any) -> None:
    """Compares logits and probabilities with those of the network for all images at once."""
    apply = jax.jit(functools.partial(classifier.model.apply, train=False))
    logits = np.asarray(apply(classifier.variables, scale(jnp.asarray(images))))
    probabilities = jax.nn.softmax(logits / classifier.temperature)
    np.testing.assert_allclose(found[0], logits, atol=formats.TOLERANCE * np.abs(logits).max())
    np.testing.assert_allclose(found[1], probabilities, atol=formats.TOLERANCE)


def run_onnx(function: Callable[..., Any], images: Any, names: Sequence[str], array: Any) -> Any:
    content = to_onnx(function, images, names, {}).SerializeToString()
    return onnxruntime.InferenceSession(content).run(None, {"images": array})


def check_onnx(model: Any, height: int, width: int) -> None:
    classifier = create_classifier(model, height, width)
    images = np.random.default_rng(1).integers(0, 256, (5, height, width), np.uint8)
    function, shape = formats._function(classifier), formats._images(classifier)
    check(classifier, images, run_onnx(function, shape, formats.OUTPUTS, images))


def conv(x, features=4):
    return nn.Conv(features, (3, 3))(x)


def average_pools(x):
    x = nn.avg_pool(conv(x), (3, 3), padding="SAME")
    return nn.avg_pool(x, (3, 3), (2, 2), "SAME", count_include_pad=False)


def activations(x):
    x = 3 * conv(x)
    outputs = nn.gelu(x), nn.gelu(x, approximate=False), nn.silu(x), nn.softmax(x)
    return jnp.concatenate(outputs, axis=-1)


def class_token(x):
    x = nn.Conv(6, (4, 5), strides=(4, 5))(x).reshape(len(x), -1, 6)
    token = jnp.tile(jnp.arange(6.0)[None, None], (len(x), 1, 1))
    x = jnp.concatenate([token, x], axis=1)
    return (x + nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x)))[:, 0]


@pytest.mark.parametrize(
    "layers",
    [
        pytest.param(layers, id=name)
        for name, layers in {
            "dilation": nn.Conv(3, (3, 3), kernel_dilation=2),
            "groups": lambda x: nn.Conv(6, (3, 3), feature_group_count=3)(conv(x, 3)),
            "strides": nn.Conv(3, (3, 2), strides=(2, 3), padding="VALID"),
            "circular": nn.Conv(3, (3, 3), padding="CIRCULAR"),
            "convolution in one dimension": lambda x: nn.Conv(3, (3,))(x[..., 0]),
            "transposed": lambda x: nn.ConvTranspose(3, (2, 3), strides=(3, 2))(conv(x)),
            "transposed, dilated": lambda x: nn.ConvTranspose(
                3, (3, 2), strides=(1, 2), padding="VALID", kernel_dilation=(2, 1)
            )(conv(x)),
            "average pool": lambda x: nn.avg_pool(conv(x), (2, 2), (2, 2)),
            "padded average pools": average_pools,
            "max pool": lambda x: nn.max_pool(conv(x), (3, 2), (2, 2), "SAME"),
            "max pool of rows": lambda x: nn.max_pool(conv(x), (2, 1), (2, 1)),
            "batch norm": lambda x: nn.relu(nn.BatchNorm(use_running_average=True)(conv(x))),
            "layer norm and group norm": lambda x: nn.GroupNorm(2)(conv(nn.LayerNorm()(conv(x)))),
            "activations": activations,
            "attention": lambda x: nn.MultiHeadDotProductAttention(2, qkv_features=4)(conv(x)),
            "class token": class_token,
            "residual": lambda x: nn.relu(conv(nn.relu(conv(x))) + x),
            "global mean": lambda x: conv(x).mean(axis=(1, 2)),
            "strided pixels": lambda x: conv(x)[:, ::2, 1::3],
        }.items()
    ],
)
def test_layers_of_linen_run_in_onnx(layers):
    check_onnx(Network(layers), 8, 10)


@pytest.mark.parametrize(
    "options",
    [
        {"rhs": (4, 2, 3, 2), "window_strides": (2, 1)},
        {"rhs": (4, 1, 3, 2), "lhs_dilation": (2, 3), "feature_group_count": 2},
        {"rhs": (4, 2, 3, 2), "padding": [(-1, 1), (2, -1)]},
    ],
    ids=["plain", "transposed with groups", "negative padding"],
)
@pytest.mark.parametrize("layout", ["NCHW", "HCNW"])
def test_channels_may_be_any_axis(layout, options):
    kernel = np.random.default_rng(0).normal(size=options["rhs"]).astype(np.float32)

    def layers(x):
        x = jnp.moveaxis(
            jnp.concatenate([x, x**2], axis=-1), range(4), [*map(layout.index, "NHWC")]
        )
        defaults = {"window_strides": (1, 1), "padding": [(1, 2), (0, 1)]}
        return lax.conv_general_dilated(
            x, dimension_numbers=(layout, "OIHW", "NCHW"), **(defaults | options | {"rhs": kernel})
        )

    check_onnx(Network(layers), 6, 7)


OPERATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "square": lax.square,
    "erf": lax.erf,
    "erfc": lax.erfc,
    "logistic": lax.logistic,
    "abs": lax.abs,
    "sign": lax.sign,
    "floor": lax.floor,
    "ceil": lax.ceil,
    "round": lambda x: jnp.round(jnp.round(2 * x) / 2),  # also the halves
    "exp2": lax.exp2,
    "log1p": lambda x: lax.log1p(lax.abs(x)),
    "expm1": lax.expm1,
    "sin": lax.sin,
    "cos": lax.cos,
    "pow": lambda x: lax.pow(lax.abs(x), x),
    "integer_pow": lambda x: x**3,
    "select": lambda x: jnp.where(x > 0, x, 2 * x),
    "eq": lambda x: jnp.round(x) == 1,
    "ne": lambda x: jnp.round(x) != 1,
    "lt": lambda x: jnp.round(x) < 1,
    "le": lambda x: jnp.round(x) <= 1,
    "gt": lambda x: jnp.round(x) > 1,
    "ge": lambda x: jnp.round(x) >= 1,
    "logical": lambda x: (x > 1) | ~(x > -1) & (x > -2) ^ (x > 0.5),
    "is_finite": lambda x: jnp.isfinite(jnp.sign(x) / jnp.floor(jnp.abs(x))),
    "clamp": lambda x: lax.clamp(-0.5, x, 1.0),
    "concatenate": lambda x: jnp.concatenate([x, jnp.ones_like(x), 2 * x], axis=1),
    "split": lambda x: jnp.concatenate(jnp.split(x, [1, 3], axis=2)[::-1], axis=2),
    "min": lambda x: x.min(axis=2),
    "prod": lambda x: x.prod(axis=1),
    "sum over no axis": lambda x: x.sum(axis=()),
    "argmax": lambda x: x.argmax(axis=2),
    "integers": lambda x: x.astype(jnp.int32) * 3 + 1,
    "last axis first": lambda x: x.reshape(1, 3, 2, 2, order="F"),
    "expand": lambda x: x + jnp.broadcast_to(x.mean(axis=1, keepdims=True), x.shape),
    "padding": lambda x: jnp.pad(x, ((0, 0), (1, 2), (0, 1)), constant_values=-1),
    "negative padding": lambda x: lax.pad(x, 0.0, ((0, 0, 0), (-1, 1, 0), (1, -1, 0))),
    "a constant": lambda x: jnp.arange(3.0)[None],
}


def test_operations_run_in_onnx():
    @jax.vmap
    def apply(x):
        return [function(x[None])[0] for function in OPERATIONS.values()]

    (batch,) = export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, 3, 4), jnp.float32)
    x = np.random.default_rng(0).normal(0, 2, (5, 3, 4)).astype(np.float32)
    found = run_onnx(apply, images, list(OPERATIONS), x)
    for name, array, expected in zip(OPERATIONS, found, jax.jit(apply)(x), strict=True):
        assert (array.dtype, array.shape) == (expected.dtype, expected.shape), name
        np.testing.assert_allclose(array, expected, rtol=1e-5, atol=1e-6, err_msg=name)


def pool(x, **options):
    window = 1, 2, 1
    return lax.reduce_window(x[..., None], -jnp.inf, lax.max, window, (1, 1, 1), "VALID", **options)


def convolve(x, kernel, **options):
    return lax.conv_general_dilated(x[..., None], kernel, (2,), [(0, 0)], **options)


NHC = ("NHC", "HIO", "NHC")


@pytest.mark.parametrize(
    ("kind", "function"),
    [
        ("sort", jnp.sort),
        ("round", lax.round),
        ("and", lambda x: x.astype(jnp.int32) & 1),
        ("convert_element_type", lambda x: x.astype(jnp.bfloat16)),
        ("pad", lambda x: lax.pad(x, 0.0, ((0, 0, 0), (0, 0, 1)))),
        ("reduce_window_max", lambda x: pool(x, window_dilation=(1, 2, 1))),
        ("reduce_window_max", lambda x: pool(x, base_dilation=(1, 2, 1))),
        (
            "reduce_window_sum",
            lambda x: lax.reduce_window(
                x[..., None].astype(jnp.int32), 0, lax.add, (1, 2, 1), (1, 1, 1), "VALID"
            ),
        ),
        (
            "conv_general_dilated",
            lambda x: convolve(x, np.ones((2, 1, 1)), lhs_dilation=(2,), dimension_numbers=NHC),
        ),
        (
            "conv_general_dilated",
            lambda x: convolve(x, np.ones((2, 1, 2)), batch_group_count=2, dimension_numbers=NHC),
        ),
        (
            "conv_general_dilated",
            lambda x: convolve(x, x[:, :2, None].mean(0)[:, None], dimension_numbers=NHC),
        ),
        ("scan", lambda x: lax.scan(lambda y, z: (y + z, None), x[0], x)[0][None]),
    ],
)
def test_what_has_no_conversion_is_named(kind, function):
    images = jax.ShapeDtypeStruct((2, 6), jnp.float32)
    with pytest.raises(ConfigError, match=f"the operation '{kind}', which has no conversion"):
        to_onnx(lambda x: (function(x),), images, ["y"], {})


@pytest.mark.parametrize(
    ("shape", "function"),
    [
        (r"\(2\*a, b, 1\)", lambda x: lax.reshape(x, (2 * x.shape[0], x.shape[1], 1))),
        (r"\(0, b\)", lambda x: lax.reshape(x[:, :, :0], (0, x.shape[1]))),
    ],
)
def test_a_reshape_without_a_form_in_onnx_is_refused(shape, function):
    images = jax.ShapeDtypeStruct(export.symbolic_shape("a, b, 2"), jnp.float32)
    with pytest.raises(ConfigError, match=f"a reshape to {shape} cannot be written in ONNX"):
        to_onnx(lambda x: (function(x),), images, ["y"], {})


def test_positions_along_a_symbolic_axis_are_refused():
    images = jax.ShapeDtypeStruct(export.symbolic_shape("batch"), jnp.float32)
    with pytest.raises(ConfigError, match="the operation 'iota', which has no conversion"):
        to_onnx(lambda x: (x + lax.iota(jnp.float32, x.shape[0]),), images, ["y"], {})


def test_vmap_puts_no_reshape_behind_a_convolution():
    def layers(x):
        x = lax.slice(conv(x), (0, 0, 0, 0), (1, 8, 8, 4), (1, 1, 1, 1))
        x = jnp.pad(nn.max_pool(nn.relu(x), (2, 2)), [(0, 0)] * 4)
        return nn.BatchNorm(use_running_average=True)(conv(x)) + x

    classifier = create_classifier(Network(layers), 8, 8)
    model = to_onnx(formats._function(classifier), formats._images(classifier), ["y", "p"], {})
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.index("Reshape") < kinds.index("Conv")
    last = len(kinds) - kinds[::-1].index("Conv")
    assert "Reshape" not in kinds[kinds.index("Conv") : last]
    assert not {"Slice", "Pad", "Expand"}.intersection(kinds)


@pytest.mark.parametrize("name", formats.FORMATS)
def test_images_of_another_size_are_exported(name, tmp_path):
    classifier = create_classifier(Network(lambda x: nn.max_pool(conv(x), (2, 2), (2, 2))), 20, 24)
    path = formats.FORMATS[name](classifier, tmp_path)
    images = np.random.default_rng(0).integers(0, 256, (3, 20, 24), np.uint8)
    if name == "onnx":
        session = onnxruntime.InferenceSession(path)
        assert session.get_inputs()[0].shape == ["batch", 20, 24]
        check(classifier, images, session.run(None, {"images": images}))
    if name == "stablehlo":
        description = json.loads((tmp_path / "model.json").read_text())
        assert description["input"].startswith("images: uint8[batch, 20, 24]")
        loaded = export.deserialize(bytearray(path.read_bytes()))
        check(classifier, images, loaded.call(images))


@pytest.mark.parametrize(
    "name",
    [
        "small_dropout",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (*CLAIMS, "sprint_91", "sprint_93", "sprint_945", "resnet20")
            if name != "small_dropout"
        ),
    ],
)
def test_every_network_runs_in_onnx(name):
    check_onnx(fm.create_model(fm.RECIPES[name].arch), 28, 28)
