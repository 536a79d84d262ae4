"""Networks that compile quickly, where the network is not what is tested, and data in colour."""

import flax.linen as nn
import numpy as np

import fmnist_jax as fm
from fmnist_jax.nn.dropout import Dropout

SMALL, LINEAR = "tests.small:Small", "tests.small:Linear"


class Small(nn.Module):
    """A network with convolution, pooling and dropout that compiles in a second."""

    num_classes: int = 10

    @nn.compact
    def __call__(self, images, *, train, dropout=None):
        x = nn.relu(nn.Conv(4, (2, 2), padding="VALID")(images))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = Dropout(0.3)(x, train=train, rate=dropout)
        return nn.Dense(self.num_classes)(x.reshape(len(x), -1))


class Linear(nn.Module):
    """The smallest network."""

    num_classes: int = 10

    @nn.compact
    def __call__(self, images, *, train):
        del train
        return nn.Dense(self.num_classes)(images.reshape(len(images), -1))


def colour_dataset(num_classes=3, height=12, width=20):
    """Noise around one colour per class: 40 training images of each, 10 test images."""
    rng = np.random.default_rng(0)
    colours = rng.integers(40, 216, (num_classes, 3))

    def draw(count):
        labels = np.arange(count * num_classes) % num_classes
        noise = rng.integers(-40, 41, (len(labels), height, width, 3))
        return (colours[labels][:, None, None] + noise).astype(np.uint8), labels

    names = tuple(f"colour {number}" for number in range(num_classes))
    (train, train_labels), (test, test_labels) = draw(40), draw(10)
    return fm.Dataset(train, train_labels, test, test_labels, class_names=names, source="colours")
