# mypy: disable-error-code="import-not-found, import-untyped"
"""Keras 3: `fit` on arrays in memory, on TensorFlow or JAX (environment variable KERAS_BACKEND).

The images of deep_augmented are augmented by one resampling: on TensorFlow in a `tf.data` pipeline
that prefetches, on JAX in a layer before the model.
"""

import time
from typing import Any

import keras
import numpy as np
from worker import AUGMENTED, NETWORKS, OPTIMIZERS, Case, Conv, Dense, Dropout, Trained, affine

ON_TENSORFLOW = keras.backend.backend() == "tensorflow"


class Competitor:
    """A compiled model and its data."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, case: Case) -> None:
        arch, batch_size, image_size, _ = case
        keras.utils.set_random_seed(0)
        whole = len(labels) // batch_size * batch_size
        images, labels = images[:whole, ..., None], labels[:whole]
        self.steps_per_epoch = whole // batch_size
        self.data: dict[str, Any] = {"x": images, "y": labels, "batch_size": batch_size}
        self.model = _network(arch, image_size)
        if arch != AUGMENTED:
            # Converted once, and not by each `fit`.
            self.data["x"] = keras.ops.convert_to_tensor(images.astype(np.float32) / 255)
        elif ON_TENSORFLOW:
            self.data = {"x": _pipeline(images, labels, batch_size, image_size)}
        else:
            inputs = keras.Input(images.shape[1:], dtype="uint8")
            self.model = keras.Model(inputs, self.model(Augment(image_size)(inputs)))

        # A `tf.function` over several steps. On JAX it is a Python loop, which gains nothing.
        self.steps_per_execution = (
            {"he_stack": 5, AUGMENTED: 1}.get(arch, 20) if ON_TENSORFLOW else 1
        )
        self.model.compile(
            optimizer=_optimizer(arch),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            steps_per_execution=self.steps_per_execution,
            # On a CPU, TensorFlow's XLA is ten times as slow as its kernels.
            jit_compile=not ON_TENSORFLOW or _has_gpu(),
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

    def device_peak(self) -> float | None:
        """Returns the peak device memory in MiB, if the backend reports it."""
        if ON_TENSORFLOW:
            import tensorflow as tf

            if not _has_gpu():
                return None
            return tf.config.experimental.get_memory_info("GPU:0")["peak"] / 2**20
        import jax

        statistics = jax.devices()[0].memory_stats() or {}
        return statistics["peak_bytes_in_use"] / 2**20 if statistics else None


def curve(
    arrays: dict[str, np.ndarray], recipe: dict[str, Any], seed: int
) -> list[tuple[float, float]]:
    """Trains a recipe with Adam; returns seconds and test accuracy after each epoch."""
    train = arrays["train_examples"]
    images, labels = arrays["images"][train], arrays["labels"][train]
    case = Case(recipe["arch"], recipe["batch_size"], images.shape[1], len(labels))
    competitor = Competitor(images, labels, case)
    model, steps = competitor.model, competitor.steps_per_epoch
    keras.utils.set_random_seed(seed)
    model.set_weights(_network(case.arch, case.image_size).get_weights())
    rate = keras.optimizers.schedules.CosineDecay(recipe["learning_rate"], steps * recipe["epochs"])
    at_once = competitor.steps_per_execution
    model.compile(
        optimizer=keras.optimizers.Adam(rate), loss=model.loss, metrics=["accuracy"],
        steps_per_execution=at_once, jit_compile=model.jit_compile,
    )  # fmt: skip
    # Traced and initialized by one execution, which is undone.
    initial = model.get_weights()
    model.fit(**competitor.data, steps_per_epoch=at_once, verbose=0)
    model.set_weights(initial)
    for variable in model.optimizer.variables:
        variable.assign(keras.ops.zeros_like(variable))
    test_images = arrays["test_images"][..., None].astype(np.float32) / 255
    timer, points = _Epochs(), []
    for _ in range(recipe["epochs"]):
        model.fit(**competitor.data, verbose=0, callbacks=[timer])
        _, accuracy = model.evaluate(test_images, arrays["test_labels"], batch_size=1000, verbose=0)
        points.append((timer.seconds, float(accuracy)))
    return points


def _has_gpu() -> bool:
    import tensorflow as tf

    return bool(tf.config.list_physical_devices("GPU"))


class _Epochs(keras.callbacks.Callback):
    """Measures the seconds inside epochs.

    `fit` takes up to a second before and after its epochs. Its users pay that once, but the
    benchmark calls it for every two seconds of training.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Starts the clock."""
        self._start = time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Stops it."""
        self.seconds += time.perf_counter() - self._start


class Augment(keras.layers.Layer):
    """Maps uint8[batch, 28, 28, 1] to float32[batch, image_size, image_size, 3]."""

    def __init__(self, image_size: int) -> None:
        super().__init__()
        self.image_size = image_size
        self.seed_generator = keras.random.SeedGenerator(0)

    def call(self, images: Any) -> Any:
        """Applies a random map to each image."""
        pixels = keras.ops.cast(images, "float32") / 255
        pixels = keras.ops.image.resize(pixels, (self.image_size, self.image_size))
        draws = keras.random.uniform(
            (7, keras.ops.shape(images)[0]), -1, 1, seed=self.seed_generator
        )
        maps = affine(keras.ops.unstack(draws), keras.ops.cos, keras.ops.sin)
        transforms = _in_pixels(maps, self.image_size, self.image_size)
        pixels = keras.ops.image.affine_transform(
            pixels, keras.ops.stack(transforms, axis=-1), fill_mode="nearest"
        )
        return keras.ops.repeat(pixels, 3, axis=-1)


def _in_pixels(maps: tuple[Any, ...], source: int, result: int) -> list[Any]:
    """Converts maps of `affine` to the eight numbers of a projective map, in pixels."""
    ratio, offset = source / result, 1 / result - 1

    def row(x: Any, y: Any, shift: Any) -> list[Any]:
        return [x * ratio, y * ratio, ((x + y) * offset + shift + 1) * source / 2 - 0.5]

    zero = 0 * maps[0]
    return [*row(*maps[:3]), *row(*maps[3:]), zero, zero]


def _pipeline(images: np.ndarray, labels: np.ndarray, batch_size: int, image_size: int) -> Any:
    """Returns an infinite `tf.data.Dataset` of augmented batches."""
    import tensorflow as tf

    pixels, classes = tf.constant(images), tf.constant(labels)

    def load(examples):
        batch = tf.cast(tf.gather(pixels, examples), tf.float32) / 255
        draws = tf.random.uniform((7, batch_size), -1, 1)
        maps = affine(tf.unstack(draws), tf.cos, tf.sin)
        batch = tf.raw_ops.ImageProjectiveTransformV3(
            images=batch,
            transforms=tf.stack(_in_pixels(maps, images.shape[1], image_size), axis=-1),
            output_shape=(image_size, image_size),
            fill_value=0.0,
            interpolation="BILINEAR",
            fill_mode="NEAREST",
        )
        return tf.repeat(batch, 3, axis=-1), tf.gather(classes, examples)

    order = tf.data.Dataset.range(len(labels)).shuffle(len(labels)).repeat()
    batches = order.batch(batch_size, drop_remainder=True)
    return batches.map(load, tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)


def _network(arch: str, image_size: int) -> keras.Sequential:
    channels = 3 if arch == AUGMENTED else 1
    model = keras.Sequential([keras.Input((image_size, image_size, channels))])
    for layer in NETWORKS[arch]:
        match layer:
            case Conv():
                model.add(
                    keras.layers.Conv2D(
                        layer.features,
                        layer.kernel_size,
                        padding=layer.padding,
                        activation="relu",
                        kernel_initializer=_initializer(layer.init),
                    )
                )
                if layer.pool:
                    model.add(keras.layers.MaxPooling2D())
            case Dropout():
                model.add(keras.layers.Dropout(layer.rate))
            case Dense():
                if len(model.output_shape) > 2:
                    model.add(keras.layers.Flatten())
                model.add(
                    keras.layers.Dense(
                        layer.features,
                        activation="relu" if layer.relu else None,
                        kernel_initializer=_initializer(layer.init),
                    )
                )
    return model


def _initializer(name: str) -> Any:
    # Keras' default standard deviation of "random_normal" is 0.05.
    return "random_normal" if name == "normal_0.05" else name


def _optimizer(arch: str) -> keras.optimizers.Optimizer:
    name, rate = OPTIMIZERS[arch]
    makers = {
        "adam": keras.optimizers.Adam,
        "rmsprop": keras.optimizers.RMSprop,
        "sgd": keras.optimizers.SGD,
    }
    return makers[name](rate)
