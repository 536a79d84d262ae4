"""Adam, RMSprop and momentum SGD in Keras' formulas, Muon, and learning rate schedules.

Each optimizer is an optax transformation whose `update` takes the learning rate and the weight
decay as extra arguments. Both may be traced: one compiled program serves every value, and `vmap`
or `lax.map` can train with many. optax has all three optimizers, but its Adam adds epsilon to the
bias-corrected root, which differs from Keras' update for every epsilon.
"""

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from fmnist_jax.config import OptimizerName, ScheduleName
from fmnist_jax.errors import ConfigError

Schedule = Callable[[jax.Array], jax.Array]


@functools.cache  # equal optimizers are one object, and so one compiled program
def create_optimizer(name: OptimizerName) -> optax.GradientTransformationExtraArgs:
    """Creates an optimizer.

    Args:
      name: "adam" (beta 0.9 and 0.999, epsilon 1e-7), "rmsprop" (rho 0.9, epsilon 1e-7 inside the
        root) or "sgd" (momentum 0.9), with Keras' defaults except for the momentum; or "muon"
        (Jordan et al. 2024) for convolution kernels, with SGD with Nesterov momentum for the other
        parameters. It needs the parameters in `update`: kernels are rescaled first, as in
        airbench94.

    Returns:
      An optax transformation. Its `update` takes `learning_rate`, float32[], and optionally
      `weight_decay`, float32[]: each update then also subtracts that share of every kernel (not
      of biases) times the learning rate (Loshchilov and Hutter 2019).

    Raises:
      ConfigError: if the name is unknown, or `update` is called without a learning rate.

    Example:
      >>> tx = create_optimizer("sgd")
      >>> params = {"w": jnp.zeros(())}
      >>> grads = {"w": jnp.ones(())}
      >>> updates, _ = tx.update(grads, tx.init(params), params, learning_rate=0.1)
      >>> round(float(updates["w"]), 6)
      -0.1
    """
    if name not in OPTIMIZERS:
        raise ConfigError(f"unknown optimizer {name!r}; choose one of {', '.join(OPTIMIZERS)}")
    init, rule = OPTIMIZERS[name]

    def update(
        grads: optax.Updates,
        opt_state: Any,
        params: optax.Params | None,
        learning_rate: jax.Array,
        weight_decay: float | jax.Array | None,
        **_: Any,
    ) -> tuple[optax.Updates, Any]:
        updates, opt_state = rule(grads, opt_state, params, learning_rate)
        if weight_decay is not None:
            updates = jax.tree.map(
                lambda update, param: (
                    update - learning_rate * weight_decay * param if param.ndim > 1 else update
                ),
                updates,
                params,
            )
        return updates, opt_state

    return _with_scalars(name, init, update)


def with_learning_rate(
    factory: Callable[..., optax.GradientTransformation], **options: Any
) -> optax.GradientTransformationExtraArgs:
    """Makes the learning rate of an optax optimizer an argument of its `update`.

    Schedules, sweeps and `find_learning_rate` then act on it. The same holds for the weight decay
    if the factory has a parameter `weight_decay`.

    Args:
      factory: has a parameter `learning_rate`, such as `optax.adamw`.
      **options: its other arguments. They are fixed, but for `weight_decay`, which is the value
        where `update` gets none.

    Returns:
      An optax transformation as `create_optimizer` returns it. Reuse it: each call returns a new
      one, for which the training loop is compiled again.

    Raises:
      ConfigError: if the factory has no parameter `learning_rate`, or `update` is called without a
        learning rate.

    Example:
      >>> tx = with_learning_rate(optax.sgd, momentum=0.9)
      >>> params = {"w": jnp.zeros(())}
      >>> updates, _ = tx.update({"w": jnp.ones(())}, tx.init(params), params, learning_rate=0.1)
      >>> round(float(updates["w"]), 6)
      -0.1
    """
    name = getattr(factory, "__name__", str(factory))  # a partial has none
    parameters = set(inspect.signature(factory).parameters)
    if "learning_rate" not in parameters:
        raise ConfigError(f"{name} has no parameter learning_rate; expected one, as of optax.adam")
    traced = parameters & {"learning_rate", "weight_decay"}
    tx = optax.inject_hyperparams(factory, static_args=parameters - traced)(
        learning_rate=0.0, **options
    )

    def update(
        grads: optax.Updates,
        opt_state: Any,
        params: optax.Params | None,
        learning_rate: jax.Array,
        weight_decay: float | jax.Array | None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        given = {"learning_rate": learning_rate}
        if weight_decay is not None and "weight_decay" in traced:
            given["weight_decay"] = jnp.asarray(weight_decay, jnp.float32)
        opt_state = opt_state._replace(hyperparams=opt_state.hyperparams | given)
        return tx.update(grads, opt_state, params, **extra_args)

    result = _with_scalars(name, tx.init, update)
    vars(result.update)["made_of"] = factory, options  # so that a run can record them
    return result


def check_scalars_act(
    tx: optax.GradientTransformation, params: Any, scalars: Mapping[str, Any]
) -> None:
    """Checks that an optimizer's update depends on each scalar that is given.

    optax's own optimizers ignore them, and would train at another learning rate.

    Args:
      tx: the optimizer.
      params: the parameters, of which only shapes and dtypes are read.
      scalars: the extra arguments of its update by name; None is not given.

    Raises:
      ConfigError: if one has no effect.

    Example:
      >>> check_scalars_act(optax.adam(1e-3), jnp.zeros(2), {"learning_rate": 1e-2})
      Traceback (most recent call last):
      ...
      fmnist_jax.errors.ConfigError: learning_rate has no effect on this optimizer, which has its \
own; set it to None, or make the optimizer by with_learning_rate, such as \
with_learning_rate(optax.adamw)
    """
    given = tuple(sorted(name for name, value in scalars.items() if value is not None))
    if not given:
        return
    leaves, treedef = jax.tree.flatten(params)
    shapes = tuple((jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves)
    for name in given:
        if name not in _effective_scalars(tx, treedef, shapes, given):
            raise ConfigError(
                f"{name} has no effect on this optimizer, which has its own; set it to "
                "None, or make the optimizer by with_learning_rate, such as "
                "with_learning_rate(optax.adamw)"
            )


def first_update(
    tx: optax.GradientTransformation, scalars: Mapping[str, Any], params: Any
) -> tuple[optax.Updates, Any]:
    """Returns updates and state of a first update whose gradients are the parameters themselves.

    For what follows from shapes and from the program of an optimizer, such as its errors.
    """
    transformation = optax.with_extra_args_support(tx)
    return transformation.update(params, tx.init(params), params, **scalars)


@functools.lru_cache(maxsize=32)
def _effective_scalars(
    tx: optax.GradientTransformation, treedef: Any, shapes: tuple[Any, ...], names: tuple[str, ...]
) -> set[str]:
    """Returns those of the sorted names on which the update depends."""
    params = treedef.unflatten([jax.ShapeDtypeStruct(*shape) for shape in shapes])
    scalars = {name: jax.ShapeDtypeStruct((), jnp.float32) for name in names}
    jaxpr = jax.make_jaxpr(functools.partial(first_update, tx))(scalars, params).jaxpr
    read = {id(variable) for equation in jaxpr.eqns for variable in equation.invars}
    read |= {id(variable) for variable in jaxpr.outvars}
    return {
        name for name, variable in zip(names, jaxpr.invars, strict=False) if id(variable) in read
    }


def _with_scalars(
    name: str, init: Callable[..., Any], rule: Callable[..., Any]
) -> optax.GradientTransformationExtraArgs:
    """Returns the transformation whose `update` passes learning rate and weight decay to a rule."""

    def update(
        grads: optax.Updates,
        opt_state: Any,
        params: optax.Params | None = None,
        *,
        learning_rate: float | jax.Array | None = None,
        weight_decay: float | jax.Array | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        if learning_rate is None:
            raise ConfigError(
                f"{name} has no learning rate; set learning_rate, such as 1e-3, in the recipe, in "
                "Hyperparams or as an argument of its update"
            )
        rate = jnp.asarray(learning_rate, jnp.float32)
        return rule(grads, opt_state, params, rate, weight_decay, **extra_args)

    return optax.GradientTransformationExtraArgs(init, update)


def create_schedule(name: ScheduleName) -> Schedule | None:
    """Creates a learning rate schedule.

    Args:
      name: "constant"; "linear", from 1 to 0; "cosine", half a cosine from 1 to 0; or "one_cycle"
        (Smith and Topin 2018, with fast.ai's cosine form): from 1/25 up to 1 in the first 30 % of
        the run, then down to 1/250,000.

    Returns:
      A function from the fraction of the run that is done, float32[] in [0, 1], to the fraction
      of the peak learning rate; None for "constant".

    Raises:
      ConfigError: if the name is unknown.

    Example:
      >>> print(f"{create_schedule('cosine')(jnp.float32(0.5)):.3f}")
      0.500
    """
    if name not in SCHEDULES:
        raise ConfigError(f"unknown schedule {name!r}; choose one of {', '.join(SCHEDULES)}")
    return SCHEDULES[name]


# The rules follow Keras' operation for operation, so that the bits agree.


def _adam(
    grads: optax.Updates,
    state: optax.ScaleByAdamState,
    _: optax.Params | None,
    learning_rate: jax.Array,
) -> Any:
    count = state.count + 1
    power = count.astype(jnp.float32)
    rate = learning_rate * jnp.sqrt(1 - jnp.power(0.999, power)) / (1 - jnp.power(0.9, power))
    mu = jax.tree.map(lambda m, g: m + (g - m) * (1 - 0.9), state.mu, grads)
    nu = jax.tree.map(lambda n, g: n + (jnp.square(g) - n) * (1 - 0.999), state.nu, grads)
    updates = jax.tree.map(lambda m, n: -(m * rate) / (jnp.sqrt(n) + 1e-7), mu, nu)
    return updates, optax.ScaleByAdamState(count, mu, nu)


def _rmsprop(
    grads: optax.Updates,
    state: optax.ScaleByRmsState,
    _: optax.Params | None,
    learning_rate: jax.Array,
) -> Any:
    nu = jax.tree.map(lambda n, g: 0.9 * n + (1 - 0.9) * jnp.square(g), state.nu, grads)
    updates = jax.tree.map(lambda g, n: -(learning_rate * g) / jnp.sqrt(n + 1e-7), grads, nu)
    return updates, optax.ScaleByRmsState(nu)


def _sgd(
    grads: optax.Updates, state: optax.TraceState, _: optax.Params | None, learning_rate: jax.Array
) -> Any:
    trace = jax.tree.map(lambda t, g: 0.9 * t - learning_rate * g, state.trace, grads)
    return trace, optax.TraceState(trace)


def _muon(grads: optax.Updates, state: Any, params: optax.Params, learning_rate: jax.Array) -> Any:
    directions, state = _DIRECTIONS.update(grads, state, params)

    def update(param: jax.Array, direction: jax.Array) -> jax.Array:
        if param.ndim != 4:
            rate = _DENSE_RATE if param.ndim == 2 else 1
            return -learning_rate * rate * direction
        # Filters are scaled to a root mean square norm of 1 before they move, as in airbench94.
        norm = jnp.sqrt(jnp.sum(jnp.square(param)) / param.shape[-1])
        return param / jnp.maximum(norm, 1e-12) - param - learning_rate * direction

    return jax.tree.map(update, params, directions), state


# The numbers are airbench94's, but for the rates of the other parameters, chosen on validation.
_DIRECTIONS = optax.partition(
    {
        "filters": optax.contrib.scale_by_muon(
            beta=0.6,
            ns_steps=3,
            weight_dimension_numbers=lambda params: jax.tree.map(
                lambda _: optax.contrib.MuonDimensionNumbers((0, 1, 2), 3), params
            ),
        ),
        "others": optax.trace(0.85, nesterov=True),
    },
    lambda params: jax.tree.map(lambda param: "filters" if param.ndim == 4 else "others", params),
)
_DENSE_RATE = 0.1


def _zeros(params: optax.Params) -> optax.Updates:
    return jax.tree.map(jnp.zeros_like, params)


OPTIMIZERS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "adam": (
        lambda params: optax.ScaleByAdamState(jnp.int32(0), _zeros(params), _zeros(params)),
        _adam,
    ),
    "rmsprop": (lambda params: optax.ScaleByRmsState(_zeros(params)), _rmsprop),
    "sgd": (lambda params: optax.TraceState(_zeros(params)), _sgd),
    "muon": (_DIRECTIONS.init, _muon),
}


def _cosine(progress: jax.Array) -> jax.Array:
    """Falls from 1 at progress 0 to 0 at progress 1."""
    return 0.5 + 0.5 * jnp.cos(jnp.pi * progress)


def _one_cycle(progress: jax.Array) -> jax.Array:
    start, end, top = 1 / 25, 1 / 25 / 1e4, 0.3
    rising = start + (1 - start) * _cosine(1 - progress / top)
    falling = end + (1 - end) * _cosine((progress - top) / (1 - top))
    return jnp.where(progress < top, rising, falling)


SCHEDULES: dict[str, Schedule | None] = {
    "constant": None,
    "cosine": _cosine,
    "one_cycle": _one_cycle,
    "linear": lambda progress: 1 - progress,
}
