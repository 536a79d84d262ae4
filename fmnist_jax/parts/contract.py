"""`check_contract`: what the parts of a run must fulfil, checked by shapes before anything runs."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax.errors import InvalidRngError

from fmnist_jax.config import short_name
from fmnist_jax.data.batches import input_shape
from fmnist_jax.errors import ConfigError, first_line
from fmnist_jax.train.optim import check_scalars_act, first_update
from fmnist_jax.train.predict import abstract_logits
from fmnist_jax.train.step import StepConfig, apply_in_training, create_train_state, example_losses

_BATCH = 2


@functools.lru_cache(maxsize=256)  # sweeps and seeds plan equal parts many times
def check_contract(
    config: StepConfig,
    given: tuple[str, ...],
    image_shape: tuple[int, ...],
    num_classes: int,
    names: tuple[tuple[str, str], ...],
) -> None:
    """Checks network, optimizer, loss and augmentation against each other and the data.

    Args:
      config: the parts.
      given: names of the `Hyperparams` that are not None.
      image_shape: height and width of the images, and 3 if in colour.
      num_classes: number of classes.
      names: the name of each part of the recipe, for messages.

    Raises:
      ConfigError: if a part does not do what "Your own parts" in the documentation says.
    """
    name_of = {part: short_name(name) for part, name in names}
    arch, model, scalar = name_of["arch"], config.model, jax.ShapeDtypeStruct((), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    images = jax.ShapeDtypeStruct((_BATCH, *input_shape(image_shape)), jnp.float32)
    labels = jax.ShapeDtypeStruct((_BATCH,), jnp.int32)
    # As `create_train_state` traces it, so that the trace serves there too.
    create = functools.partial(create_train_state, config=config, image_shape=image_shape)
    image = images.update(shape=(1, *images.shape[1:]))
    with _explained(f"{arch} in init", image):
        state = jax.eval_shape(create, key)
    params = state.params
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
        is_batch = len(getattr(augmented, "shape", ())) == 4
        size = augmented.shape[1:3] if is_batch else image_shape[:2]
        text = f"uint8{list(pixels.shape)}"
        _check_shape(name_of["augmentation"], augmented, (_BATCH, *size, images.shape[3]), text)
    text = f"{arch} with train=True" + (" and dropout" if "dropout" in given else "")
    dropout = scalar if "dropout" in given else None
    train = functools.partial(apply_in_training, model=model)
    logits, _ = _shapes(text, train, key, augmented, params, state.model_state, dropout)
    _check_shape(text, logits, (_BATCH, num_classes), f"float32{list(augmented.shape)}")
    text = f"{arch} with train=False"
    with _explained(text, image):
        evaluated = abstract_logits(state.variables, image_shape, model=model)
    _check_shape(text, evaluated, (1, num_classes), f"float32{list(image.shape)}")
    smoothing = (scalar,) if "label_smoothing" in given else ()
    losses = functools.partial(example_losses, config.loss)
    _shapes(name_of["loss"], losses, logits, labels, *smoothing)
    if config.schedule is not None:
        rate = _shapes(name_of["schedule"], config.schedule, scalar)
        _check_shape(name_of["schedule"], rate, (), "float32[]")
    scalars = {name: scalar for name in given if name in ("learning_rate", "weight_decay")}
    with _explained(name_of["optimizer"]):
        check_scalars_act(config.tx, params, scalars)
        if not scalars:  # otherwise the check has traced the update
            jax.eval_shape(functools.partial(first_update, config.tx), scalars, params)


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
    with _explained(text, *arguments):
        return jax.eval_shape(function, *arguments)


@contextlib.contextmanager
def _explained(text: str, *arguments: Any) -> Iterator[None]:
    """Raises ConfigError, with the part and its input, in place of another error of the block."""
    try:
        yield
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
