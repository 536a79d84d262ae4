"""Converts JAX functions to ONNX, for the operations that networks need.

Operations on constants alone are evaluated; the others become nodes. Elementwise operations and
pooling leave out axes of size 1, such as the one that `vmap` adds, because ONNX Runtime fuses
nothing across a reshape. With them, on two cores (Zen 3), ResNet-20 takes 1.2 times as long and
small_dropout twice as long.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import jax
import numpy as np
import onnx
from jax import lax
from jax.extend import core
from onnx import helper, numpy_helper

from fmnist_jax.errors import ConfigError
from fmnist_jax.xla.inline import inlined_jaxpr

# Read by ONNX Runtime since version 1.17 (2024).
OPSET = 18
IR_VERSION = 9

_type = helper.np_dtype_to_tensor_dtype
_NAMES = {
    kind: kind.capitalize()
    for kind in (
        "abs", "add", "and", "ceil", "cos", "div", "erf", "exp", "floor", "log", "max", "min",
        "mul", "neg", "not", "or", "pow", "round", "sign", "sin", "sqrt", "sub", "tanh", "xor",
    )
} | {
    "eq": "Equal", "ge": "GreaterOrEqual", "gt": "Greater", "le": "LessOrEqual", "lt": "Less",
    "logistic": "Sigmoid",
}  # fmt: skip
# By `_Graph.node`, the parameters of the operation, 1 and the operands.
_COMPOSED: dict[str, Callable[..., str]] = {
    "clamp": lambda op, params, one, low, x, high: op("Min", op("Max", x, low), high),
    "convert_element_type": lambda op, params, _, x: op("Cast", x, to=_type(params["new_dtype"])),
    "erfc": lambda op, params, one, x: op("Sub", one, op("Erf", x)),
    "exp2": lambda op, params, one, x: op("Pow", 2 * one, x),
    "expm1": lambda op, params, one, x: op("Sub", op("Exp", x), one),
    "integer_pow": lambda op, params, one, x: op("Pow", x, np.float32(params["y"])),
    "is_finite": lambda op, params, one, x: op("Less", op("Abs", x), np.inf * one),
    "log1p": lambda op, params, one, x: op("Log", op("Add", x, one)),
    "ne": lambda op, params, one, *x: op("Not", op("Equal", *x)),
    "rsqrt": lambda op, params, one, x: op("Reciprocal", op("Sqrt", x)),
    "select_n": lambda op, params, one, which, *x: op("Where", which, *x[::-1]),
    "square": lambda op, params, one, x: op("Mul", x, x),
}
_SAME = ("optimization_barrier", "stop_gradient", "copy", "layout_constraint", "name")


def to_onnx(
    function: Callable[[jax.Array], Sequence[jax.Array]],
    images: jax.ShapeDtypeStruct,
    output_names: Sequence[str],
    metadata: dict[str, str],
) -> onnx.ModelProto:
    """Converts a function of images.

    Args:
      function: returns a tuple of arrays.
      images: shape and dtype of its argument. A symbolic first axis (`jax.export.symbolic_shape`)
        is called "batch".
      output_names: one per result.
      metadata: text by name, stored in the model.

    Returns:
      The model, with the input "images", accepted by the ONNX checker.

    Raises:
      ConfigError: if the function has an unsupported operation.

    Example:
      >>> images = jax.ShapeDtypeStruct((2, 3), np.float32)
      >>> model = to_onnx(lambda x: (2 * x + 1,), images, ["y"], {})
      >>> [node.op_type for node in model.graph.node]
      ['Mul', 'Add', 'Identity']
    """
    closed = inlined_jaxpr(function, images)
    graph = _Graph()
    for result, name in zip(graph.add(closed), output_names, strict=True):
        graph.nodes.append(helper.make_node("Identity", [graph.name_of(result)], [name]))
    avals = {"images": images} | dict(zip(output_names, closed.out_avals, strict=True))
    values = [
        helper.make_tensor_value_info(name, _type(aval.dtype), _sizes(aval.shape, "batch"))
        for name, aval in avals.items()
    ]
    model = helper.make_model(
        helper.make_graph(graph.nodes, "fmnist_jax", values[:1], values[1:], graph.initializers),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="fmnist_jax",
    )
    helper.set_model_props(model, metadata)
    onnx.checker.check_model(model, full_check=True)
    return model


class _Graph:
    """Nodes and constants; a value is the name of a node's output (str) or an array."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.shapes: dict[str, list[int]] = {}  # of outputs, with -1 for the symbolic axis

    def name_of(self, value: Any) -> str:
        """Returns the name of a value; arrays and lists of integers become constants."""
        if isinstance(value, str):
            return value
        name = f"constant_{len(self.initializers)}"
        array = np.asarray(value, np.int64 if isinstance(value, list) else None)
        self.initializers.append(numpy_helper.from_array(array, name))
        return name

    def node(self, kind: str, *inputs: Any, **attributes: Any) -> str:
        """Adds a node and returns the name of its output."""
        name = f"{kind.lower()}_{len(self.nodes)}"
        names = list(map(self.name_of, inputs))
        self.nodes.append(helper.make_node(kind, names, [name], name, **attributes))
        return name

    def add(self, closed: core.ClosedJaxpr) -> list[Any]:
        """Adds a function of images, and returns the results."""
        jaxpr, (images,) = closed.jaxpr, closed.jaxpr.invars
        values = dict(zip(jaxpr.constvars, closed.consts, strict=True)) | {images: "images"}
        self.shapes["images"] = _sizes(images.aval.shape)

        def read(variable: Any) -> Any:
            is_literal = isinstance(variable, core.Literal)
            return np.asarray(variable.val, variable.aval.dtype) if is_literal else values[variable]

        for equation in jaxpr.eqns:
            outputs = self._equation(equation, [read(variable) for variable in equation.invars])
            for variable, output in zip(equation.outvars, outputs, strict=True):
                values[variable] = output
                if isinstance(output, str):
                    self.shapes.setdefault(output, _sizes(variable.aval.shape))
        return [self._reshape(read(result), result.aval.shape) for result in jaxpr.outvars]

    def _equation(self, equation: Any, inputs: list[Any]) -> Sequence[Any]:
        kind, params, aval = equation.primitive.name, equation.params, equation.outvars[0].aval
        if kind in _SAME:
            return inputs
        if -1 not in _sizes(aval.shape) and not any(isinstance(value, str) for value in inputs):
            result = equation.primitive.bind(*inputs, **equation.primitive.get_bind_params(params))
            return result if equation.primitive.multiple_results else [result]
        convert = self._elementwise if kind in _NAMES or kind in _COMPOSED else self._convert
        output = convert(kind, equation, inputs) if inputs else None
        if output is None or aval.dtype == jax.numpy.bfloat16:
            raise ConfigError(
                f"the network has the operation {kind!r}, which has no conversion to ONNX; export "
                "to stablehlo instead"
            )
        return [output] if isinstance(output, str) else output

    def _elementwise(self, kind: str, equation: Any, inputs: list[Any]) -> str | None:
        params, dtype = equation.params, equation.invars[0].aval.dtype
        is_away = params.get("rounding_method") == lax.RoundingMethod.AWAY_FROM_ZERO
        if is_away or (kind in ("and", "not", "or", "select_n", "xor") and dtype != np.dtype(bool)):
            return None
        sizes = _sizes(equation.outvars[0].aval.shape)
        smallest = min((self.shapes[value] for value in inputs if isinstance(value, str)), key=len)
        ones = [axis for axis, size in enumerate(sizes) if size == 1][: len(sizes) - len(smallest)]
        shapes = [_without(ones, variable.aval.shape) for variable in equation.invars]
        operands = map(self._reshape, inputs, shapes)
        convert = _COMPOSED.get(kind, lambda op, params, one, *x: op(_NAMES[kind], *x))
        output = convert(self.node, params, np.ones((), dtype), *operands)
        self.shapes[output] = _without(ones, sizes)
        return output

    def _convert(self, kind: str, equation: Any, inputs: list[Any]) -> Any:
        params, shapes = equation.params, [variable.aval.shape for variable in equation.invars]
        shape, dtype = equation.outvars[0].aval.shape, equation.outvars[0].aval.dtype
        if (kind == "slice" and shape == shapes[0]) or not np.any(params.get("padding_config", 1)):
            return inputs[0]
        if kind == "reshape" and (order := params["dimensions"]):
            inputs[0] = self.node("Transpose", self._reshape(inputs[0], shapes[0]), perm=order)
            self.shapes[inputs[0]] = [_sizes(shapes[0])[axis] for axis in order]
        if kind in ("reshape", "squeeze"):
            return self._reshape(inputs[0], shape, exact=False)
        if kind == "broadcast_in_dim":
            return self._broadcast(inputs[0], equation)
        if kind in ("reduce_window_max", "reduce_window_sum") and dtype.kind == "f":
            return self._pool(kind, inputs[0], equation)
        value, *others = inputs = list(map(self._reshape, inputs, shapes))
        match kind:
            case "reduce_max" | "reduce_min" | "reduce_prod" | "reduce_sum":
                name, options = kind.title().replace("_", ""), {"noop_with_empty_axes": 1}
                return self.node(name, value, list(params["axes"]), keepdims=0, **options)
            case "argmax":
                position = self.node("ArgMax", value, axis=params["axes"][0], keepdims=0)
                return self.node("Cast", position, to=_type(np.dtype(params["index_dtype"])))
            case "transpose":
                return self.node("Transpose", value, perm=params["permutation"])
            case "concatenate":
                return self.node("Concat", *inputs, axis=params["dimension"])
            case "split":
                axis, ends = [params["axis"]], np.cumsum([0, *params["sizes"]])
                return [self.node("Slice", value, [a], [b], axis) for a, b in pairwise(ends)]
            case "slice":
                # The largest integer ends a symbolic axis.
                limits = _sizes(params["limit_indices"], 2**63 - 1)
                numbers = params["start_indices"], limits, range(len(limits)), params["strides"]
                return self.node("Slice", value, *(list(part) for part in numbers if part))
            case "pad":
                low, high, inner = zip(*params["padding_config"], strict=True)
                return None if any(inner) else self.node("Pad", value, [*low, *high], *others)
            case "dot_general":
                return self.node("Einsum", *inputs, equation=_einsum(params, shapes))
            case "conv_general_dilated":
                return self._convolution(value, others[0], params)
        return None

    def _reshape(self, value: Any, shape: Sequence[Any], exact: bool = True) -> Any:
        """Adds a node if the shape differs; if not exact, in other axes than those of size 1."""
        if not isinstance(value, str):
            return np.reshape(value, shape)
        sizes, before = _sizes(shape), self.shapes[value]
        is_same = [n for n in before if n != 1] == [n for n in sizes if n != 1]
        if before == sizes or (is_same and not exact):
            return value
        if sizes.count(-1) > 1 or 0 in sizes:
            raise ConfigError(f"a reshape to {tuple(shape)} cannot be written in ONNX")
        output = self.node("Reshape", value, sizes)
        self.shapes[output] = sizes
        return output

    def _broadcast(self, value: Any, equation: Any) -> str:
        shape, axes = equation.params["shape"], equation.params["broadcast_dimensions"]
        places = dict(zip(axes, equation.invars[0].aval.shape, strict=True))
        sizes = [places.get(axis, 1) for axis in range(len(shape))]
        if sizes == list(shape):
            return self._reshape(value, sizes, exact=False)
        # Expand keeps an axis whose size is given as 1.
        batch = [1] if isinstance(value, str) else self.node("Shape", "images", start=0, end=1)
        parts = [[size] if isinstance(size, int) else batch for size in shape]
        return self.node("Expand", self._reshape(value, sizes), self.node("Concat", *parts, axis=0))

    def _convolution(self, images: Any, kernel: Any, params: dict[str, Any]) -> str | None:
        numbers, groups = params["dimension_numbers"], params["feature_group_count"]
        strides, spread = list(params["window_strides"]), list(params["lhs_dilation"])
        is_transposed = max(spread) > 1 or np.min(params["padding"]) < 0
        is_odd = params["batch_group_count"] > 1 or (is_transposed and max(strides) > 1)
        if isinstance(kernel, str) or is_odd:
            return None
        images = self.node("Transpose", images, perm=numbers.lhs_spec)
        kernel = np.transpose(kernel, numbers.rhs_spec)
        options = {"dilations": list(params["rhs_dilation"]), "group": groups}
        low, high = np.transpose(params["padding"])
        if not is_transposed:
            options |= {"pads": [*low, *high], "strides": strides}
            output = self.node("Conv", images, kernel, **options)
        else:
            # ConvTranspose mirrors the kernel, and returns all outputs that read a pixel.
            reach = np.subtract(kernel.shape[2:], 1) * params["rhs_dilation"]
            kernel = np.flip(kernel, tuple(range(2, kernel.ndim)))
            kernel = kernel.reshape(groups, -1, *kernel.shape[1:])
            kernel = kernel.swapaxes(1, 2).reshape(-1, kernel.shape[1], *kernel.shape[3:])
            output = self.node("ConvTranspose", images, kernel, strides=spread, **options)
            output = self.node("Pad", output, [0, 0, *(low - reach), 0, 0, *(high - reach)])
        return self.node("Transpose", output, perm=np.argsort(numbers.out_spec))

    def _pool(self, kind: str, value: Any, equation: Any) -> str | None:
        params, aval = equation.params, equation.invars[0].aval
        names = "window_dimensions", "window_strides", "padding"
        numbers = list(zip(*(params[name] for name in names), strict=True))
        free = [axis for axis, number in enumerate(numbers) if number == (1, 1, (0, 0))]
        ones = [axis for axis in free if _sizes(aval.shape)[axis] == 1][: len(free) - 2]
        kept = _without(ones, range(len(numbers)))
        # ONNX pools all axes but two, its batch and channels.
        outer = [axis for axis in free if axis in kept]
        pooled = [axis for axis in kept if axis not in (*outer[:1], *outer[-1:])]
        is_dilated = max(*params["base_dilation"], *params["window_dilation"]) > 1
        if is_dilated or len(kept) != len(pooled) + 2 or not 1 <= len(pooled) <= 3:
            return None
        window, strides, padding = zip(*(numbers[axis] for axis in pooled), strict=True)
        low, high = zip(*padding, strict=True)
        options = {"kernel_shape": window, "strides": strides, "pads": [*low, *high]}
        order = sorted(range(len(kept)), key=lambda place: kept[place] in pooled)
        value = self.node("Transpose", self._reshape(value, _without(ones, aval.shape)), perm=order)
        if kind == "reduce_window_max":
            value = self.node("MaxPool", value, **options)
        else:
            mean = self.node("AveragePool", value, count_include_pad=1, **options)
            value = self.node("Mul", mean, np.prod(window).astype(aval.dtype))
        output = self.node("Transpose", value, perm=np.argsort(order))
        self.shapes[output] = _without(ones, _sizes(equation.outvars[0].aval.shape))
        return output


def _sizes(shape: Sequence[Any], symbolic: Any = -1) -> list[Any]:
    """Returns a shape with another value for each symbolic size."""
    return [size if isinstance(size, int) else symbolic for size in shape]


def _without(axes: Sequence[int], shape: Sequence[Any]) -> list[Any]:
    return [size for axis, size in enumerate(shape) if axis not in axes]


def _einsum(params: dict[str, Any], shapes: Sequence[Sequence[Any]]) -> str:
    """Returns the equation of a product: batch axes, rest of the first, rest of the second."""
    (contract_a, contract_b), (batch_a, batch_b) = params["dimension_numbers"]
    letters = iter("abcdefghijklmnopqrstuvwxyz")
    first = [next(letters) for _ in shapes[0]]
    second = [next(letters) for _ in shapes[1]]
    for axis_a, axis_b in zip((*contract_a, *batch_a), (*contract_b, *batch_b), strict=True):
        second[axis_b] = first[axis_a]
    result = [first[axis] for axis in batch_a]
    result += [a for i, a in enumerate(first) if i not in (*contract_a, *batch_a)]
    result += [b for i, b in enumerate(second) if i not in (*contract_b, *batch_b)]
    return f"{''.join(first)},{''.join(second)}->{''.join(result)}"
