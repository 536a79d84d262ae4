"""The layers of networks of several frameworks, against Flax, XLA and arithmetic."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import fmnist_jax as fm
from fmnist_jax.nn.summary import format_rows, summarize
from tests.nets import NETS, EquinoxNet, HaikuNet, LinenNet, NnxNet

IMAGES = jax.ShapeDtypeStruct((1, 28, 28, 1), jnp.float32)


def shapes(model) -> Any:
    """The shapes of the variables of a model."""
    return jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), IMAGES)


def rows_of(model):
    return summarize(model, shapes(model), (28, 28))


def column(rows, name):
    return {row["layer"]: row[name] for row in rows}


class Stock(nn.Module):
    """Convolution, batch normalization, pooling, dropout and dense layers, without padding."""

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.Conv(8, (3, 3), padding="VALID")(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Conv(16, (3, 3), padding="VALID", feature_group_count=4)(x))
        x = nn.Dropout(0.5, deterministic=not train)(x).reshape(len(x), -1)
        x = nn.relu(nn.Dense(32)(x))
        return nn.Dense(10)(x)


class Residual(nn.Module):
    """A strided block whose shortcut is a convolution, after group normalization."""

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.relu(nn.GroupNorm(4)(nn.Conv(8, (3, 3), use_bias=False)(x)))
        y = nn.relu(nn.Conv(16, (3, 3), (2, 2), name="first")(x))
        y = nn.Conv(16, (3, 3), name="second")(y)
        x = nn.relu(y + nn.Conv(16, (1, 1), (2, 2), name="shortcut")(x))
        init = nn.with_partitioning(nn.initializers.ones, (None, None))  # a box around the array
        return nn.log_softmax(nn.Dense(10, kernel_init=init)(x.mean((1, 2))))


class Attention(nn.Module):
    """A transformer block before global mean pooling."""

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.Dense(16)(x[..., 0])
        x = x + nn.MultiHeadDotProductAttention(2, name="attention")(nn.LayerNorm()(x))
        return nn.Dense(10)(x.mean(1))


def test_layers_of_a_stock_network():
    rows = rows_of(Stock())
    assert [(row["layer"], row["shape"], row["operations"]) for row in rows] == [
        ("input", [28, 28, 1], []),
        ("Conv_0", [26, 26, 8], ["conv", "add"]),
        ("BatchNorm_0", [26, 26, 8], ["subtract", "multiply", "add", "relu"]),
        ("pooling", [13, 13, 8], ["max pool"]),
        ("Conv_1", [11, 11, 16], ["conv", "add", "relu"]),
        ("Dense_0", [32], ["dot", "add", "relu"]),
        ("Dense_1", [10], ["dot", "add"]),
    ]
    assert [row["inputs"] for row in rows] == [[], [0], [1], [2], [3], [4], [5]]
    # Two for each multiplication, then bias and ReLU.
    assert column(rows, "flops")["Conv_1"] == 11 * 11 * 16 * (2 * 3 * 3 * 8 // 4 + 2)
    params = shapes(Stock())["params"]
    expected = {
        name: sum(leaf.size for leaf in jax.tree.leaves(layer)) for name, layer in params.items()
    }
    assert column(rows, "params") == {"input": 0, "pooling": 0} | expected


@pytest.mark.parametrize(
    "model", [Stock(), Residual(), Attention()], ids=lambda model: type(model).__name__
)
def test_operations_agree_with_xla(model):
    apply = jax.jit(lambda variables, images: model.apply(variables, images, train=False))
    costs: Any = apply.lower(shapes(model), IMAGES).cost_analysis()
    # XLA does not count the products of a convolution with its padding.
    rtol = 0.1 if isinstance(model, Residual) else 0.02
    flops = sum(row["flops"] for row in rows_of(model))
    np.testing.assert_allclose(flops, costs["flops"], rtol=rtol)


@pytest.mark.parametrize("arch", fm.ARCHS)
def test_rows_of_each_network_have_all_parameters(arch):
    model = fm.create_model(arch)
    rows = rows_of(model)
    params = jax.tree.leaves(shapes(model)["params"])
    assert sum(row["params"] for row in rows) == sum(leaf.size for leaf in params)
    assert rows[0]["shape"] == [28, 28, 1]
    assert rows[-1]["shape"] == [10]
    assert all(row["inputs"] and row["flops"] and row["operations"] for row in rows[1:])


def test_layers_of_residual_blocks():
    rows = rows_of(fm.create_model("resnet20"))
    names = [f"Block_{block}/NormConv_{conv}" for block in range(9) for conv in range(2)]
    # The normalization of a convolution belongs to it.
    assert list(column(rows, "layer")) == ["input", "NormConv_0", *names, "pooling", "Dense_0"]
    assert column(rows, "inputs")["Block_3/NormConv_1"] == [7, 8]  # the block before, and its own
    assert column(rows, "shape")["Block_8/NormConv_1"] == [7, 7, 64]


def test_resizing_has_a_row():
    row = rows_of(fm.create_model("deep_augmented", image_size=64))[1]
    assert (row["layer"], row["shape"], row["params"]) == ("resize", [64, 64, 1], 0)


def test_statistics_belong_to_their_normalization():
    rows = rows_of(Residual())
    operations = column(rows, "operations")
    assert operations["Conv_0"] == ["conv"]
    assert {"sum", "rsqrt", "relu"} < set(operations["GroupNorm_0"])
    inputs = column(rows, "inputs")
    assert (inputs["first"], inputs["second"], inputs["shortcut"]) == ([2], [3], [2, 4])
    # Those of the softmax are no pooling.
    assert [row["layer"] for row in rows[-3:]] == ["shortcut", "pooling", "Dense_0"]
    assert rows[-1]["shape"] == [10]


def test_pooling_inside_a_layer_belongs_to_it():
    class Pooled(nn.Module):
        @nn.compact
        def __call__(self, x):
            kernel = self.param("kernel", nn.initializers.ones, (3, 3, 1, 4))
            bias = self.param("bias", nn.initializers.ones, (1, 1, 1, 4))
            x = lax.conv_general_dilated(
                x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            return nn.relu(nn.max_pool(x, (2, 2), (2, 2)) + bias)

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x, *, train):
            del train
            return nn.Dense(10)(Pooled()(x).reshape(len(x), -1))

    rows = rows_of(Network())
    assert [row["layer"] for row in rows] == ["input", "Pooled_0", "Dense_0"]
    assert rows[1]["operations"] == ["conv", "max pool", "add", "relu"]


def test_attention_belongs_to_the_module_around_its_layers():
    rows = rows_of(Attention())
    names = [f"attention/{name}" for name in ("query", "key", "value")]
    assert [row["layer"] for row in rows] == [
        "input", "Dense_0", "LayerNorm_0", *names, "attention", "attention/out", "pooling",
        "Dense_1",
    ]  # fmt: skip
    assert rows[6]["inputs"] == [3, 4, 5]
    assert {"dot", "exp"} < set(rows[6]["operations"])
    assert rows[6]["params"] == 0
    assert "sum" not in rows[1]["operations"]


@pytest.mark.parametrize("network", NETS)
def test_one_network_in_four_frameworks(network):
    rows = rows_of(fm.create_model(network, width=4))
    names = {
        LinenNet: ["Conv_0", "BatchNorm_0", "Dense_0"],
        NnxNet: ["conv", "norm", "dense"],
        EquinoxNet: ["layers/0", "norm", "layers/1"],
        HaikuNet: [f"haiku_net/{name}" for name in ("conv2_d", "batch_norm", "linear")],
    }[network]
    assert [row["layer"] for row in rows] == ["input", *names[:2], "pooling", names[2]]
    assert [row["params"] for row in rows] == [0, 3 * 3 * 4 + 4, 4 + 4, 0, 4 * 10 + 10]
    assert [sorted(row["shape"]) for row in rows[1:]] == [[4, 13, 13], [4, 13, 13], [4], [10]]
    assert rows[2]["operations"][0] == "subtract"  # the average that training has collected
    flops = [row["flops"] for row in rows]
    assert (flops[1], flops[4]) == (13 * 13 * 4 * (2 * 3 * 3 + 1), 2 * 4 * 10 + 10)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    weight: Any
    unread: Any


class Plain:
    """A list of layers and a parameter outside of layers; the first layer is read twice."""

    def init(self, key, images, *, train):
        del key, images, train
        layers = [Layer(jnp.zeros((784, 784)), jnp.zeros(5)), Layer(jnp.zeros((784, 10)), None)]
        # State that is not named by the layer comes before the parameters.
        return {"averages": [jnp.ones(10)], "params": {"layers": layers, "bias": jnp.zeros(10)}}

    def apply(self, variables, images, *, train):
        del train
        params = variables["params"]
        first, last = (layer.weight for layer in params["layers"])
        x = 2 * images.reshape(len(images), -1) - 1
        jax.debug.print("mean {}", x.mean())
        outputs = last.T @ (x @ first @ jnp.abs(first)).T  # the batch axis is the last one
        return outputs.T + (variables["averages"][0] * params["bias"])[None]


def test_layers_of_a_plain_object():
    rows = rows_of(Plain())
    assert [row["shape"] for row in rows[1:]] == [[784], [10], [10], []]
    assert [(row["layer"], row["params"], row["flops"]) for row in rows] == [
        ("input", 0, 2 * 784),
        ("layers/0", 784 * 784, 2 * 2 * 784 * 784),  # its absolute values depend on no image
        ("layers/1", 784 * 10, 2 * 784 * 10),
        ("bias", 10, 10),
        ("unused", 5, 0),
    ]


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        outputs: Any = nn.RNN(nn.SimpleCell(16, name="cell"))(x[..., 0])
        return nn.Dense(10)(outputs[:, -1])


def test_each_step_of_a_loop_counts():
    cell = rows_of(Recurrent())[1]
    assert (cell["layer"], cell["shape"]) == ("cell", [28, 16])
    assert cell["params"] == 28 * 16 + 16 + 16 * 16
    # Two products, two additions and tanh; the counter of the loop as well.
    np.testing.assert_allclose(cell["flops"], 28 * (2 * (28 + 16) * 16 + 3 * 16), rtol=0.001)


def test_totals():
    rows = rows_of(Plain())
    *_, unused, total = format_rows(rows)
    assert unused == ["unused", "", "", "5", "0"]
    assert total == ["all", "", "", f"{784 * 794 + 15:,}", f"{2 * 784 * (2 * 784 + 11) + 10:,}"]
