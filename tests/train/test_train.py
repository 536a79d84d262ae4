"""The step and the loop: what they compute, what they compile to, what they never do."""

import functools
import re
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import fmnist_jax as fm
from fmnist_jax.nn import ops
from fmnist_jax.runs.plan import create_plan
from fmnist_jax.runs.program import compile_loop
from fmnist_jax.train import loop as train
from fmnist_jax.train import metrics
from tests.conftest import train_step

BATCH = 16


@pytest.fixture
def setup(tiny):
    """A small training with dropout and augmentation: 60 images, 4 updates an epoch."""
    streams = fm.create_streams(3)
    model = fm.create_model("small_dropout")
    tx = fm.create_optimizer("adam", 1e-3)
    options = {
        "batch_size": BATCH, "model": model, "tx": tx, "augment": fm.AUGMENTATIONS["keras"]
    }  # fmt: skip
    arrays = jnp.asarray(tiny.train_images), jnp.asarray(tiny.train_labels)
    return lambda: fm.create_train_state(streams.init, model, tx), arrays, streams, options


def run(setup, chunks, epochs=2, **changes):
    """Trains with each epoch cut into calls of so many updates."""
    create_state, (images, labels), streams, options = setup
    state, sums = create_state(), []
    for epoch in range(epochs):
        order = fm.epoch_order(streams.shuffle, epoch, jnp.arange(len(labels)))
        total = metrics.zeros()
        for count in chunks:
            state, total = fm.train_steps(
                state, images, labels, order, streams, count, total, **(options | changes)
            )
        sums.append(total)
    return jax.device_get((state, sums))


@pytest.mark.parametrize("chunks", [[1, 3], [2, 2], [1, 1, 1, 1], [0, 4]])
def test_the_bits_do_not_depend_on_how_an_epoch_is_cut(setup, chunks):
    chex.assert_trees_all_equal(run(setup, chunks), run(setup, [4]))


def test_one_trace_serves_every_call(setup):
    loss = chex.assert_max_traces(fm.cross_entropy, n=1)
    for chunks in ([4], [1, 3], [2, 1, 1]):
        run(setup, chunks, loss=loss)


def test_every_example_counts_once_an_epoch(setup, tiny):
    _, sums = run(setup, [4])
    assert [int(total.num_examples) for total in sums] == [60, 60]
    order = fm.epoch_order(jax.random.key(0), 1, jnp.arange(60))
    np.testing.assert_array_equal(np.sort(order), np.arange(60))
    assert not np.array_equal(order, fm.epoch_order(jax.random.key(0), 2, jnp.arange(60)))


def test_every_parameter_changes(setup):
    before = setup[0]()
    after, _ = run(setup, [4], epochs=1)
    assert int(after.step) == 4
    for old, new in zip(jax.tree.leaves(before.params), jax.tree.leaves(after.params), strict=True):
        assert not np.array_equal(old, new)
        chex.assert_equal_shape([old, new])
    chex.assert_tree_all_finite(after.params)


def test_the_loop_is_the_step_again_and_again(setup):
    create_state, (images, labels), streams, options = setup
    expected = create_state()
    order = fm.epoch_order(streams.shuffle, 0, jnp.arange(60))
    for index in range(3):
        examples = order[index * BATCH : (index + 1) * BATCH]
        keys = [
            jax.random.fold_in(jax.random.fold_in(streams.augment, 0), int(example))
            for example in examples
        ]
        batch = fm.Batch(
            options["augment"](jnp.stack(keys), images[examples]),
            labels[examples],
            jnp.ones(BATCH, bool),
        )
        expected, _ = train_step(
            expected,
            batch,
            jax.random.fold_in(streams.dropout, index),
            model=options["model"],
            tx=options["tx"],
        )
    result, _ = run(setup, [3], epochs=1)
    chex.assert_trees_all_close(result.params, expected.params, rtol=1e-3, atol=1e-5)


def test_padding_has_no_influence(setup):
    _, (images, labels), streams, _ = setup
    model, tx = fm.create_model("he_stack"), optax.sgd(0.1)  # no dropout: no draws to shift
    state = fm.create_train_state(streams.init, model, tx)
    pixels = train.scale(images[:5])
    short, short_metrics = train_step(
        state, fm.Batch(pixels, labels[:5], jnp.ones(5, bool)), streams.dropout, model=model, tx=tx
    )
    rows = jnp.array([0, 1, 2, 3, 4, 0, 0])
    padded, padded_metrics = train_step(
        state,
        fm.Batch(pixels[rows], labels[rows], jnp.arange(7) < 5),
        streams.dropout,
        model=model,
        tx=tx,
    )
    chex.assert_trees_all_close(padded.params, short.params, rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(padded_metrics, short_metrics, rtol=1e-6)


def test_an_example_is_augmented_alike_in_any_batch():
    key = jax.random.key(0)
    keys = train.example_keys(key, jnp.int32(3), jnp.array([7, 2, 9]))
    alone = jax.random.fold_in(jax.random.fold_in(key, 3), 2)
    np.testing.assert_array_equal(jax.random.key_data(keys[1]), jax.random.key_data(alone))


def test_streams_are_independent_of_each_other(setup):
    create_state, arrays, streams, options = setup
    state, _ = run(setup, [2], epochs=1)
    for name in ("augment", "dropout"):
        changed = streams._replace(**{name: jax.random.key(99)})
        other, _ = run((create_state, arrays, changed, options), [2], epochs=1)
        assert not np.array_equal(
            other.params["Conv_0"]["kernel"], state.params["Conv_0"]["kernel"]
        )
    unused = streams._replace(split=jax.random.key(99))
    chex.assert_trees_all_equal(
        run((create_state, arrays, unused, options), [2], epochs=1)[0], state
    )


# MFLOP and MB an image of the whole batch's update: a tenth above what it came to. The definition
# needs 20, 11, 26, 243 and 2,058 MFLOP.
BOUNDS = {
    "small_dropout": (12.5, 3.0),
    "valid_2x2": (8.1, 4.2),
    "same_3x3": (16.8, 7.2),
    "he_stack": (86, 33.2),
    "deep_augmented": (699, 232.5),
}


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="it is about the compiler for the CPU")
@pytest.mark.parametrize("name", fm.RECIPES)
def test_the_compiled_loop_has_only_fast_operations(name, sample, tmp_path):
    plan = create_plan(fm.Run(recipe=fm.RECIPES[name], workdir=tmp_path), sample)
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
    # One loop over the updates. The others, over slices and over the rounds of a random draw, have
    # a length that the compiler knows.
    loops = [line for line in text.splitlines() if " while(" in line]
    assert sum("known_trip_count" not in line for line in loops) == 1
    # The images are read where they lie.
    shape = ",".join(map(str, sample.train_images.shape))
    made_by = set(re.findall(rf" = u8\[{shape}\]\S* ([\w-]+)\(", text))
    assert made_by <= {"parameter", "get-tuple-element"}

    batch_size = plan.run.recipe.batch_size
    cost = compile_loop(plan, slice_size=batch_size).cost_analysis()
    flops, accessed = BOUNDS[name]
    assert cost["flops"] / batch_size <= flops * 1e6
    assert cost["bytes accessed"] / batch_size <= accessed * 1e6


@pytest.mark.parametrize("slice_size", [1, 3, 4, 10])
def test_slices_make_the_update_of_the_whole_batch(slice_size, getkey, sample):
    # Without dropout, whose draws depend on the slices.
    model, tx = fm.create_model("he_stack"), optax.sgd(0.1, momentum=0.9)
    batch = fm.Batch(
        train.scale(jnp.asarray(sample.train_images[:10])),
        jnp.asarray(sample.train_labels[:10]),
        jnp.arange(10) != 4,
    )
    state = fm.create_train_state(getkey(), model, tx)
    step = functools.partial(train_step, state, batch, getkey(), model=model, tx=tx)
    whole, metrics = step()
    result, sliced = step(slice_size=slice_size)
    chex.assert_trees_all_close(result, whole, rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_close(sliced, metrics, rtol=1e-6)
    assert int(sliced.finite_steps) == 1


@pytest.mark.parametrize("name", fm.ARCHS)
def test_bfloat16_is_for_the_network_alone(name, getkey, sample, monkeypatch):
    side = {"image_size": 64} if name == "deep_augmented" else {}
    model, tx = fm.create_model(name, **side), optax.sgd(0.1)
    images, labels = train.scale(jnp.asarray(sample.train_images[:8])), sample.train_labels[:8]
    batch = fm.Batch(images, jnp.asarray(labels), jnp.ones(8, bool))
    state = fm.create_train_state(getkey(), model, tx)
    step = functools.partial(fm.train_step, state, batch, getkey(), model=model, tx=tx)
    exact, exact_metrics = jax.jit(step)()
    half, half_metrics = jax.jit(functools.partial(step, dtype=jnp.bfloat16))()
    chex.assert_trees_all_equal_dtypes((half, half_metrics), (exact, exact_metrics))
    # Eight bits of mantissa: not the same numbers, but the same to about a hundredth.
    assert float(half_metrics.loss) != float(exact_metrics.loss)
    np.testing.assert_allclose(half_metrics.loss, exact_metrics.loss, rtol=0.03)
    # As near to float32 as XLA's plain operations are in bfloat16.
    monkeypatch.setattr(
        ops, "_by_platform", lambda cpu, default, *arrays, **options: default(*arrays, **options)
    )
    plain, _ = jax.jit(functools.partial(step, dtype=jnp.bfloat16))()
    error, plain_error = (
        float(optax.tree.norm(jax.tree.map(jnp.subtract, exact.params, other.params)))
        for other in (half, plain)
    )
    assert error < 1.5 * plain_error


def test_slices_have_dropout_of_their_own(getkey, sample):
    model, tx = fm.create_model("small_dropout"), optax.sgd(0.1)
    state = fm.create_train_state(getkey(), model, tx)
    # The same image twice: the two slices differ by their dropout alone.
    batch = fm.Batch(
        train.scale(jnp.asarray(sample.train_images[[0, 0]])), jnp.zeros(2, int), jnp.ones(2, bool)
    )
    losses = []

    def loss(logits, labels):
        values = fm.cross_entropy(logits, labels)
        jax.debug.callback(lambda value: losses.append(float(value)), values[0])
        return values

    fm.train_step(state, batch, getkey(), model=model, tx=tx, loss=loss, slice_size=1)
    jax.effects_barrier()
    assert len(set(losses)) == 2


def test_predict_and_evaluate_count_every_image_once(getkey, sample):
    model = fm.create_model("valid_2x2")
    state = fm.create_train_state(getkey(), model, optax.sgd(0.1))
    images, labels = jnp.asarray(sample.test_images[:53]), jnp.asarray(sample.test_labels[:53])
    expected: Any = model.apply(
        {"params": state.params}, images[..., None].astype(jnp.float32) / 255, train=False
    )
    for batch_size in (1, 10, 53, 60):
        logits = fm.predict(state.params, images, model=model, batch_size=batch_size)
        chex.assert_shape(logits, (53, 10))
        chex.assert_trees_all_close(logits, expected, rtol=1e-5, atol=1e-5)
        result = fm.evaluate(state.params, images, labels, model=model, batch_size=batch_size)
        values = result.means()
        assert int(result.num_examples) == 53
        assert values["accuracy"] == float(np.mean(expected.argmax(axis=1) == labels))
        exact = np.asarray(expected, np.float64)
        losses = np.log(np.exp(exact).sum(axis=1)) - exact[np.arange(53), labels]
        np.testing.assert_allclose(values["loss"], losses.mean(), rtol=1e-5)
    chex.assert_trees_all_equal(
        fm.predict(state.params, images[..., None], model=model),
        fm.predict(state.params, images, model=model),
    )
    chex.assert_shape(fm.predict(state.params, images[:0], model=model), (0, 10))


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (np.zeros((2, 28, 28), np.float32), TypeError, "images are float32; they must be uint8"),
        (np.zeros((28, 28), np.uint8), ValueError, r"images have shape \(28, 28\)"),
        (np.zeros((2, 28, 28, 3), np.uint8), ValueError, r"expected \[n, height, width\]"),
    ],
)
def test_predict_refuses_other_images(images, error, message, getkey):
    model = fm.create_model("same_3x3")
    state = fm.create_train_state(getkey(), model, optax.sgd(0.1))
    with pytest.raises(error, match=message):
        fm.predict(state.params, images, model=model)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": np.zeros((60, 28, 28), np.float32)}, TypeError, "images are float32"),
        ({"labels": np.zeros(59, np.int32)}, ValueError, r"60 images have labels of shape \(59,\)"),
        ({"labels": np.zeros((60, 1), np.int32)}, ValueError, "one label an image"),
        ({"labels": np.zeros(60, np.float32)}, TypeError, "labels are float32"),
        ({"order": np.zeros((2, 30), np.int32)}, TypeError, r"order is int32\[2, 30\]"),
        ({"order": np.zeros(60, np.float32)}, TypeError, "order is float32"),
        ({"order": np.zeros(0, np.int32)}, ValueError, "both must be at least 1"),
        ({"batch_size": 0}, ValueError, "batch_size is 0"),
        ({"loss": lambda logits, labels: jnp.mean(logits)}, ValueError, r"the loss has shape \(\)"),
    ],
)
def test_the_loop_refuses_what_does_not_fit(change, error, message, setup):
    create_state, (images, labels), streams, options = setup
    arrays = {"images": images, "labels": labels, "order": jnp.arange(60)}
    arguments = arrays | {"count": 1, "streams": streams} | options | change
    with pytest.raises(error, match=message):
        fm.train_steps(create_state(), **arguments)


def test_the_step_and_evaluate_refuse_what_does_not_fit(setup, tiny):
    create_state, (images, labels), streams, options = setup
    state, parts = create_state(), {"model": options["model"], "tx": options["tx"]}
    batch = fm.Batch(images[:2, ..., None], labels[:2], jnp.ones(2, bool))
    with pytest.raises(TypeError, match="images are uint8; they must be float"):
        fm.train_step(state, batch, streams.dropout, **parts)
    for wrong in (labels[:1], labels[:, None]):
        with pytest.raises(ValueError, match="one label an image"):
            fm.evaluate(state.params, images, wrong, model=parts["model"])
    with pytest.raises(ValueError, match="at least one image"):
        fm.evaluate(state.params, images[:0], labels[:0], model=parts["model"])


def test_images_may_have_a_channel(setup):
    create_state, (images, labels), streams, options = setup
    flat = run(setup, [4], epochs=1)
    with_channel = run((create_state, (images[..., None], labels), streams, options), [4], epochs=1)
    chex.assert_trees_all_equal(with_channel, flat)


def test_sums_are_float32_whatever_the_model_computes_in(tiny):
    class Half(nn.Module):
        @nn.compact
        def __call__(self, images, *, train):
            del train
            return nn.Dense(10, dtype=jnp.bfloat16)(images.reshape(len(images), -1))

    state = fm.create_train_state(jax.random.key(0), Half(), optax.sgd(0.1))
    result = fm.evaluate(state.params, tiny.test_images, tiny.test_labels, model=Half())
    chex.assert_trees_all_equal_dtypes(result, metrics.zeros())


def test_the_loop_can_be_mapped_over_seeds(setup):
    _, (images, labels), _, options = setup

    def trained(seed):
        streams = fm.create_streams(seed)
        state = fm.create_train_state(streams.init, options["model"], options["tx"])
        order = fm.epoch_order(streams.shuffle, 0, jnp.arange(60))
        state, total = fm.train_steps(state, images, labels, order, streams, 2, **options)
        return state.params["Conv_1"]["kernel"], total

    mapped = jax.jit(lambda seeds: jax.lax.map(trained, seeds))(jnp.array([3, 4]))
    for index, seed in enumerate((3, 4)):
        alone = trained(seed)
        chex.assert_trees_all_close(
            jax.tree.map(lambda leaf, i=index: leaf[i], mapped), alone, rtol=1e-3, atol=1e-4
        )


def test_one_program_serves_every_strength(setup):
    loss = chex.assert_max_traces(fm.cross_entropy, n=1)
    kernels = []
    for values in ((0.0, 0.0, 0.0), (0.5, 0.0, 0.0), (0.0, 0.5, 0.0), (0.0, 0.0, 0.5)):
        strengths = fm.Regularization(*map(jnp.float32, values))
        state, _ = run(setup, [2], epochs=1, loss=loss, regularization=strengths)
        kernels.append(state.params["Conv_0"]["kernel"])
    assert len({kernel.tobytes() for kernel in kernels}) == 4


def test_without_regularization_the_step_is_the_plain_gradient(setup):
    create_state, (images, labels), streams, options = setup
    model, pixels = options["model"], train.scale(images[:8])
    state = create_state()

    @jax.jit
    def plain(params):
        return jnp.mean(
            fm.cross_entropy(model.apply({"params": params}, pixels, train=False), labels[:8])
        )

    batch = fm.Batch(pixels, labels[:8], jnp.ones(8, bool))
    nothing = fm.Regularization(dropout=0.0, label_smoothing=0.0)
    for slice_size in (None, 3):
        gradients = functools.partial(train.gradients, model=model, slice_size=slice_size)
        grads, losses, logits = jax.jit(gradients)(
            state, batch, streams.dropout, regularization=nothing
        )
        chex.assert_trees_all_close(grads, jax.grad(plain)(state.params), rtol=1e-4, atol=1e-6)
        chex.assert_shape([losses, logits], [(8,), (8, 10)])
        np.testing.assert_allclose(jnp.mean(losses), plain(state.params), rtol=1e-5)
        np.testing.assert_allclose(fm.cross_entropy(logits, labels[:8]), losses, rtol=1e-6)


@pytest.mark.parametrize("name", ["small_dropout", "he_stack"])
def test_the_loop_can_be_vmapped_over_seeds_and_hyperparameters(name, tiny):
    images, labels = jnp.asarray(tiny.train_images), jnp.asarray(tiny.train_labels)
    model = fm.create_model(name)

    def trained(seed, learning_rate, weight_decay, label_smoothing, strength):
        streams = fm.create_streams(seed)
        tx = fm.create_optimizer("sgd", learning_rate, weight_decay=weight_decay)
        state = fm.create_train_state(streams.init, model, tx)
        order = fm.epoch_order(streams.shuffle, 0, jnp.arange(60))
        dropout = strength / 2 if name == "small_dropout" else None
        state, total = fm.train_steps(
            state, images, labels, order, streams, 2, batch_size=BATCH, model=model, tx=tx,
            augment=fm.AUGMENTATIONS["geometric"],
            regularization=fm.Regularization(dropout, label_smoothing, strength),
        )  # fmt: skip
        return state.params, total.loss

    columns = jnp.array([[3, 0.1, 0.0, 0.1, 1.0], [4, 0.05, 0.5, 0.2, 0.3]]).T
    arguments = (columns[0].astype(jnp.int32), *columns[1:])
    mapped = jax.jit(jax.vmap(trained))(*arguments)
    for index in range(2):
        alone = trained(*(column[index] for column in arguments))
        chex.assert_trees_all_close(
            jax.tree.map(lambda leaf, i=index: leaf[i], mapped), alone, rtol=1e-3, atol=1e-4
        )


class Linear(nn.Module):
    """A model of one's own."""

    @nn.compact
    def __call__(self, images, *, train):
        del train
        return nn.Dense(10)(images.reshape(len(images), -1))


def test_model_optimizer_and_loss_can_be_your_own(tiny):
    def hinge(logits, labels):
        margins = 1 + logits - jnp.take_along_axis(logits, labels[:, None], axis=1)
        return jnp.sum(jnp.maximum(margins, 0), axis=1) - 1

    model, tx, streams = Linear(), optax.adamw(1e-2), fm.create_streams(0)
    images, labels = jnp.asarray(tiny.train_images), jnp.asarray(tiny.train_labels)
    state = fm.create_train_state(streams.init, model, tx)
    losses = []
    for epoch in range(5):
        order = fm.epoch_order(streams.shuffle, epoch, jnp.arange(60))
        state, total = fm.train_steps(
            state, images, labels, order, streams, 4, batch_size=BATCH, model=model, tx=tx,
            loss=hinge,
        )  # fmt: skip
        losses.append(total.means()["loss"])
    assert losses[-1] < losses[0] / 2
    result = fm.evaluate(state.params, images, labels, model=model, loss=hinge)
    assert result.means()["accuracy"] > 0.5
