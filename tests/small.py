"""Networks that compile quickly, where the network is not what is tested."""

import flax.linen as nn

from fmnist_jax.nn.layers import Conv, Dense, Dropout, flatten

SMALL, LINEAR = "tests.small:Small", "tests.small:Linear"


class Small(nn.Module):
    """A network with convolution, pooling and dropout that compiles in a second."""

    num_classes: int = 10

    @nn.compact
    def __call__(self, images, *, train, dropout=None):
        x = Conv(4, kernel_size=2, pool=True)(images)
        x = Dropout(0.3)(x, train=train, rate=dropout)
        return Dense(self.num_classes)(flatten(x))


class Linear(nn.Module):
    """The smallest network."""

    num_classes: int = 10

    @nn.compact
    def __call__(self, images, *, train):
        del train
        return nn.Dense(self.num_classes)(images.reshape(len(images), -1))
