"""`check_contract`: what the parts of a run must fulfil, checked by shapes before anything runs."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax.errors import InvalidRngError

from fmnist_jax.config import short_name
from fmnist_jax.errors import ConfigError, first_line
from fmnist_jax.nn.adapters import init_variables
from fmnist_jax.train.optim import check_scalars_act
from fmnist_jax.train.step import StepConfig, example_losses

_BATCH = 2


@functools.lru_cache(maxsize=256)  # sweeps and seeds plan equal parts many times
def check_contract(
    config: StepConfig,
    given: tuple[str, ...],
    image_shape: tuple[int, int],
    num_classes: int,
    names: tuple[tuple[str, str], ...],
) -> None:
    """Checks network, optimizer, loss and augmentation against each other and the data.

    Args:
      config: the parts.
      given: names of the `Hyperparams` that are not None.
      image_shape: height and width of the images.
      num_classes: number of classes.
      names: the name of each part of the recipe, for messages.

    Raises:
      ConfigError: if a part does not do what "Your own parts" in the documentation says.
    """
    name_of = {part: short_name(name) for part, name in names}
    arch, model, scalar = name_of["arch"], config.model, jax.ShapeDtypeStruct((), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    images = jax.ShapeDtypeStruct((_BATCH, *image_shape, 1), jnp.float32)
    labels = jax.ShapeDtypeStruct((_BATCH,), jnp.int32)
    variables = _shapes(
        f"{arch} in init", functools.partial(init_variables, model=model), key, images
    )
    params = variables.get("params")
    if not jax.tree.leaves(params):
        raise ConfigError(f"{arch} has no parameters; expected a collection params with arrays")
    for path, leaf in jax.tree.leaves_with_path(params):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            where = jax.tree_util.keystr(path, simple=True, separator="/")
            raise ConfigError(f"parameter {where} of {arch} is {leaf.dtype}; expected float")
    augmented = images
    if config.augment is not None:
        pixels = jax.ShapeDtypeStruct((_BATCH, *image_shape), jnp.uint8)
        augmented = _shapes(
            name_of["augmentation"], config.augment, key, labels.update(shape=()), labels, pixels,
            scalar,
        )  # fmt: skip
        size = augmented.shape[1:3] if len(getattr(augmented, "shape", ())) == 4 else image_shape
        text = f"uint8{list(pixels.shape)}"
        _check_shape(name_of["augmentation"], augmented, (_BATCH, *size, 1), text)
    collections = sorted(set(variables) - {"params"})

    def train(variables: Any, images: jax.Array, key: jax.Array, dropout: jax.Array) -> Any:
        options: dict[str, Any] = {"dropout": dropout} if "dropout" in given else {}
        if collections:
            options["mutable"] = collections
        outputs = model.apply(variables, images, train=True, rngs={"dropout": key}, **options)
        return outputs[0] if collections else outputs

    text = f"{arch} with train=True" + (" and dropout" if "dropout" in given else "")
    logits = _shapes(text, train, variables, augmented, key, scalar)
    _check_shape(text, logits, (_BATCH, num_classes), f"float32{list(augmented.shape)}")
    text = f"{arch} with train=False"
    evaluated = _shapes(text, lambda v, x: model.apply(v, x, train=False), variables, images)
    _check_shape(text, evaluated, (_BATCH, num_classes), f"float32{list(images.shape)}")
    smoothing = (scalar,) if "label_smoothing" in given else ()
    losses = functools.partial(example_losses, config.loss)
    _shapes(name_of["loss"], losses, evaluated, labels, *smoothing)
    if config.schedule is not None:
        rate = _shapes(name_of["schedule"], config.schedule, scalar)
        _check_shape(name_of["schedule"], rate, (), "float32[]")
    scalars = {name: scalar for name in given if name in ("learning_rate", "weight_decay")}
    check_scalars_act(config.tx, params, scalars)

    def update(params: Any, scalars: Any) -> Any:
        tx = optax.with_extra_args_support(config.tx)
        return tx.update(params, tx.init(params), params, **scalars)

    _shapes(name_of["optimizer"], update, params, scalars)


def check_identity(model: Any, name: str) -> None:
    """Checks that a model hashes and compares by value, because it is static in `jit`.

    Raises:
      ConfigError: if it does not.
    """
    try:
        hash(model)
        problem = "compares by identity" if type(model).__eq__ is object.__eq__ else ""
    except TypeError as error:
        problem = f"does not hash ({error})"
    if problem:
        raise ConfigError(
            f"{short_name(name)} {problem}, so that it would be compiled again in each call; make "
            "it a frozen dataclass whose fields are numbers, texts, tuples or functions"
        )


def _shapes(text: str, function: Callable[..., Any], *arguments: Any) -> Any:
    try:
        return jax.eval_shape(function, *arguments)
    except InvalidRngError as error:
        raise ConfigError(
            f"{text} draws from a random stream that it is not given; the streams are params and "
            f"dropout in init, dropout in training, and none in evaluation ({first_line(error)})"
        ) from error
    except ConfigError:
        raise
    except Exception as error:
        if "'dropout'" in str(error) and text.endswith("and dropout"):
            name = text.partition(" ")[0]
            raise ConfigError(
                f"dropout is given, but {name} has no dropout: its __call__ takes no such argument"
            ) from error
        reason = f"{type(error).__name__}: {first_line(error)}"
        shapes = [f"{x.dtype}{list(x.shape)}" for x in arguments if hasattr(x, "shape")]
        raise ConfigError(
            f"{text} fails for {', '.join(shapes) or 'its input'}: {reason}"
        ) from error


def _check_shape(text: str, found: Any, wanted: tuple[int, ...], given: str) -> None:
    is_array = hasattr(found, "shape") and jnp.issubdtype(found.dtype, jnp.floating)
    if not is_array or found.shape != wanted:
        what = (
            f"{found.dtype}{list(found.shape)}" if hasattr(found, "shape") else type(found).__name__
        )
        raise ConfigError(f"{text} maps {given} to {what}; expected float32{list(wanted)}")
