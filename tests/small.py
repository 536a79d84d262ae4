"""Networks that compile quickly, where the network is not what is tested."""

import flax.linen as nn

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
