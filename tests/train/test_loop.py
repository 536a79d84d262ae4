"""The compiled loop: how it may be cut, mapped and called, and what it compiles to."""

import dataclasses
import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fmnist_jax as fm
from fmnist_jax.data import batches
from fmnist_jax.data.augment import example_keys
from fmnist_jax.errors import ConfigError
from fmnist_jax.runs.plan import create_plan
from fmnist_jax.train import metrics
from fmnist_jax.train.loop import train_epoch, train_steps
from tests.conftest import ONE_PER_NETWORK, train_step
from tests.small import Small

BATCH = 16
HYPERPARAMS = fm.Hyperparams(learning_rate=1e-3)
CONFIG = fm.StepConfig(
    model=Small(),
    tx=fm.create_optimizer("adam"),
    batch_size=BATCH,
    augment=fm.AUGMENTATIONS["keras"],
    microbatch_size=8,
)


@pytest.fixture(scope="module")
def arrays(tiny):
    """Sixty images and labels: four steps per epoch, of which the last has twelve examples."""
    return jnp.asarray(tiny.train_images), jnp.asarray(tiny.train_labels)


def run(arrays, calls, epochs=2, config=CONFIG, hyperparams=HYPERPARAMS, **changed):
    """Trains with each epoch cut into calls of these numbers of steps."""
    streams = fm.create_streams(3)._replace(**changed)
    state, sums = fm.create_train_state(streams.init, config), []
    for epoch in range(epochs):
        order = fm.epoch_order(streams.shuffle, epoch, jnp.arange(len(arrays[1])))
        total = metrics.zeros()
        for num_steps in calls:
            inputs = fm.TrainInputs(arrays[0], arrays[1], streams, hyperparams, order)
            state, total = fm.train_steps(state, inputs, num_steps, total, config=config)
        sums.append(total)
    return jax.device_get((state, sums))


@pytest.mark.parametrize("calls", [[1, 3], [2, 2], [1, 1, 1, 1], [0, 4]])
def test_bits_do_not_depend_on_how_an_epoch_is_cut_into_calls(arrays, calls):
    chex.assert_trees_all_equal(run(arrays, calls), run(arrays, [4]))


def test_one_trace_serves_every_call_and_every_hyperparameter(arrays):
    loss = chex.assert_max_traces(metrics.cross_entropy, n=1)
    config = dataclasses.replace(CONFIG, loss=loss, schedule=fm.create_schedule("cosine"))
    plain = fm.Hyperparams(*map(jnp.float32, (1e-3, 100, 0, 0, 0, 0)))
    changes = {
        "learning_rate": 1e-2, "total_steps": 4, "weight_decay": 0.5, "dropout": 0.5,
        "label_smoothing": 0.5, "augmentation_strength": 0.5,
    }  # fmt: skip
    kernels = []
    for calls, change in (([4], {}), *(([1, 3], {name: changes[name]}) for name in changes)):
        hyperparams = plain._replace(**{key: jnp.float32(value) for key, value in change.items()})
        state, _ = run(arrays, calls, epochs=1, config=config, hyperparams=hyperparams)
        kernels.append(state.params["Conv_0"]["kernel"].tobytes())
    assert len(set(kernels)) == 7


def test_every_example_counts_once_per_epoch(arrays):
    _, sums = run(arrays, [4])
    assert [int(total.num_examples) for total in sums] == [60, 60]
    order = fm.epoch_order(jax.random.key(0), 1, jnp.arange(60))
    np.testing.assert_array_equal(np.sort(order), np.arange(60))
    assert not np.array_equal(order, fm.epoch_order(jax.random.key(0), 2, jnp.arange(60)))


def test_the_last_batch_is_padded_with_the_first_examples(arrays):
    order = jnp.arange(60)[::-1]
    examples, batch = batches.read_batch(
        arrays[0], arrays[1], order, jnp.int32(7), fm.create_streams(0), batch_size=BATCH
    )
    np.testing.assert_array_equal(examples, [*range(11, -1, -1), 59, 58, 57, 56])
    np.testing.assert_array_equal(batch.mask, np.arange(16) < 12)
    expected = np.asarray(arrays[0])[examples] / 255
    np.testing.assert_allclose(batch.images[..., 0], expected, rtol=1e-6)
    np.testing.assert_array_equal(batch.labels, arrays[1][examples])


def test_the_loop_repeats_the_step(arrays):
    streams = fm.create_streams(3)
    expected = fm.create_train_state(streams.init, CONFIG)
    order = fm.epoch_order(streams.shuffle, 0, jnp.arange(60))
    assert CONFIG.augment is not None
    for index in range(3):
        examples = order[index * BATCH : (index + 1) * BATCH]
        images = CONFIG.augment(streams.augment, jnp.int32(0), examples, arrays[0][examples])
        batch = fm.Batch(images, arrays[1][examples], jnp.ones(BATCH, bool))
        key = jax.random.fold_in(streams.dropout, index)
        expected, _ = train_step(expected, batch, key, HYPERPARAMS, config=CONFIG)
    result, _ = run(arrays, [3], epochs=1)
    chex.assert_trees_all_close(result.params, expected.params, rtol=1e-3, atol=1e-5)


def test_train_epoch_resumes_inside_an_epoch(arrays):
    expected, sums = run(arrays, [4])
    streams = fm.create_streams(3)
    state, total = fm.create_train_state(streams.init, CONFIG), None
    inputs = fm.TrainInputs(arrays[0], arrays[1], streams, HYPERPARAMS)
    stop = 3

    def next_num_steps(step, left):
        return min(stop - step, left)

    for stop in (3, 4, 8):  # the first call takes three steps, the second the rest of the epoch
        calls = train_epoch(state, inputs, total, config=CONFIG, next_num_steps=next_num_steps)
        state, total = next(calls)
        assert int(state.step) == stop
        if stop == 4:
            chex.assert_trees_all_equal(jax.device_get(total), sums[0])
            total = None
    chex.assert_trees_all_equal(jax.device_get((state, total)), (expected, sums[1]))


def test_an_epoch_needs_examples_and_steps(arrays):
    streams = fm.create_streams(3)
    state = fm.create_train_state(streams.init, CONFIG)

    def train(examples, **options):
        inputs = fm.TrainInputs(arrays[0], arrays[1], streams, HYPERPARAMS, examples)
        return next(fm.train_epoch(state, inputs, config=CONFIG, **options))

    with pytest.raises(ValueError, match="examples is empty"):
        train(jnp.arange(0))
    for count in (0, 5):
        with pytest.raises(ValueError, match=f"next_num_steps returned {count} for 4 steps"):
            train(jnp.arange(60), next_num_steps=lambda step, left, count=count: count)


def test_only_the_streams_in_use_matter(arrays):
    state, _ = run(arrays, [2], epochs=1)
    for name in ("augment", "dropout"):
        other, _ = run(arrays, [2], epochs=1, **{name: jax.random.key(99)})
        assert not np.array_equal(
            other.params["Conv_0"]["kernel"], state.params["Conv_0"]["kernel"]
        )
    chex.assert_trees_all_equal(run(arrays, [2], epochs=1, split=jax.random.key(99))[0], state)


def test_an_example_has_the_same_key_in_any_batch():
    key = jax.random.key(0)
    keys = example_keys(key, jnp.int32(3), jnp.array([7, 2, 9]))
    alone = jax.random.fold_in(jax.random.fold_in(key, 3), 2)
    np.testing.assert_array_equal(jax.random.key_data(keys[1]), jax.random.key_data(alone))


def test_images_may_have_a_channel(arrays):
    images, labels = arrays
    chex.assert_trees_all_equal(run((images[..., None], labels), [4]), run(arrays, [4]))


@pytest.mark.parametrize("transform", ["map", "vmap"])
def test_the_loop_can_be_mapped_over_seeds_and_hyperparameters(transform, arrays):
    def train(seed, hyperparams):
        streams = fm.create_streams(seed)
        state = fm.create_train_state(streams.init, CONFIG)
        order = fm.epoch_order(streams.shuffle, 0, jnp.arange(60))
        inputs = fm.TrainInputs(arrays[0], arrays[1], streams, hyperparams, order)
        state, total = fm.train_steps(state, inputs, 2, config=CONFIG)
        return state.params, total.loss

    arguments = (
        jnp.array([3, 4]),
        fm.Hyperparams(
            jnp.array([1e-3, 1e-2]), None, jnp.array([0.0, 0.5]), jnp.array([0.2, 0.6]),
            jnp.array([0.1, 0.2]), jnp.array([1.0, 0.3]),
        ),
    )  # fmt: skip
    mapped = (
        jax.vmap(train) if transform == "vmap" else lambda *xs: jax.lax.map(lambda x: train(*x), xs)
    )
    results = jax.jit(mapped)(*arguments)
    for index in range(2):
        alone = train(*jax.tree.map(lambda leaf, i=index: leaf[i], arguments))
        chex.assert_trees_all_close(
            jax.tree.map(lambda leaf, i=index: leaf[i], results), alone, rtol=1e-3, atol=1e-4
        )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": np.zeros((60, 28, 28), np.float32)}, TypeError, "images are float32"),
        ({"labels": np.zeros(59, np.int32)}, ValueError, r"shape \(59,\) for 60 images"),
        ({"labels": np.zeros((60, 1), np.int32)}, ValueError, "one label per image"),
        ({"labels": np.zeros(60, np.float32)}, TypeError, "labels are float32"),
        ({"examples": np.zeros((2, 30), np.int32)}, TypeError, r"examples are int32\[2, 30\]"),
        ({"examples": np.zeros(60, np.float32)}, TypeError, "examples are float32"),
        ({"examples": np.zeros(0, np.int32)}, ValueError, "examples is empty"),
        ({"loss": lambda logits, labels: jnp.mean(logits)}, ValueError, r"the loss has shape \(\)"),
        ({"hyperparams": fm.Hyperparams()}, ConfigError, "adam has no learning rate"),
        ({"schedule": fm.create_schedule("cosine")}, ValueError, "needs total_steps"),
        (
            {
                "schedule": fm.create_schedule("cosine"),
                "tx": optax.sgd(0.1),
                "hyperparams": fm.Hyperparams(total_steps=4),
            },
            ValueError,
            "the schedule scales Hyperparams.learning_rate, which is None",
        ),
    ],
)
def test_invalid_arguments_are_refused(change, error, message, arrays):
    streams = fm.create_streams(0)
    config = dataclasses.replace(
        CONFIG, **{name: change.pop(name) for name in ("loss", "schedule", "tx") if name in change}
    )
    state = fm.create_train_state(streams.init, config)
    inputs = fm.TrainInputs(arrays[0], arrays[1], streams, HYPERPARAMS)._replace(**change)
    with pytest.raises(error, match=message):
        fm.train_steps(state, inputs, 1, config=config)


# MFLOP and MB per image of a whole batch's step: a tenth above the measured values. The definition
# of the layers needs 20, 11, 26, 243, 2,058 and 58 MFLOP.
BOUNDS = {
    "small_dropout": (12.5, 3.0),
    "valid_2x2": (8.1, 4.2),
    "same_3x3": (16.8, 7.2),
    "he_stack": (86, 33.2),
    "deep_augmented": (699, 232.5),
    "sprint_93": (34.3, 8.5),
}
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in list(BOUNDS)[3:]]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": np.array([0, 10, 1])}, "labels are from 0 to 10, but there are 10 outputs"),
        ({"labels": np.array([0, -1, 1])}, "labels are from -1 to 1"),
        ({"examples": jnp.array([0, 3])}, "examples are from 0 to 3, but there are 3 images"),
        ({"examples": jnp.array([-1])}, "examples are from -1 to -1"),
    ],
)
def test_values_out_of_range_are_refused(changes, message):
    """They would give a loss of NaN, or train on another image."""
    images = np.zeros((3, 28, 28), np.uint8)
    inputs = fm.TrainInputs(images, np.arange(3), fm.create_streams(0), HYPERPARAMS)
    state = fm.create_train_state(jax.random.key(0), CONFIG)
    wrong = inputs._replace(**changes)
    for calls in (
        train_epoch(state, wrong, config=CONFIG), fm.train_epochs(state, wrong, 1, config=CONFIG)
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            next(calls)
    if "labels" in changes:
        with pytest.raises(ValueError, match="labels are from"):
            fm.evaluate(state.variables, images, changes["labels"], model=CONFIG.model)


def test_a_donated_state_is_named(arrays):
    inputs = fm.TrainInputs(arrays[0], arrays[1], fm.create_streams(0), HYPERPARAMS)
    state = fm.create_train_state(jax.random.key(0), CONFIG)
    fm.train_steps(state, inputs, 1, config=CONFIG)
    with pytest.raises(ValueError, match=r"train_steps was donated to an earlier call"):
        fm.train_steps(state, inputs, 1, config=CONFIG)
    with pytest.raises(ValueError, match="continue with the state that it returned"):
        next(train_epoch(state, inputs, config=CONFIG))


@pytest.mark.parametrize("wrong", [{"learning_rate": 1e-3}, 1e-3])
def test_hyperparams_of_another_type_are_refused(wrong, arrays):
    inputs = fm.TrainInputs(arrays[0], arrays[1], fm.create_streams(0), wrong)
    state = fm.create_train_state(jax.random.key(0), CONFIG)
    batch = fm.Batch(jnp.zeros((2, 28, 28, 1)), jnp.zeros(2, int), jnp.ones(2, bool))
    for call in (
        lambda: fm.train_steps(state, inputs, 1, config=CONFIG),
        lambda: fm.train_step(state, batch, jax.random.key(0), wrong, config=CONFIG),
    ):
        with pytest.raises(TypeError, match=r"expected Hyperparams, such as Hyperparams\("):
            call()


def test_a_loss_without_label_smoothing_is_named(arrays):
    config = dataclasses.replace(CONFIG, loss=lambda logits, labels: logits[:, 0])
    hyperparams = HYPERPARAMS._replace(label_smoothing=0.1)
    inputs = fm.TrainInputs(arrays[0], arrays[1], fm.create_streams(0), hyperparams)
    state = fm.create_train_state(jax.random.key(0), config)
    with pytest.raises(ConfigError, match="a third for label_smoothing, which is given"):
        fm.train_steps(state, inputs, 1, config=config)


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="about the compiler for CPUs")
@pytest.mark.parametrize("name", ["small_dropout", "valid_2x2", "same_3x3", *SLOW])
def test_the_compiled_loop_has_only_fast_operations(name, sample, tmp_path):
    plan = create_plan(fm.Run(recipe=fm.RECIPES[name], workdir=tmp_path), sample)
    batch_size = plan.config.batch_size
    text = compile_loop(plan).as_text()
    layouts = re.findall(r" convolution\(.*dim_labels=([^,\s]+)", text)
    assert set(layouts) <= {"b01f_01io->b01f"}
    windows = re.findall(r" convolution\(.*window={([^}]*)}", text)
    assert len(windows) == len(layouts)
    assert not [window for window in windows if "reverse" in window or "dilate" in window]
    # XLA:CPU turns a select-and-scatter into a scatter.
    assert "select-and-scatter" not in text
    assert " scatter(" not in text
    assert "ynn" not in text.lower()
    assert "conditional(" not in text
    # One loop over the steps. The others, over microbatches and over the rounds of a random draw,
    # have a length that the compiler knows.
    loops = [line for line in text.splitlines() if " while(" in line]
    assert sum("known_trip_count" not in line for line in loops) == 1
    # The training images are not copied.
    shape = ",".join(map(str, sample.train_images.shape))
    producers = set(re.findall(rf" = u8\[{shape}\]\S* ([\w-]+)\(", text))
    assert producers <= {"parameter", "get-tuple-element"}

    cost = compile_loop(plan, microbatch_size=batch_size).cost_analysis()
    flops, accessed = BOUNDS[name]
    assert cost["flops"] / batch_size <= flops * 1e6
    assert cost["bytes accessed"] / batch_size <= accessed * 1e6


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("name", ONE_PER_NETWORK)
def test_the_loop_lowers_for_accelerators_without_a_custom_call(
    name, platform, sample, tmp_path, monkeypatch
):
    plan = create_plan(fm.Run(recipe=fm.RECIPES[name], workdir=tmp_path), sample)
    arguments, options = loop_arguments(plan)
    steps: Any = train_steps.__wrapped__  # type: ignore[attr-defined]
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    # A function of its own, because another test has traced `train_steps` for this device.
    loop = jax.jit(lambda *args, config: steps(*args, config=config), static_argnames="config")
    lowered = loop.trace(*arguments, **options).lower(lowering_platforms=(platform,))
    assert "custom_call" not in lowered.as_text()


def compile_loop(plan, **changes):
    arguments, options = loop_arguments(plan, **changes)
    return train_steps.lower(*arguments, **options).compile()


def loop_arguments(plan, **changes):
    inputs = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), plan.inputs)
    config = dataclasses.replace(plan.config, **changes)
    return (plan.abstract_state, inputs, jnp.int32(1), metrics.zeros()), {"config": config}


def test_model_optimizer_and_loss_can_be_your_own(arrays):
    def hinge(logits, labels):
        margins = 1 + logits - jnp.take_along_axis(logits, labels[:, None], axis=1)
        return jnp.sum(jnp.maximum(margins, 0), axis=1) - 1

    config = fm.StepConfig(
        model=Small(), tx=optax.adamw(1e-2), batch_size=BATCH, loss=hinge, microbatch_size=8
    )
    _, sums = run(arrays, [4], epochs=6, config=config, hyperparams=fm.Hyperparams())
    losses = [total.means()["loss"] for total in sums]
    assert losses[-1] < losses[0] / 2
