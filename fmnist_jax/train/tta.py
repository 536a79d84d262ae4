"""Test-time augmentation: predictions averaged over flipped and shifted views of an image."""

from typing import Any

import jax
import jax.numpy as jnp

from fmnist_jax.train.predict import predict

# Rows and columns. The image and its shifts by a pixel along one diagonal, each with its mirror
# image, as in airbench94 (Jordan 2024).
SHIFTS = ((0, 0), (1, 1), (-1, -1))


def predict_views(params: Any, images: jax.Array, *, model: Any) -> jax.Array:
    """Log probabilities of the mean over six views: the image, two shifts, and their mirror images.

    The image and its mirror image have half of the weight. What a shift uncovers is 0, the
    background of Fashion-MNIST.

    Args:
      params: the model's parameters.
      images: uint8[n, height, width], values 0 to 255.
      model: see `fmnist_jax.train.loop`.

    Returns:
      float32[n, num_classes], in the order of the images.

    Raises:
      TypeError: if the images are not uint8.
      ValueError: if their shape is another.

    Example:
      >>> import optax, fmnist_jax as fm
      >>> model = fm.create_model("same_3x3")
      >>> state = fm.create_train_state(jax.random.key(0), model, optax.sgd(0.1))
      >>> logits = predict_views(state.params, jnp.zeros((5, 28, 28), jnp.uint8), model=model)
      >>> bool(jnp.allclose(jnp.exp(logits).sum(axis=1), 1))
      True
    """
    log_probabilities = []
    for shift in SHIFTS:
        shifted = _shifted(images, shift)
        for view in (shifted, shifted[:, :, ::-1]):
            log_probabilities.append(jax.nn.log_softmax(predict(params, view, model=model)))
    weights = jnp.array([0.25, 0.25, 0.125, 0.125, 0.125, 0.125])[:, None, None]
    return jax.nn.logsumexp(jnp.stack(log_probabilities) + jnp.log(weights), axis=0)


def _shifted(images: jax.Array, shift: tuple[int, int]) -> jax.Array:
    """Moved down and to the right by so many pixels, zeros behind them."""
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1)))
    height, width = images.shape[1:]
    rows, columns = (
        slice(1 - step, 1 - step + side) for step, side in zip(shift, (height, width), strict=True)
    )
    return padded[:, rows, columns]
