"""The training loop of a plan as one compiled program: what it is, what it costs, and keeping it.

JAX's own cache finds a program by its text. To have the text, a process traces and lowers the loop,
for `small_dropout` a second of Python. `load_program` finds the loop by what it is made from
instead. That is no proof, because someone may have exchanged a function while it runs, or edited an
installed package; so a kept loop comes with the hash of its jaxpr, and `fit` traces the loop beside
the first updates and compares, before it saves anything. For what comes after the jaxpr, lowering
and compiling, the versions stand.
"""

import contextlib
import dataclasses
import functools
import hashlib
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache.compilation_cache import reset_cache

from fmnist_jax.runs import environment, files
from fmnist_jax.runs.plan import Plan
from fmnist_jax.train import metrics as metrics_lib
from fmnist_jax.train.loop import TrainState, train_steps
from fmnist_jax.train.metrics import Metrics
from fmnist_jax.xla.cache import machine_sha256
from fmnist_jax.xla.jit import COMPILER_OPTIONS

# Loops of one folder, the newest; each edit of this package makes another, of 1 to 4 MB.
_MAX_KEPT = 50


@dataclasses.dataclass(frozen=True)
class Cost:
    """What the compiled training loop says of itself.

    Attributes:
      flops: floating-point operations an update.
      bytes: device memory of the loop: state, training images and temporaries.
    """

    flops: float
    bytes: int


class Program(NamedTuple):
    """The training loop of a plan, compiled.

    Attributes:
      run: `train_steps` without the keyword arguments, which are part of it: maps state, images,
        labels, order, streams, count and metrics to state and metrics. The state is donated.
      sha256: what `program_sha256` was when it was compiled.
    """

    run: Callable[..., tuple[TrainState, Metrics]]
    sha256: str


def measure_cost(plan: Plan) -> Cost:
    """Compiles the training loop for the default device and reads its figures."""
    program = compile_loop(plan)
    # The compiler counts the body of a loop once, so the operations are those of whole batches.
    whole = compile_loop(plan, slice_size=plan.run.recipe.batch_size)
    memory = program.memory_analysis()
    return Cost(
        float(whole.cost_analysis()["flops"]),
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes,
    )


def compile_loop(plan: Plan, slice_size: int | None = None) -> Any:
    """The compiled `train_steps` of a run; `slice_size` as there."""
    lowered = train_steps.lower(*_loop_shapes(plan), slice_size=slice_size, **plan.step_options)
    return lowered.compile()


def program_sha256(plan: Plan) -> str:
    """SHA-256 of what the training loop computes, its jaxpr, and of its compiler's options."""
    return hashlib.sha256(_text(plan).encode()).hexdigest()


def load_program(plan: Plan) -> Program | None:
    """The training loop as `keep_program` left it; None where it did not, or it cannot be read.

    Whether it is the loop that `plan` describes is for the caller to see: `program_sha256`.
    """
    path = _path(plan)
    if path is None:
        return None
    try:
        content = path.read_bytes()
        if hashlib.sha256(content[32:]).digest() != content[:32]:
            return None  # a part of it, or damaged: unpickled, it might do anything
        # Who can write here could put machine code there as well, in JAX's cache too.
        sha256, code, in_tree, out_tree = pickle.loads(content[32:])  # noqa: S301
        executable = serialize_executable.deserialize_and_load(
            code, in_tree, out_tree, execution_devices=jax.devices()[:1]
        )
        return _program(plan, executable, sha256)
    except Exception:  # noqa: BLE001 (whatever it is, the loop is compiled anew)
        return None


def keep_program(plan: Plan) -> Program | None:
    """Compiles the training loop, and writes it to where the next process will look for it.

    Returns:
      The loop; None where it cannot be kept: where JAX has no folder for what it compiles, on
      accelerators, and if it calls back into this process.
    """
    path = _path(plan)
    if path is None:
        return None
    text = _text(plan)
    if "callback" in text:
        return None
    with _without_cache():
        executable = compile_loop(plan)
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    with contextlib.suppress(Exception):  # where it cannot be written, it costs time alone
        content = pickle.dumps((sha256, *serialize_executable.serialize(executable)))
        files.make_folder(path.parent)
        files.write_bytes(path, hashlib.sha256(content).digest() + content)
        written = sorted(path.parent.glob("loop-*"), key=lambda one: one.stat().st_mtime)
        for old in written[:-_MAX_KEPT]:
            old.unlink()
    return _program(plan, executable, sha256)


def forget_program(plan: Plan) -> None:
    """Removes the kept training loop."""
    path = _path(plan)
    if path is not None:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def _text(plan: Plan) -> str:
    jaxpr = train_steps.trace(*_loop_shapes(plan), **plan.step_options).jaxpr
    # It names its constants, but does not show them.
    constants = [
        hashlib.sha256(np.asarray(value).tobytes()).hexdigest() for value in _constants(jaxpr)
    ]
    options = sorted(COMPILER_OPTIONS.get(jax.default_backend(), {}).items())
    return f"{jaxpr} {constants} {options}"


def _constants(jaxpr: Any) -> Iterator[Any]:
    """Of a jaxpr and those that its equations call."""
    yield from getattr(jaxpr, "consts", ())
    for equation in jaxpr.eqns:
        for inner in jax.tree.leaves(list(equation.params.values())):
            if hasattr(inner, "eqns"):
                yield from _constants(inner)


def _program(plan: Plan, executable: Any, sha256: str) -> Program:
    run = functools.partial(executable, regularization=plan.regularization)
    return Program(run, sha256)


def _path(plan: Plan) -> Path | None:
    """The file of a plan's loop, named by what the loop is made from."""
    folder = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
    is_on = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    if not folder or "://" in folder or not is_on or jax.default_backend() != "cpu":
        return None
    sources = sorted(Path(__file__).parents[1].glob("**/*.py"))
    options = plan.step_options | {"tx": (plan.run.recipe.optimizer, plan.run.recipe.schedule)}
    shapes, options = jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype) if hasattr(leaf, "dtype") else leaf,
        (_loop_shapes(plan), options),
    )
    conditions = environment.describe()
    parts = (
        machine_sha256(),
        [conditions.get(name) for name in environment.DECISIVE],
        [hashlib.sha256(source.read_bytes()).hexdigest() for source in sources],
        jax.config.values,
        shapes,
        options,
    )
    return Path(folder) / f"loop-{hashlib.sha256(repr(parts).encode()).hexdigest()}"


@contextlib.contextmanager
def _without_cache() -> Iterator[None]:
    # XLA:CPU writes a program whole only if it compiled it: one that it has read itself fails when
    # it runs, once written and read again (jaxlib 0.10).
    before = jax.config.jax_enable_compilation_cache  # type: ignore[attr-defined]
    jax.config.update("jax_enable_compilation_cache", False)
    reset_cache()  # JAX asks for the setting once
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
        reset_cache()


def _loop_shapes(plan: Plan) -> tuple[Any, ...]:
    shape = jax.ShapeDtypeStruct
    return (
        plan.abstract_state,
        shape(plan.dataset.train_images.shape, jnp.uint8),
        shape(plan.dataset.train_labels.shape, jnp.int32),
        shape(plan.train_examples.shape, jnp.int32),
        plan.streams,
        shape((), jnp.int32),
        jax.eval_shape(metrics_lib.zeros),
    )
