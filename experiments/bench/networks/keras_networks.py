"""The networks in the functional API of Keras 3.

They map images, float32[batch, 28, 28, 1], to logits, float32[batch, 10].
"""

from typing import Any

import keras
from keras import layers

from networks import ARCHS


def _mlp(x: Any) -> Any:
    x = layers.Flatten()(x)
    x = layers.Dense(512, activation="relu")(x)
    return layers.Dense(512, activation="relu")(x)


def _lenet5(x: Any) -> Any:
    x = layers.Conv2D(6, 5, padding="same", activation="tanh")(x)
    x = layers.AveragePooling2D(2)(x)
    x = layers.Conv2D(16, 5, activation="tanh")(x)
    x = layers.AveragePooling2D(2)(x)
    x = layers.Flatten()(x)
    x = layers.Dense(120, activation="tanh")(x)
    return layers.Dense(84, activation="tanh")(x)


def _conv_norm(x: Any, features: int, stride: int = 1) -> Any:
    x = layers.Conv2D(features, 3, stride, padding="same", use_bias=False)(x)
    return layers.BatchNormalization()(x)


def _small_resnet(x: Any) -> Any:
    x = layers.ReLU()(_conv_norm(x, 16))
    for features, stride in ((16, 1), (32, 2), (64, 2)):
        y = layers.ReLU()(_conv_norm(x, features, stride))
        y = _conv_norm(y, features)
        if x.shape != y.shape:
            x = layers.Conv2D(features, 1, stride, use_bias=False)(x)
        x = layers.ReLU()(layers.Add()([x, y]))
    return layers.GlobalAveragePooling2D()(x)


def _mobilenet_like(x: Any) -> Any:
    x = layers.Conv2D(32, 3, 2, padding="same", activation="relu")(x)
    for features in (64, 64, 128):
        x = layers.DepthwiseConv2D(3, padding="same", activation="relu")(x)
        x = layers.Conv2D(features, 1, activation="relu")(x)
    return layers.GlobalAveragePooling2D()(x)


def _convnext_like(x: Any) -> Any:
    x = layers.Conv2D(48, 2, 2)(x)
    for _ in range(3):
        y = layers.DepthwiseConv2D(7, padding="same")(x)
        y = layers.LayerNormalization()(y)
        y = layers.Dense(192, activation="gelu")(y)
        x = layers.Add()([x, layers.Dense(48)(y)])
    return layers.GlobalAveragePooling2D()(x)


class AddPositions(layers.Layer):
    """Adds a learned embedding of the position to tokens, float32[batch, tokens, features]."""

    def build(self, shape: Any) -> None:
        """Creates the embedding, float32[1, tokens, features]."""
        initializer = keras.initializers.RandomNormal(stddev=0.02)
        self.positions = self.add_weight((1, *shape[1:]), initializer, name="positions")

    def call(self, x: Any) -> Any:
        """Returns the sum."""
        return x + self.positions


def _small_vit(x: Any) -> Any:
    x = layers.Conv2D(64, 4, 4)(x)
    x = AddPositions()(layers.Reshape((49, 64))(x))
    for _ in range(4):
        y = layers.LayerNormalization()(x)
        x = layers.Add()([x, layers.MultiHeadAttention(4, key_dim=16)(y, y)])
        y = layers.LayerNormalization()(x)
        y = layers.Dense(256, activation="gelu")(y)
        x = layers.Add()([x, layers.Dense(64)(y)])
    x = layers.LayerNormalization()(x)
    return layers.GlobalAveragePooling1D()(x)


# In the order of ARCHS.
_FUNCTIONS = (_mlp, _lenet5, _small_resnet, _mobilenet_like, _convnext_like, _small_vit)


def create(arch: str) -> keras.Model:
    """Returns a network, whose logits are float32 under any policy of precision."""
    images = keras.Input((28, 28, 1))
    features = _FUNCTIONS[ARCHS.index(arch)](images)
    return keras.Model(images, layers.Dense(10, dtype="float32")(features))
