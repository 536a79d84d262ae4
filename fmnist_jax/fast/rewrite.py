"""`optimize_for_cpu`: a function with its slow operations replaced, for programs on a CPU."""

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from fmnist_jax.fast import convolution, pooling, products
from fmnist_jax.fast.convolution import Window
from fmnist_jax.fast.pooling import Windows
from fmnist_jax.fast.precision import is_bfloat16, rounded
from fmnist_jax.xla.inline import evaluate
from fmnist_jax.xla.noinline import fence

R = TypeVar("R")
Step = Callable[[jax.Array], jax.Array]

# Calls that are evaluated in place.
_CALLS = ("jit", "pjit", "closed_call")
_CHECKPOINTS = ("checkpoint", "remat2")
_LOOPS = ("cond", "scan", "while")
# Elementwise operations of two arrays whose shapes may differ.
_ELEMENTWISE = ("add", "div", "mul", "sub")
# Operations on random bits, before a comparison decides what they are for.
_BITS = (
    "add", "and", "bitcast_convert_type", "convert_element_type", "max", "mul", "or", "reshape",
    "shift_right_logical", "slice", "squeeze", "sub", "xor",
)  # fmt: skip
_COMPARISONS = ("eq", "ge", "gt", "le", "lt", "ne")
_ROUNDED = ("conv_general_dilated", "dot_general")
_IMAGE_OPERATIONS = ("conv_general_dilated", "reduce_window_max", "reduce_window_sum")
# They map larger values to larger or equal ones.
_MONOTONIC = ("exp", "logistic", "tanh")
# Pixels of a window, each of which becomes an operation.
_MOST_VIEWS = 64


class Operation(NamedTuple):
    """An operation that has a faster form in some cases.

    Attributes:
      name: that of JAX's primitive.
      scope: the layer, as Flax names it; "" where nothing names it.
      shapes: those of its inputs, as in "float32[8,28,28,1] float32[3,3,1,32]".
      replaced: whether it has a faster form here.
    """

    name: str
    scope: str
    shapes: str
    replaced: bool


def optimize_for_cpu(function: Callable[..., R]) -> Callable[..., R]:
    """Replaces operations that XLA:CPU runs slowly by faster forms with the same values.

    The function is traced, and its operations are evaluated one by one: convolutions, pools, sums
    over rows, products and random bits in faster forms, all others as they are. Values and
    gradients are the same up to rounding. Where an activation and a maximum pool can change places,
    the pool comes first. Apply it to the function that is differentiated:
    `jax.grad(optimize_for_cpu(loss))`. All transformations of JAX take the result.

    `jax.default_matmul_precision("bfloat16")` around the call rounds the factors of products to
    bfloat16 and adds in float32. It holds for products of matrices and for convolutions that become
    such products, and for their gradients.

    If the default backend is a GPU or a TPU, the function is called as it is; with that precision,
    factors and results of all its products and convolutions are rounded, and nothing else changes.

    Args:
      function: pure, of arrays and trees of arrays. Arguments that are no arrays, such as
        `train=True`, are passed as they are.

    Example:
      >>> import flax.linen as nn
      >>> model, images = nn.Conv(8, (3, 3)), jnp.ones((2, 28, 28, 1))
      >>> variables = model.init(jax.random.key(0), images)
      >>> optimize_for_cpu(model.apply)(variables, images).shape
      (2, 28, 28, 8)
    """

    @functools.wraps(function)
    def optimized(*args: Any, **kwargs: Any) -> R:
        on_cpu = jax.default_backend() == "cpu"
        if not on_cpu and not is_bfloat16():
            return function(*args, **kwargs)
        evaluation = _Evaluation([]) if on_cpu else _Rounding([])
        return evaluation.call(function, *args, **kwargs)

    return optimized


def explain_for_cpu(function: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Operation]:
    """Lists the operations that `optimize_for_cpu` looks at, and whether it replaces them.

    Args:
      function: as for `optimize_for_cpu`; it is traced, and nothing is computed.
      *args: its arguments, or their shapes and dtypes.
      **kwargs: as `args`.

    Example:
      >>> images, kernel = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 4))
      >>> def convolve(images, kernel):
      ...     return jax.lax.conv_general_dilated(
      ...         images, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
      ...     )
      >>> [(op.name, op.replaced) for op in explain_for_cpu(convolve, images, kernel)]
      [('conv_general_dilated', True)]
    """
    operations: list[Operation] = []
    leaves, tree = jax.tree.flatten((args, kwargs))

    def call(arrays: list[Any]) -> Any:
        args, kwargs = jax.tree.unflatten(tree, _merge(arrays, leaves))
        return _Evaluation(operations).call(function, *args, **kwargs)

    jax.eval_shape(call, [leaf for leaf in leaves if _is_array(leaf)])
    return operations


class _Pixels:
    """Images, float[batch, height, width, features], that are computed when they are read.

    A maximum pool comes before the steps, which are monotonic: the maximum of the results is the
    result of the maximum, which has fewer elements. The program may have the axes in another order;
    the images stay as they are until an operation reads them in that order.

    Attributes:
      start: returns the images before the steps.
      pooled: returns the maxima over windows before the steps.
      axes: the axis of the images for each axis of the program; None is one of length 1.
      steps: elementwise functions of images.
    """

    def __init__(
        self,
        start: Callable[[], jax.Array],
        axes: Sequence[int | None],
        pooled: Callable[[Windows], jax.Array] | None = None,
        steps: tuple[Step, ...] = (),
    ) -> None:
        self.start, self.axes, self.steps = functools.cache(start), tuple(axes), steps
        self.pooled = pooled or (lambda windows: pooling.max_pool(self.start(), windows))

    @functools.cached_property
    def images(self) -> jax.Array:
        return functools.reduce(lambda images, step: step(images), self.steps, self.start())

    @functools.cached_property
    def value(self) -> jax.Array:
        """The images with the axes of the program."""
        present = [axis for axis in self.axes if axis is not None]
        absent = [axis for axis in range(4) if axis not in present]
        shape = [1 if axis is None else self.images.shape[axis] for axis in self.axes]
        return self.images.transpose(*present, *absent).reshape(shape)

    def arrange(self, axes: Sequence[int | None]) -> "_Pixels":
        return _Pixels(self.start, axes, self.pooled, self.steps)

    def step(self, step: Step) -> "_Pixels":
        return _Pixels(self.start, self.axes, self.pooled, (*self.steps, step))

    def max_pool(self, windows: Windows) -> "_Pixels":
        return _Pixels(lambda: self.pooled(windows), self.axes, None, self.steps)

    def sum_pool(self, windows: Windows) -> "_Pixels":
        return _Pixels(lambda: pooling.sum_pool(self.images, windows), self.axes)


def _value(value: Any) -> Any:
    return value.value if isinstance(value, _Pixels) else value


def _share(value: Any) -> Any:
    """Returns a value for one of several readers, which must not compute its images again."""
    return _Pixels(lambda: value.images, value.axes) if isinstance(value, _Pixels) else value


class _Evaluation:
    """Evaluates programs with the faster forms.

    Attributes:
      log: every operation that has a rule.
      random: random bits by their identity; kept alive, so that no identity is used twice.
    """

    def __init__(self, log: list[Operation]) -> None:
        self.log = log
        self.random: dict[int, Any] = {}

    def call(self, function: Callable[..., R], /, *args: Any, **kwargs: Any) -> R:
        """Calls a function; what is no array is passed to it and returned as it is."""
        leaves, tree = jax.tree.flatten((args, kwargs))
        others: list[Any] = []

        def traced(arrays: list[Any]) -> list[Any]:
            args, kwargs = jax.tree.unflatten(tree, _merge(arrays, leaves))
            results, others[:] = _split(jax.tree.flatten(function(*args, **kwargs)))
            return results

        arrays = [leaf for leaf in leaves if _is_array(leaf)]
        results = self.run(jax.make_jaxpr(traced)(arrays), arrays)
        leaves, tree = others
        return jax.tree.unflatten(tree, _merge(results, leaves))

    def run(self, program: Any, arguments: Sequence[Any]) -> list[Any]:
        """Evaluates a program."""
        return [_value(value) for value in evaluate(program, arguments, self._apply, _share)]

    def _apply(self, equation: Any, inputs: list[Any]) -> Sequence[Any]:
        with _scope(equation), equation.ctx.manager:
            return self._results(equation, inputs)

    def _results(self, equation: Any, inputs: list[Any]) -> Sequence[Any]:
        name = equation.primitive.name
        if name in _CALLS:
            return evaluate(equation.params["jaxpr"], inputs, self._apply, _share)
        if name in _CHECKPOINTS:
            values = self._fence_random(name, [_value(value) for value in inputs])
            params = {key: equation.params[key] for key in ("policy", "prevent_cse")}
            function = functools.partial(self.run, equation.params["jaxpr"])
            return jax.checkpoint(lambda *values: function(values), **params)(*values)
        return self._replaced(equation, inputs)

    def _replaced(self, equation: Any, inputs: list[Any]) -> Sequence[Any]:
        name = equation.primitive.name
        pixels = _pixels(equation, *inputs)
        if pixels is not None:
            if name in _IMAGE_OPERATIONS:
                self._note(equation, replaced=True)
            return [pixels]
        inputs = self._fence_random(name, [_value(value) for value in inputs])
        if name in _IMAGE_OPERATIONS:
            self._note(equation, replaced=False)
        elif name in _RULES:
            result = _RULES[name](equation, *inputs)
            self._note(equation, replaced=result is not None)
            if result is not None:
                return [result]
        elif name in _ELEMENTWISE:
            return [_elementwise(equation, inputs)]
        elif name == "broadcast_in_dim":
            return [_broadcast(equation, *inputs)]
        return self._fence_compared(name, inputs, self._bind(equation, inputs))

    def _bind(self, equation: Any, inputs: Sequence[Any]) -> Sequence[Any]:
        primitive, params = equation.primitive, equation.params
        if primitive.name in _LOOPS:
            params = {key: self._rewritten(value) for key, value in params.items()}
        params = primitive.get_bind_params(params)
        if "subfuns" in params:  # a function with a gradient of its own, and that gradient
            functions = [function.wrap(self.call, (), None) for function in params["subfuns"]]
            params["subfuns"] = type(params["subfuns"])(functions)
        results = primitive.bind(*inputs, **params)
        return results if primitive.multiple_results else [results]

    def _rewritten(self, param: Any) -> Any:
        if isinstance(param, tuple) and any(hasattr(part, "eqns") for part in param):
            return tuple(map(self._rewritten, param))
        if not hasattr(param, "eqns"):
            return param
        return jax.make_jaxpr(lambda *values: self.run(param, values))(*param.in_avals)

    def _note(self, equation: Any, *, replaced: bool) -> None:
        shapes = " ".join(str(variable.aval) for variable in equation.invars)
        scope = str(equation.source_info.name_stack)
        self.log.append(Operation(equation.primitive.name, scope, shapes, replaced))

    def _fence_random(self, name: str, inputs: list[Any]) -> list[Any]:
        """Random bits that are read by anything but a comparison are computed once."""
        if name in _BITS or name in _COMPARISONS:
            return inputs
        return [fence(value) if id(value) in self.random else value for value in inputs]

    def _fence_compared(
        self, name: str, inputs: Sequence[Any], results: Sequence[Any]
    ) -> Sequence[Any]:
        """Stores what depends on random bits, which XLA:CPU would draw again for each reader."""
        if name == "random_bits" or any(id(value) in self.random for value in inputs):
            if name in _COMPARISONS:
                return [fence(value) for value in results]
            if name in (*_BITS, "random_bits"):
                self.random |= {id(value): value for value in results}
        return results


class _Rounding(_Evaluation):
    """Evaluates programs with products and convolutions of bfloat16; all else stays as it is."""

    def _replaced(self, equation: Any, inputs: list[Any]) -> Sequence[Any]:
        if equation.primitive.name not in _ROUNDED or equation.outvars[0].aval.dtype != jnp.float32:
            return self._bind(equation, inputs)
        params = equation.params | {"preferred_element_type": jnp.bfloat16}
        (result,) = self._bind(equation.replace(params=params), jax.tree.map(rounded, inputs))
        return [result.astype(jnp.float32)]


def _scope(equation: Any) -> Any:
    scope = str(equation.source_info.name_stack)
    return jax.named_scope(scope) if scope else contextlib.nullcontext()


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | jax.ShapeDtypeStruct)


def _split(flattened: tuple[list[Any], Any]) -> tuple[list[Any], list[Any]]:
    leaves, tree = flattened
    others = [None if _is_array(leaf) else leaf for leaf in leaves]
    return [leaf for leaf in leaves if _is_array(leaf)], [others, tree]


def _merge(arrays: Sequence[Any], leaves: Sequence[Any]) -> list[Any]:
    rest = iter(arrays)
    return [next(rest) if leaf is None or _is_array(leaf) else leaf for leaf in leaves]


def _pixels(equation: Any, *inputs: Any) -> _Pixels | None:
    """Returns the images that an operation makes of others, or None if it is no such operation.

    Convolutions, pools, changes of the order of axes, biases, ReLU and `_MONOTONIC` functions are.
    """
    name, params = equation.primitive.name, equation.params
    if name == "conv_general_dilated":
        return _convolve(equation, *inputs)
    if name in ("reduce_window_max", "reduce_window_sum") and _is_float(equation.outvars[0].aval):
        pixels = _pooled_pixels(inputs[0], params["window_dimensions"])
        windows = None if pixels is None else _windows(params, pixels.axes)
        if pixels is None or windows is None:
            return None
        return pixels.max_pool(windows) if "max" in name else pixels.sum_pool(windows)
    if not inputs or not isinstance(inputs[0], _Pixels):
        return None
    pixels, *others = inputs
    before, after = equation.invars[0].aval.shape, equation.outvars[0].aval.shape
    if name == "transpose":
        return pixels.arrange([pixels.axes[axis] for axis in params["permutation"]])
    if name in ("broadcast_in_dim", "reshape", "squeeze") and not others:
        sides, wanted = ([side for side in shape if side != 1] for shape in (before, after))
        axes = [axis for axis, side in zip(pixels.axes, before, strict=True) if side != 1]
        if sides != wanted:
            return None
        return pixels.arrange([axes.pop(0) if side != 1 else None for side in after])
    if name == "custom_jvp_call" and _is_relu(equation):
        return pixels.step(jax.nn.relu)
    if name in _MONOTONIC:
        return pixels.step(lambda images: equation.primitive.bind(images, **params))
    if name not in ("add", "sub", "max", "min") or before != after:
        return None
    (other,) = map(_value, others)
    if jnp.ndim(other) > 0:
        places = zip(pixels.axes, jnp.shape(other), strict=True)
        if any(side != 1 and axis != 3 for axis, side in places):
            return None
        other = other.reshape(1, 1, 1, -1)
    return pixels.step(lambda images: _elementwise(equation, [images, other]))


def _convolve(equation: Any, images: Any, kernel: Any) -> _Pixels | None:
    params = equation.params
    inputs, weights, output = (v.aval for v in (*equation.invars, *equation.outvars))
    lhs, rhs, out = params["dimension_numbers"]
    same = inputs.dtype == weights.dtype == (params["preferred_element_type"] or inputs.dtype)
    if inputs.ndim not in (3, 4) or params["batch_group_count"] > 1 or not same:
        return None
    if not _is_float(inputs) or 0 in output.shape:
        return None
    kernel = _value(kernel).transpose(*rhs[2:], rhs[1], rhs[0])
    is_line = inputs.ndim == 3
    kernel = kernel[None] if is_line else kernel

    def sides(name: str, line: Any = 1) -> Any:
        return (line,) * is_line + tuple(params[name])

    window = Window(
        sides("window_strides"), sides("padding", (0, 0)), sides("lhs_dilation"),
        sides("rhs_dilation"), params["feature_group_count"],
    )  # fmt: skip
    if not convolution.has_fast_form(kernel, window):
        return None
    arranged = _arranged(images, _axes(lhs))
    start = functools.cache(lambda: convolution.convolve(arranged, kernel, window))

    def pooled(windows: Windows) -> jax.Array:
        if windows == convolution.POOL and convolution.has_pooled_form(kernel, window):
            return convolution.convolve_max_pool(arranged, kernel, window.pads)
        return pooling.max_pool(start(), windows)

    return _Pixels(start, _axes(out), pooled)


def _axes(spec: Sequence[int]) -> tuple[int, ...]:
    """Returns, for each axis of images, its place in NHWC; a line of pixels has no height."""
    batch, features, *sides = spec
    places = dict(zip((batch, *sides, features), (0, 1, 2, 3)[-len(spec) :], strict=True))
    places[batch] = 0
    return tuple(places[axis] for axis in range(len(spec)))


def _arranged(images: Any, axes: tuple[int, ...]) -> jax.Array:
    """Returns images NHWC."""
    if isinstance(images, _Pixels) and images.axes == axes:
        return images.images
    ordered = _value(images).transpose(sorted(range(len(axes)), key=axes.__getitem__))
    return ordered if len(axes) == 4 else ordered[:, None]


def _pooled_pixels(images: Any, window: Sequence[int]) -> _Pixels | None:
    """Returns images to be pooled; an array is NHWC or NCHW, as its windows show."""
    if isinstance(images, _Pixels):
        return images
    if len(window) != 4 or window[0] != 1:
        return None
    axes = (0, 1, 2, 3) if window[3] == 1 else (0, 3, 1, 2)
    return _Pixels(lambda: _arranged(images, axes), axes)


def _windows(params: Any, axes: Sequence[int | None]) -> Windows | None:
    """Returns the windows over height and width, or None if they are of another kind."""
    names = ("window_dimensions", "window_strides", "padding")
    plain = (1, 1, (0, 0))
    sides = zip(axes, zip(*(params[name] for name in names), strict=True), strict=True)
    chosen = {axis: side for axis, side in sides if side != plain}
    if not {*chosen} <= {1, 2} or {*params["base_dilation"], *params["window_dilation"]} != {1}:
        return None
    windows = Windows(*zip(chosen.get(1, plain), chosen.get(2, plain), strict=True))
    return windows if math.prod(windows.size) <= _MOST_VIEWS else None


def _is_relu(equation: Any) -> bool:
    """Whether a function with a gradient of its own is `jax.nn.relu`, and so is its gradient."""
    jaxpr, (output,) = equation.params["call_jaxpr"], equation.outvars
    while len(jaxpr.eqns) == 1 and jaxpr.eqns[0].primitive.name in _CALLS:
        jaxpr = jaxpr.eqns[0].params["jaxpr"]
    if [inner.primitive.name for inner in jaxpr.eqns] != ["max"] or len(equation.invars) != 1:
        return False
    aval = jax.ShapeDtypeStruct(output.aval.shape, output.aval.dtype)
    params = equation.primitive.get_bind_params(equation.params)

    def gradient(x: jax.Array, tangent: jax.Array) -> jax.Array:
        return jax.jvp(lambda x: equation.primitive.bind(x, **params)[0], (x,), (tangent,))[1]

    program = jax.make_jaxpr(gradient)(aval, aval).jaxpr
    if len(program.eqns) < 3:
        return False
    _, compared, *zeros, selected = program.eqns
    literals = [
        v.val
        for e in (*jaxpr.eqns, compared, *zeros)
        for v in e.invars
        if isinstance(v, core.Literal)
    ]
    names = [e.primitive.name for e in (compared, *zeros, selected)]
    return (
        names == ["gt", *["broadcast_in_dim"] * len(zeros), "select_n"]
        and not np.any([float(value) for value in literals])
        and selected.invars[0] is compared.outvars[0]
        and selected.invars[2] is program.invars[1]
        and program.outvars == selected.outvars
    )


def _elementwise(equation: Any, inputs: Sequence[Any]) -> jax.Array:
    """Applies an operation to an array and one value per feature, whose gradient is a fast sum."""
    shape = jnp.broadcast_shapes(*map(jnp.shape, inputs))
    values, array = sorted(inputs, key=jnp.size)
    axis = _feature_axis(values, shape)
    if axis is None or array.shape != shape:
        return equation.primitive.bind(*inputs, **equation.params)
    if equation.primitive.name == "add":
        return products.add_features(array, values.reshape(-1), axis)
    return equation.primitive.bind(*(_spread(value, shape) for value in inputs), **equation.params)


def _feature_axis(values: Any, shape: tuple[int, ...]) -> int | None:
    """Returns the axis along which one value per feature is to be repeated to a shape."""
    axes = [axis for axis, side in enumerate(jnp.shape(values)) if side != 1]
    is_smaller = jnp.ndim(values) == len(shape) and jnp.shape(values) != shape
    return axes[0] if len(axes) == 1 and is_smaller and _is_float(values) else None


def _spread(values: Any, shape: tuple[int, ...]) -> Any:
    axis = _feature_axis(values, shape)
    if axis is None:
        return values
    moved = *shape[:axis], *shape[axis + 1 :], shape[axis]
    return jnp.moveaxis(products.spread(values.reshape(-1), moved), -1, axis)


def _dot(equation: Any, left: jax.Array, right: jax.Array) -> jax.Array | None:
    return products.dot(left, right, equation.params)


def _sum(equation: Any, array: jax.Array) -> jax.Array | None:
    is_rows = tuple(equation.params["axes"]) == tuple(range(array.ndim - 1))
    if not is_rows or array.ndim < 2 or array.shape[-1] < 2 or not _is_float(array):
        return None
    return products.sum_rows(array)


def _max(equation: Any, array: jax.Array) -> jax.Array:
    # JAX's gradient compares the array with its maximum. XLA may compute the array again there and
    # round it differently. Then no element is equal, and the gradient is 0 / 0.
    return equation.primitive.bind(fence(array), **equation.params)


def _broadcast(equation: Any, values: jax.Array, *sizes: Any) -> jax.Array:
    """Repeats one value per feature such that the gradient is a fast sum."""
    shape, axes = equation.params["shape"], equation.params["broadcast_dimensions"]
    if not sizes and values.size not in (1, math.prod(shape)):
        sides = dict(zip(axes, values.shape, strict=True))
        result = _spread(values.reshape([sides.get(i, 1) for i in range(len(shape))]), shape)
        if result.shape == shape:
            return result
    return equation.primitive.bind(values, *sizes, **equation.params)


def _is_float(array: jax.Array) -> bool:
    return jnp.issubdtype(array.dtype, jnp.floating)


_RULES: dict[str, Callable[..., jax.Array | None]] = {
    "dot_general": _dot,
    "reduce_sum": _sum,
    "reduce_max": _max,
}
