# mypy: disable-error-code="import-not-found, import-untyped"
"""Keras 3 on TensorFlow: `fit` on arrays in memory.

The images of deep_augmented are augmented by one resampling, in a `tf.data` pipeline that
prefetches.
"""

import time
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from networks import ARCHS, keras_networks
from worker import AUGMENTED, NETWORKS, OPTIMIZERS, Case, Conv, Dense, Dropout, Trained, affine

MAKERS = {
    "adam": keras.optimizers.Adam,
    "rmsprop": keras.optimizers.RMSprop,
    "sgd": keras.optimizers.SGD,
}
INITIALIZERS = {"normal_0.05": "random_normal"}  # 0.05 is Keras' default standard deviation


class Competitor:
    """A compiled model and its data."""

    def __init__(
        self, images: np.ndarray, labels: np.ndarray, case: Case, *, bf16: bool = False
    ) -> None:
        keras.mixed_precision.set_dtype_policy("mixed_bfloat16" if bf16 else "float32")
        keras.utils.set_random_seed(0)
        self.steps_per_epoch = len(labels) // case.batch_size
        self.data: dict[str, Any] = {"x": images, "y": labels, "batch_size": case.batch_size}
        self.model = _network(case)
        if case.arch != AUGMENTED:
            # Converted once, and not by each `fit`.
            pixels = images[..., None].astype(np.float32) / 255
            self.data["x"] = keras.ops.convert_to_tensor(pixels)
        else:
            self.data = {"x": _pipeline(images, labels, case)}
        # A `tf.function` over several steps.
        self.steps_per_execution = {"he_stack": 5, AUGMENTED: 1}.get(case.arch, 20)
        name, rate = OPTIMIZERS[case.arch]
        self.compile(MAKERS[name](rate))

    def compile(self, optimizer: keras.optimizers.Optimizer, **options: Any) -> None:
        """Compiles the model."""
        self.model.compile(
            optimizer=optimizer,
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            steps_per_execution=self.steps_per_execution,
            # On a CPU, TensorFlow's XLA is ten times as slow as its kernels.
            jit_compile=bool(tf.config.list_physical_devices("GPU")),
            **options,
        )

    def train(self, num_steps: int) -> Trained:
        """Trains (see `worker`) for whole executions, so possibly for more steps."""
        start, epochs = time.perf_counter(), _Epochs()
        at_once = self.steps_per_execution
        executions, most = -(-num_steps // at_once), max(1, self.steps_per_epoch // at_once)
        losses, done = [], 0
        while done < executions:
            count = min(executions - done, most)
            history = self.model.fit(
                **self.data, steps_per_epoch=count * at_once, verbose=0, callbacks=[epochs]
            )
            losses += history.history["loss"] * count
            done += count
        elapsed = time.perf_counter() - start
        return Trained(done * at_once, float(np.mean(losses)), elapsed - epochs.seconds)


def curve(path: str, recipe: dict[str, Any], seed: int) -> list[tuple[float, float]]:
    """Trains a recipe with Adam; returns seconds and test accuracy after each epoch."""
    case = Case(recipe["arch"], recipe["batch_size"])
    arrays = np.load(path)
    train = arrays["train_examples"]
    train = train[: len(train) // case.batch_size * case.batch_size]
    competitor = Competitor(arrays["images"][train], arrays["labels"][train], case)
    model, steps = competitor.model, competitor.steps_per_epoch
    keras.utils.set_random_seed(seed)
    model.set_weights(_network(case).get_weights())
    rate = keras.optimizers.schedules.CosineDecay(recipe["learning_rate"], steps * recipe["epochs"])
    competitor.compile(keras.optimizers.Adam(rate), metrics=["accuracy"])
    # Traced and initialized by one execution, which is undone.
    initial = model.get_weights()
    model.fit(**competitor.data, steps_per_epoch=competitor.steps_per_execution, verbose=0)
    model.set_weights(initial)
    for variable in model.optimizer.variables:
        variable.assign(keras.ops.zeros_like(variable))
    test_images = arrays["test_images"][..., None].astype(np.float32) / 255
    test_labels = arrays["test_labels"]
    timer, points = _Epochs(), []
    for _ in range(recipe["epochs"]):
        model.fit(**competitor.data, verbose=0, callbacks=[timer])
        _, accuracy = model.evaluate(test_images, test_labels, batch_size=1000, verbose=0)
        points.append((timer.seconds, float(accuracy)))
    return points


class _Epochs(keras.callbacks.Callback):
    """Measures the seconds inside epochs.

    `fit` takes up to a second before and after its epochs. Its users pay that once, but the
    benchmark calls it for every two seconds of training.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._start = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.seconds += time.perf_counter() - self._start


def _in_pixels(maps: tuple[Any, ...], source: int, result: int) -> list[Any]:
    """Converts maps of `affine` to the eight numbers of a projective map, in pixels."""
    ratio, offset = source / result, 1 / result - 1

    def row(x: Any, y: Any, shift: Any) -> list[Any]:
        return [x * ratio, y * ratio, ((x + y) * offset + shift + 1) * source / 2 - 0.5]

    zero = 0 * maps[0]
    return [*row(*maps[:3]), *row(*maps[3:]), zero, zero]


def _pipeline(images: np.ndarray, labels: np.ndarray, case: Case) -> Any:
    """Returns an infinite `tf.data.Dataset` of augmented batches."""
    pixels, classes, size = tf.constant(images[..., None]), tf.constant(labels), case.input_shape[0]

    def read(examples):
        batch = tf.cast(tf.gather(pixels, examples), tf.float32) / 255
        draws = tf.random.uniform((7, case.batch_size), -1, 1)
        maps = affine(tf.unstack(draws), tf.cos, tf.sin)
        batch = tf.raw_ops.ImageProjectiveTransformV3(
            images=batch,
            transforms=tf.stack(_in_pixels(maps, images.shape[1], size), axis=-1),
            output_shape=(size, size),
            fill_value=0.0,
            interpolation="BILINEAR",
            fill_mode="NEAREST",
        )
        return tf.repeat(batch, 3, axis=-1), tf.gather(classes, examples)

    order = tf.data.Dataset.range(len(labels)).shuffle(len(labels)).repeat()
    batches = order.batch(case.batch_size, drop_remainder=True)
    return batches.map(read, tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)


def _network(case: Case) -> keras.Model:
    if case.arch in ARCHS:
        return keras_networks.create(case.arch)
    model = keras.Sequential([keras.Input(case.input_shape)])
    for layer in NETWORKS[case.arch]:
        match layer:
            case Conv(features, size, padding, pool, init):
                model.add(
                    keras.layers.Conv2D(
                        features, size, padding=padding, activation="relu",
                        kernel_initializer=INITIALIZERS.get(init, init),
                    )
                )  # fmt: skip
                if pool:
                    model.add(keras.layers.MaxPooling2D())
            case Dropout(rate):
                model.add(keras.layers.Dropout(rate))
            case Dense(features, relu, init):
                if len(model.output_shape) > 2:
                    model.add(keras.layers.Flatten())
                model.add(
                    keras.layers.Dense(
                        features, activation="relu" if relu else None,
                        kernel_initializer=INITIALIZERS.get(init, init),
                        dtype=None if relu else "float32",  # logits, under any policy
                    )
                )  # fmt: skip
    return model
