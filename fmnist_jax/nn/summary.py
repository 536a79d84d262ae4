"""`summarize`: the layers of a network, with their shapes, parameters and operations."""

import functools
import math
from collections.abc import Mapping, Sequence
from posixpath import commonpath
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from fmnist_jax.xla.inline import inlined_jaxpr

_WORDS = {
    "conv_general_dilated": "conv", "dot_general": "dot", "reduce_window_max": "max pool",
    "reduce_window_sum": "sum pool", "sub": "subtract", "mul": "multiply", "div": "divide",
    "integer_pow": "power", "logistic": "sigmoid", "select_n": "select",
}  # fmt: skip
_PRODUCTS = ("conv_general_dilated", "dot_general")
# They move or convert values and compute none.
_MOVES = (
    "bitcast_convert_type", "broadcast_in_dim", "concatenate", "convert_element_type", "copy",
    "dynamic_slice", "expand_dims", "gather", "optimization_barrier", "pad", "reduce_precision",
    "reshape", "rev", "slice", "split", "squeeze", "stop_gradient", "transpose",
)  # fmt: skip


def summarize(model: Any, variables: Any, image_shape: Sequence[int]) -> list[dict[str, Any]]:
    """Lists the layers of a network of any framework; it is traced, and nothing is computed.

    An operation that reads parameters belongs to their layer. Another one belongs to the layer
    whose outputs it takes, or to a normalization that follows. Pooling has a row of its own.

    Args:
      model: has `apply`, as `fmnist_jax.train.step.Model` describes.
      variables: as `model.init` returns them, or their shapes and dtypes.
      image_shape: height and width of the images, and 3 if in colour.

    Returns:
      Rows from the images to the logits, ready for JSON: `layer`, a name; `inputs`, the rows whose
      outputs it takes; `operations`, in words; `shape`, of the outputs without the batch axis;
      `params`, their number; `flops`, per image, two for each multiplication of a convolution or a
      product. Parameters that are never read have a last row, "unused".

    Example:
      >>> import fmnist_jax as fm
      >>> model, images = fm.create_model("same_3x3"), jnp.zeros((1, 28, 28, 1))
      >>> init = functools.partial(model.init, train=False)
      >>> rows = summarize(model, jax.eval_shape(init, jax.random.key(0), images), (28, 28))
      >>> rows[1]["layer"], rows[1]["shape"], rows[1]["params"], rows[1]["flops"]
      ('Conv_0', [28, 28, 64], 640, 1003520)
    """
    images = jax.ShapeDtypeStruct((1, *(*image_shape, 1)[:3]), jnp.float32)
    jaxpr = inlined_jaxpr(functools.partial(model.apply, train=False), variables, images).jaxpr
    leaves = jax.tree.leaves_with_path(variables)
    paths = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    params = {i for i, path in enumerate(paths) if path.partition("/")[0] == "params"}
    unread = {i: leaves[i][1].size for i in params}
    table = _Table(jaxpr.invars[-1], jaxpr.eqns)
    # The variables, by number, on which a value depends that does not depend on the images.
    reads: dict[core.Var, set[int]] = {value: {i} for i, value in enumerate(jaxpr.invars[:-1])}
    for equation in jaxpr.eqns:
        read = set[int]().union(*(reads.get(value, ()) for value in _inputs(equation)))
        if not table.sources(equation):
            reads |= dict.fromkeys(equation.outvars, read)
            continue
        number = table.append(equation, [_layer(paths[i]) for i in sorted(read & params or read)])
        table.rows[number]["params"] += sum(unread.pop(i, 0) for i in read)
    table.place()
    if unread:
        table.rows[table.start("unused")]["params"] = sum(unread.values())
    return table.rows


def format_rows(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Formats the rows of `summarize` as text, with headings before and totals after them."""
    total = {key: sum(row[key] for row in rows) for key in ("params", "flops")}
    cells = [["layer", "operations", "output shape", "parameters", "FLOP per image"]]
    for row in (*rows, {"layer": "all", "operations": [], "shape": []} | total):
        operations, shape = ", ".join(row["operations"]), " x ".join(map(str, row["shape"]))
        cells.append([row["layer"], operations, shape, f"{row['params']:,}", f"{row['flops']:,}"])
    return cells


class _Table:
    """Rows, and the number of the row of each layer and of each value that depends on images."""

    def __init__(self, images: core.Var, equations: Sequence[Any]) -> None:
        self.rows: list[dict[str, Any]] = []
        self.row_of_layer = {"input": self.start("input", _shape(images))}
        self.row_of = {images: 0}
        self.last_use = {value: equation for equation in equations for value in _inputs(equation)}
        # Values that are needed further on, and their number before the pending operations.
        self.live, self.width = {images}, 1
        # Operations since the last one of a layer, the number of live values after each, and
        # whether it reads variables.
        self.pending: list[tuple[Any, int, bool]] = []

    def start(self, layer: str, shape: Sequence[int] = ()) -> int:
        """Starts a row and returns its number."""
        row = {"layer": layer, "inputs": [], "operations": [], "shape": [*shape]}
        self.rows.append(row | {"params": 0, "flops": 0})
        return len(self.rows) - 1

    def sources(self, equation: Any) -> list[core.Var]:
        """Returns the inputs that depend on the images."""
        return [value for value in _inputs(equation) if value in self.row_of]

    def append(self, equation: Any, layers: Sequence[str]) -> int:
        """Appends an operation that reads variables of these layers; returns its row."""
        sources, is_product = self.sources(equation), equation.primitive.name in _PRODUCTS
        numbers = [self.row_of[value] for value in sources]
        number, names = max(numbers), [self.rows[number]["layer"] for number in numbers]
        self.row_of |= dict.fromkeys(equation.outvars, number)
        self.live |= self.last_use.keys() & set(equation.outvars)
        self.live -= {value for value in sources if self.last_use[value] is equation}
        self.pending.append((equation, len(self.live), bool(layers)))
        if not layers and is_product and len(sources) > 1:
            # Attention belongs to the module around the layers whose outputs it multiplies.
            layers = [commonpath(names) or " x ".join(names)]
        if not any(layers):
            return number
        layer = commonpath(layers) or layers[0]
        if not is_product and layer.startswith(f"{self.rows[number]['layer']}/"):
            self.row_of_layer.setdefault(layer, number)  # a normalization inside a layer
        self.place(layer)
        return self.row_of_layer[layer]

    def place(self, layer: str = "") -> None:
        """Adds the pending operations to rows, the last one to that of the layer, if any."""
        is_new = layer not in self.row_of_layer
        split = self._split() if layer and is_new else len(self.pending) - bool(layer)
        for i, (equation, num_live, _) in enumerate(self.pending):
            kind, flops, sources = equation.primitive.name, _flops(equation), self.sources(equation)
            inputs = {self.row_of[source] for source in sources}
            number, value = max(inputs), max(equation.outvars, key=_size)
            resizes = flops and _size(value) != max(map(_size, sources))
            if i >= split and (flops or equation is self.pending[-1][0]):
                if layer not in self.row_of_layer:
                    self.row_of_layer[layer] = self.start(layer)
                number = self.row_of_layer[layer]
            elif is_new and resizes and num_live <= 1 and not self._is_own(number):
                number = self.start("pooling" if kind.startswith("reduce") else "resize")
            row = self.rows[number]
            row["inputs"] = sorted({*row["inputs"], *inputs} - {number})
            row["flops"] += flops
            self.row_of |= dict.fromkeys(equation.outvars, number)
            if flops and (word := _word(equation)) not in row["operations"]:
                row["operations"].append(word)
            # A layer moves axes after its last operation for the next layer, pooling for itself.
            moves_axes = kind in ("squeeze", "transpose") and self._is_own(number)
            if flops or moves_axes or not row["shape"]:
                row["shape"] = _shape(value)
        self.pending, self.width = [], len(self.live)

    def _split(self) -> int:
        """Returns how many of the pending operations belong to the layers so far."""
        split, width = 0, self.width
        for i, (equation, num_live, reads) in enumerate(self.pending[:-1]):
            # A normalization begins: it reads averages, or reduces values that are used again.
            if reads or (num_live > width and equation.primitive.name.startswith("reduce")):
                break
            if num_live <= width:
                split, width = i + 1, num_live
        return split

    def _is_own(self, number: int) -> bool:
        return number > 0 and not self.rows[number]["params"]


def _inputs(equation: Any) -> list[core.Var]:
    return [value for value in equation.invars if isinstance(value, core.Var)]


def _size(value: Any) -> int:
    return math.prod(value.aval.shape)


def _shape(value: Any) -> list[int]:
    shape = list(value.aval.shape)
    if 1 in shape:
        shape.remove(1)  # the batch axis, which vmap moves
    return shape


def _layer(path: str) -> str:
    """Returns the layer of a variable: its path without the collection and its own name."""
    collection, *names = path.removesuffix("/value").split("/")  # of a box around the array
    layer = "/".join(names[:-1]) or (names or [collection])[-1]
    if collection == "params":
        return layer
    layer = layer.partition("/~/")[0]  # Haiku's averages are modules
    return "" if layer.isdecimal() else layer  # Equinox numbers its state


def _word(equation: Any) -> str:
    kind, last = equation.primitive.name, equation.invars[-1]
    if kind == "max" and isinstance(last, core.Literal) and last.val == 0:
        return "relu"
    return _WORDS.get(kind, kind.removeprefix("reduce_").replace("_", " "))


def _flops(equation: Any) -> int:
    kind, options = equation.primitive.name, equation.params
    if kind in _MOVES:
        return 0
    size, shape = sum(map(_size, equation.outvars)), equation.invars[0].aval.shape
    if kind == "dot_general":
        return 2 * size * math.prod(shape[axis] for axis in options["dimension_numbers"][0][0])
    if kind == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        return 2 * size * math.prod(kernel) // kernel[options["dimension_numbers"].rhs_spec[0]]
    if kind.startswith("reduce"):
        return math.prod(shape)
    bodies = [value for value in options.values() if hasattr(value, "eqns")]  # of a loop
    steps = sum(_flops(step) for body in bodies for step in body.eqns)
    return options.get("length", 1) * steps if bodies else size
