"""Converts JAX functions to ONNX, for the operations that the networks need.

Equations of the jaxpr that depend on constants alone are evaluated; the others become nodes. Of
platform-dependent operations, the default form is converted.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import onnx
from jax.extend import core
from onnx import helper, numpy_helper

from fmnist_jax.errors import ConfigError

# Read by ONNX Runtime since version 1.17 (2024).
OPSET = 18
IR_VERSION = 9

_ELEMENTWISE = {
    kind: kind.capitalize()
    for kind in ("exp", "neg", "sqrt", "log", "tanh", "add", "sub", "mul", "div", "max", "min")
}
_REDUCTIONS = {"reduce_sum": "ReduceSum", "reduce_max": "ReduceMax"}
_CALLS = ("jit", "pjit", "custom_jvp_call", "custom_vjp_call", "closed_call", "core_call")
_SAME = ("optimization_barrier", "stop_gradient", "copy", "layout_constraint")


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
    closed = jax.make_jaxpr(function)(images)
    graph = _Graph()
    results = graph.add(closed.jaxpr, closed.consts, ["images"])
    outputs = []
    for result, name, aval in zip(results, output_names, closed.out_avals, strict=True):
        graph.nodes.append(helper.make_node("Identity", [graph.name_of(result)], [name]))
        outputs.append(_value_info(name, aval))
    inputs = [_value_info("images", images)]
    model = helper.make_model(
        helper.make_graph(graph.nodes, "fmnist_jax", inputs, outputs, graph.initializers),
        opset_imports=[helper.make_opsetid("", OPSET)],
        ir_version=IR_VERSION,
        producer_name="fmnist_jax",
    )
    helper.set_model_props(model, metadata)
    onnx.checker.check_model(model, full_check=True)
    return model


def _value_info(name: str, aval: Any) -> onnx.ValueInfoProto:
    shape = [size if isinstance(size, int) else "batch" for size in aval.shape]
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(aval.dtype), shape)


class _Graph:
    """Nodes and constants; a value is the name of a node's output (str) or a NumPy array."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []

    def name_of(self, value: Any) -> str:
        """Returns the name of a value; an array becomes a constant."""
        if isinstance(value, str):
            return value
        name = f"constant_{len(self.initializers)}"
        self.initializers.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def node(self, kind: str, *inputs: Any, **attributes: Any) -> str:
        """Adds a node and returns the name of its output."""
        name = f"{kind.lower()}_{len(self.nodes)}"
        names = [self.name_of(value) for value in inputs]
        self.nodes.append(helper.make_node(kind, names, [name], **attributes))
        return name

    def add(self, jaxpr: Any, constants: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
        """Adds the equations that the results need, and returns the results."""
        values = dict(zip(jaxpr.constvars, constants, strict=True))
        values |= dict(zip(jaxpr.invars, arguments, strict=True))

        def read(variable: Any) -> Any:
            return variable.val if isinstance(variable, core.Literal) else values[variable]

        for equation in _needed(jaxpr):
            inputs = [read(variable) for variable in equation.invars]
            outputs = self._equation(equation, inputs)
            values |= dict(zip(equation.outvars, outputs, strict=True))
        return [read(variable) for variable in jaxpr.outvars]

    def _equation(self, equation: Any, inputs: list[Any]) -> Sequence[Any]:
        kind, params = equation.primitive.name, equation.params
        if kind == "platform_index":
            return [np.int32(params["platforms"].index(None))]  # the default branch
        if kind == "cond":
            branch = params["branches"][int(inputs[0])]
            return self.add(branch.jaxpr, branch.consts, inputs[1:])
        if kind in _CALLS:
            called = params.get("call_jaxpr") or params.get("jaxpr")
            return self.add(called.jaxpr, called.consts, inputs)
        if kind in _SAME:
            return inputs
        if kind == "broadcast_in_dim":
            return [self._broadcast(inputs[0], params)]
        if not any(isinstance(value, str) for value in inputs):
            result = equation.primitive.bind(*inputs, **params)
            return result if equation.primitive.multiple_results else [result]
        return [self._convert(kind, equation, inputs)]

    def _convert(self, kind: str, equation: Any, inputs: list[Any]) -> str:
        params = equation.params
        shapes = [variable.aval.shape for variable in equation.invars]
        if kind in _ELEMENTWISE:
            return self.node(_ELEMENTWISE[kind], *inputs)
        if kind in _REDUCTIONS:
            axes = np.array(params["axes"], np.int64)
            return self.node(_REDUCTIONS[kind], inputs[0], axes, keepdims=0)
        if kind == "convert_element_type":
            return self.node(
                "Cast", inputs[0], to=helper.np_dtype_to_tensor_dtype(np.dtype(params["new_dtype"]))
            )
        if kind == "rsqrt":
            return self.node("Reciprocal", self.node("Sqrt", inputs[0]))
        if kind == "integer_pow":
            return self.node("Pow", inputs[0], np.float32(params["y"]))
        if kind == "reshape":
            return self._reshape(inputs[0], params["new_sizes"])
        if kind == "squeeze":
            return self.node("Squeeze", inputs[0], np.array(params["dimensions"], np.int64))
        if kind == "transpose":
            return self.node("Transpose", inputs[0], perm=list(params["permutation"]))
        if kind == "slice":
            return self._slice(inputs[0], params)
        if kind == "pad":
            low, high, inner = zip(*params["padding_config"], strict=True)
            if not any(inner):
                return self.node("Pad", inputs[0], np.array([*low, *high], np.int64), inputs[1])
        if kind == "dot_general":
            return self.node("Einsum", *inputs, equation=_einsum(params, shapes))
        if kind == "conv_general_dilated":
            return self._convolution(inputs, params)
        if kind == "reduce_window_max":
            return self._max_pool(inputs[0], params)
        raise ConfigError(
            f"the network has the operation {kind!r}, which has no conversion to ONNX; export to "
            "stablehlo instead"
        )

    def _reshape(self, value: Any, shape: Sequence[Any]) -> str:
        sizes = [size if isinstance(size, int) else -1 for size in shape]
        if sizes.count(-1) > 1:
            raise ConfigError(f"a reshape to {shape} cannot be written in ONNX")
        return self.node("Reshape", value, np.array(sizes, np.int64))

    def _slice(self, value: Any, params: dict[str, Any]) -> str:
        starts, strides = params["start_indices"], params["strides"]
        # The largest integer ends a symbolic axis.
        ends = [end if isinstance(end, int) else 2**63 - 1 for end in params["limit_indices"]]
        numbers = starts, ends, range(len(ends)), strides or [1] * len(ends)
        return self.node("Slice", value, *(np.array(part, np.int64) for part in numbers))

    def _broadcast(self, value: Any, params: dict[str, Any]) -> Any:
        shape, places = params["shape"], params["broadcast_dimensions"]
        missing = tuple(axis for axis in range(len(shape)) if axis not in places)
        sizes = [size if isinstance(size, int) else 1 for size in shape]
        if not isinstance(value, str):
            value = np.expand_dims(np.asarray(value), missing)
            return np.broadcast_to(value, sizes)  # ONNX broadcasts the symbolic axis
        if missing:
            value = self.node("Unsqueeze", value, np.array(missing, np.int64))
        # Expand keeps an axis whose size is given as 1.
        return self.node("Expand", value, np.array(sizes, np.int64))

    def _convolution(self, inputs: Sequence[Any], params: dict[str, Any]) -> str:
        numbers = params["dimension_numbers"]
        images = self.node("Transpose", inputs[0], perm=list(numbers.lhs_spec))
        kernel = np.transpose(np.asarray(inputs[1]), numbers.rhs_spec)
        low, high = zip(*params["padding"], strict=True)
        output = self.node(
            "Conv", images, kernel, pads=[*low, *high], strides=list(params["window_strides"]),
            dilations=list(params["rhs_dilation"]), group=params["feature_group_count"],
        )  # fmt: skip
        return self.node("Transpose", output, perm=list(np.argsort(numbers.out_spec)))

    def _max_pool(self, images: Any, params: dict[str, Any]) -> str:
        window, strides = params["window_dimensions"], params["window_strides"]
        if not (len(window) == 4 and window[0] == window[3] == strides[0] == strides[3] == 1):
            raise ConfigError(f"a maximum over windows of {window} cannot be written in ONNX")
        low, high = zip(*params["padding"][1:3], strict=True)
        pooled = self.node(
            "MaxPool", self.node("Transpose", images, perm=[0, 3, 1, 2]), pads=[*low, *high],
            kernel_shape=list(window[1:3]), strides=list(strides[1:3]),
        )  # fmt: skip
        return self.node("Transpose", pooled, perm=[0, 2, 3, 1])


def _needed(jaxpr: Any) -> list[Any]:
    """Returns the equations that the results need, in order."""
    wanted = {variable for variable in jaxpr.outvars if not isinstance(variable, core.Literal)}
    needed = []
    for equation in reversed(jaxpr.eqns):
        if wanted.intersection(equation.outvars):
            needed.append(equation)
            wanted.update(v for v in equation.invars if not isinstance(v, core.Literal))
    return needed[::-1]


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
