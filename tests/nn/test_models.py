"""Shapes and parameters of the networks; logits and initial weights against Keras."""

import functools

import chex
import jax
import jax.numpy as jnp
import keras
import numpy as np
import optax
import pytest
from flax.errors import InvalidRngError
from keras import layers

import fmnist_jax as fm


# The arithmetic: kernel height x width x inputs x outputs + biases, layer by layer.
def sprint_params(a, b, c):
    """Batch normalization has a bias."""
    return (
        (25 * a + a)
        + (3 * 3 * a * a + a)
        + (3 * 3 * a * b + b)
        + (3 * 3 * b * b + b)
        + (3 * 3 * b * c + c)
        + (3 * 3 * c * c + c)
        + (c * 10 + 10)
    )


PARAMS = {
    "small_dropout": (
        (3 * 3 * 1 * 32 + 32)
        + (3 * 3 * 32 * 64 + 64)
        + (3 * 3 * 64 * 128 + 128)
        + (3 * 3 * 128 * 128 + 128)  # 28 -> 26 -> 13 -> 11 -> 5 -> 3
        + (128 * 10 + 10),
        241_546,
    ),
    "valid_2x2": (
        (2 * 2 * 1 * 64 + 64)
        + (2 * 2 * 64 * 32 + 32)
        + (6 * 6 * 32 * 256 + 256)  # 28 -> 27 -> 13 -> 12 -> 6
        + (256 * 10 + 10),
        306_282,
    ),
    "same_3x3": (
        (3 * 3 * 1 * 64 + 64)
        + (3 * 3 * 64 * 32 + 32)
        + (7 * 7 * 32 * 256 + 256)  # 28 -> 14 -> 7
        + (256 * 10 + 10),
        423_338,
    ),
    "he_stack": (
        (3 * 3 * 1 * 64 + 64)
        + (3 * 3 * 64 * 64 + 64) * 2
        + (11 * 11 * 64 * 128 + 128)  # 28 -> 26 -> 24 -> 22 -> 11
        + (128 * 10 + 10),
        1_067_146,
    ),
    "deep_augmented": (
        (3 * 3 * 3 * 64 + 64)
        + (3 * 3 * 64 * 64 + 64)
        + (3 * 3 * 64 * 128 + 128)
        + (3 * 3 * 128 * 128 + 128)
        + (7 * 7 * 128 * 512 + 512)  # 150 -> 148 -> 74 -> 72 -> 36 -> 34 -> 17 -> 15 -> 7
        + (512 * 10 + 10),
        3_477_066,
    ),
    "sprint": (sprint_params(32, 64, 128), 288_234),
    "sprint_narrow": (sprint_params(16, 32, 64), 72_698),
    "sprint_wide": (sprint_params(48, 96, 192), 646_618),
    # Batch normalization has a scale as well.
    "resnet20": (
        (3 * 3 * 1 * 16 + 32)
        + (3 * 3 * 16 * 16 + 32) * 6
        + (3 * 3 * 16 * 32 + 64)
        + (3 * 3 * 32 * 32 + 64) * 5
        + (3 * 3 * 32 * 64 + 128)
        + (3 * 3 * 64 * 64 + 128) * 5
        + (64 * 10 + 10),
        269_434,
    ),
}
PROJECTS = (
    "small_dropout",
    "valid_2x2",
    "same_3x3",
    "he_stack",
    pytest.param("deep_augmented", marks=pytest.mark.slow),
)


@functools.cache
def create(name):
    model = fm.create_model(name)
    side = 150 if name == "deep_augmented" else 28
    state = fm.create_train_state(
        jax.random.key(0), fm.StepConfig(model=model, tx=optax.sgd(0.1)), image_shape=(side, side)
    )
    return model, state.variables, side


@functools.partial(jax.jit, static_argnames=("model", "train"))
def apply(model, variables, images, *, train, dropout=None):
    rngs = None if dropout is None else {"dropout": dropout}
    mutable = [name for name in variables if train and name != "params"]
    outputs = model.apply(variables, images, train=train, rngs=rngs, mutable=mutable)
    return outputs[0]


@pytest.mark.parametrize("name", fm.ARCHS)
def test_parameter_count(name):
    model = fm.create_model(name)
    shapes = jax.eval_shape(
        lambda: model.init(jax.random.key(0), jnp.zeros((1, 28, 28, 1)), train=False)
    )
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
    assert PARAMS[name] == (count, count)


@pytest.mark.parametrize("name", fm.ARCHS)
def test_logits_shape_and_dtype(name, getkey):
    model, side = fm.create_model(name), 150 if name == "deep_augmented" else 28
    images = jax.ShapeDtypeStruct((3, side, side, 1), jnp.float32)
    init = functools.partial(model.init, train=False)
    variables = jax.eval_shape(init, jax.random.key(0), images)
    for options in ({"train": False}, {"train": True, "dropout": getkey()}):
        logits = apply.eval_shape(model, variables, images, **options)
        chex.assert_shape(logits, (3, 10))
        chex.assert_type(logits, jnp.float32)


def test_jit_and_eager_logits_are_equal(getkey):
    model, variables, _ = create("valid_2x2")
    images = jax.random.uniform(getkey(), (3, 28, 28, 1))
    eager = model.apply(variables, images, train=False)
    chex.assert_tree_all_finite(eager)
    compiled = apply(model, variables, images, train=False)
    chex.assert_trees_all_close(compiled, eager, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", fm.ARCHS)
def test_num_classes_of_a_batch_of_one(name):
    model = fm.create_model(name, num_classes=3)
    logits = jax.eval_shape(
        lambda: model.init_with_output(jax.random.key(0), jnp.zeros((1, 28, 28, 1)), train=False)[0]
    )
    chex.assert_shape(logits, (1, 3))


@pytest.mark.parametrize(
    "name",
    [
        "small_dropout", "valid_2x2", "same_3x3",
        pytest.param("deep_augmented", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_dropout_needs_a_key_and_follows_it(name, getkey):
    model, variables, side = create(name)
    images = jax.random.uniform(getkey(), (1, side, side, 1))

    def train(key):
        return apply(model, variables, images, train=True, dropout=key)

    key, other = getkey(), getkey()
    chex.assert_trees_all_equal(train(key), train(key))
    assert not np.array_equal(train(key), train(other))
    with pytest.raises(InvalidRngError):
        apply(model, variables, images, train=True)


def test_he_stack_has_no_dropout(getkey):
    model, variables, _ = create("he_stack")
    images = jax.random.uniform(getkey(), (1, 28, 28, 1))
    chex.assert_trees_all_equal(
        apply(model, variables, images, train=True),
        apply(model, variables, images, train=False),
    )


@pytest.mark.slow
def test_deep_augmented_resizes_smaller_images(getkey):
    model = fm.create_model("deep_augmented", image_size=64)
    images = jax.random.uniform(getkey(), (2, 28, 28, 1))
    config = fm.StepConfig(model=model, tx=optax.sgd(0.1))
    variables = fm.create_train_state(getkey(), config).variables
    logits = apply(model, variables, images, train=False)
    chex.assert_shape(logits, (2, 10))
    larger = jax.image.resize(images, (2, 64, 64, 1), "bilinear")
    chex.assert_trees_all_close(apply(model, variables, larger, train=False), logits, rtol=1e-5)


def keras_network(name):
    """The networks of the Keras projects, from their descriptions."""
    side, channels = (150, 3) if name == "deep_augmented" else (28, 1)
    inputs = keras.Input((side, side, channels))

    def conv(features, size=3, padding="valid", **options):
        return layers.Conv2D(features, size, padding=padding, activation="relu", **options)

    networks = {
        "small_dropout": [
            conv(32, kernel_initializer="random_normal"), layers.MaxPooling2D(),
            layers.Dropout(0.2),
            conv(64), layers.MaxPooling2D(), layers.Dropout(0.2),
            conv(128), layers.Dropout(0.5),
            layers.Flatten(), layers.Dense(128, activation="relu"), layers.Dense(10),
        ],
        "valid_2x2": [
            conv(64, 2), layers.MaxPooling2D(), layers.Dropout(0.3),
            conv(32, 2), layers.MaxPooling2D(), layers.Dropout(0.3),
            layers.Flatten(), layers.Dense(256, activation="relu"), layers.Dropout(0.5),
            layers.Dense(10),
        ],
        "same_3x3": [
            conv(64, 3, "same"), layers.MaxPooling2D(), layers.Dropout(0.3),
            conv(32, 3, "same"), layers.MaxPooling2D(), layers.Dropout(0.3),
            layers.Flatten(), layers.Dense(256, activation="relu"), layers.Dropout(0.5),
            layers.Dense(10),
        ],
        "he_stack": [
            *[conv(64, kernel_initializer="he_uniform") for _ in range(3)], layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(128, activation="relu", kernel_initializer="he_uniform"),
            layers.Dense(10),
        ],
        "deep_augmented": [
            conv(64), layers.MaxPooling2D(), conv(64), layers.MaxPooling2D(),
            conv(128), layers.MaxPooling2D(), conv(128), layers.MaxPooling2D(),
            layers.Flatten(), layers.Dropout(0.5), layers.Dense(512, activation="relu"),
            layers.Dense(10),
        ],
    }  # fmt: skip
    return keras.Sequential([inputs, *networks[name]])


def layers_in_order(params):
    """Kernels and biases as Keras lists them: convolutions first, then dense layers."""
    for kind in ("Conv", "Dense"):
        for name in sorted(name for name in params if name.startswith(kind)):
            yield params[name]["kernel"]
            yield params[name]["bias"]


@pytest.mark.parametrize("name", PROJECTS)
def test_same_weights_give_the_logits_of_keras(name, getkey, sample):
    model, variables, side = create(name)
    # Initial biases are zero, which would hide a missing bias.
    params = jax.tree.map(
        lambda p: p + 0.02 * jax.random.normal(getkey(), p.shape), variables["params"]
    )
    reference = keras_network(name)
    reference.set_weights([np.asarray(weight) for weight in layers_in_order(params)])

    images = jnp.asarray(sample.test_images[:3, ..., None] / np.float32(255))
    if side != 28:
        images = jax.image.resize(images, (3, side, side, 1), "bilinear")
    # deep_augmented in Keras takes three channels; ours takes a grey image as three equal ones.
    with jax.numpy_rank_promotion("allow"):
        expected = reference(jnp.repeat(images, reference.input_shape[-1], axis=-1), training=False)
    logits = jax.jit(model.apply, static_argnames="train")({"params": params}, images, train=False)
    chex.assert_trees_all_close(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", PROJECTS)
def test_initial_weights_are_drawn_as_in_keras(name):
    _, variables, _ = create(name)
    ours = [np.asarray(weight) for weight in layers_in_order(variables["params"])]
    for weight, reference in zip(ours, keras_network(name).get_weights(), strict=True):
        if weight.ndim == 1:
            np.testing.assert_array_equal(weight, reference)
        elif weight.size >= 1000:  # enough draws to compare the distributions
            np.testing.assert_allclose(weight.std(), reference.std(), rtol=0.06)
            np.testing.assert_allclose(np.abs(weight).max(), np.abs(reference).max(), rtol=0.06)


def test_first_filters_of_small_dropout_are_normal():
    model = fm.create_model("small_dropout")
    init = jax.jit(lambda key: model.init(key, jnp.zeros((1, 28, 28, 1)), train=False))
    kernels = [init(jax.random.key(i))["params"]["Conv_0"] for i in range(20)]
    draws = np.concatenate([np.asarray(kernel["kernel"]).ravel() for kernel in kernels])
    np.testing.assert_allclose(draws.std(), 0.05, rtol=0.05)
    # A normal has 31.7% of its draws beyond one standard deviation, a uniform 42.3%.
    np.testing.assert_allclose(np.mean(np.abs(draws) > 0.05), 0.317, atol=0.02)


# The smallest images by arithmetic. resnet20 pads and takes images of any size.
SMALLEST = {
    "small_dropout": 18, "valid_2x2": 7, "same_3x3": 4, "he_stack": 8, "deep_augmented": 46,
    "sprint": 12,
}  # fmt: skip


@pytest.mark.parametrize("name", SMALLEST)
def test_images_that_are_too_small(name):
    def init(side):
        is_resized = name == "deep_augmented"
        model = fm.create_model(name, **({"image_size": side} if is_resized else {}))
        images = jnp.zeros((1, side, side, 1))
        return jax.eval_shape(lambda: model.init(jax.random.key(0), images, train=False))

    init(SMALLEST[name])
    for side in (1, SMALLEST[name] // 2, SMALLEST[name] - 1):
        with pytest.raises(fm.errors.ConfigError, match="the images are too small"):
            init(side)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("resnet",), {}, "unknown architecture 'resnet'; choose one of small_dropout"),
        (("same_3x3", 1), {}, "num_classes is 1"),
        (("same_3x3",), {"image_size": 64}, "same_3x3 takes no such option: image_size"),
    ],
)
def test_errors(arguments, options, message):
    with pytest.raises(fm.errors.ConfigError, match=message):
        fm.create_model(*arguments, **options)
