"""Networks that train fast: airbench94 (Jordan 2024), adapted to 28 x 28 grey images."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from fmnist_jax.errors import ConfigError

# Variances of the discrete cosine transform of 5 x 5 patches, [vertical, horizontal frequency].
# Measured on every tenth training image; those of all 60,000 differ by at most 2 %. The
# eigenvalues of the patches' covariance differ by at most 8 %.
_PATCH_VARIANCES = np.array(
    [
        [2.1721, 0.3741, 0.1243, 0.0589, 0.0358],
        [0.2029, 0.0408, 0.0223, 0.0150, 0.0108],
        [0.0605, 0.0191, 0.0117, 0.0077, 0.0051],
        [0.0318, 0.0116, 0.0076, 0.0050, 0.0032],
        [0.0175, 0.0069, 0.0048, 0.0032, 0.0021],
    ]
)

max_pool = functools.partial(nn.max_pool, window_shape=(2, 2), strides=(2, 2))


class Sprint(nn.Module):
    """Three pairs of convolutions with batch normalization, global max pooling.

    As in airbench94, the first convolution whitens patches, pooling precedes normalization, and the
    first filters of later convolutions are initialized as the identity. Changed to train fast on
    two CPU cores: fewer filters, ReLU instead of GELU, and a single, pooled first convolution,
    which both whitens and mixes patches.

    Attributes:
      widths: filters of the three pairs.
    """

    num_classes: int = 10
    widths: tuple[int, ...] = (32, 64, 128)

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        norm = functools.partial(
            nn.BatchNorm, use_running_average=not train, momentum=0.95, use_scale=False
        )
        conv = functools.partial(nn.Conv, kernel_size=(3, 3), use_bias=False, kernel_init=dirac)
        names = (f"DiracConv_{number}" for number in itertools.count())
        x = nn.relu(norm()(max_pool(WhitenedConv(self.widths[0])(images))))
        x = nn.relu(norm()(conv(self.widths[0], name=next(names))(x)))
        for width in self.widths[1:]:
            x = nn.relu(norm()(max_pool(conv(width, name=next(names))(x))))
            x = nn.relu(norm()(conv(width, name=next(names))(x)))
        check_pixels(x)
        x = x.max(axis=(1, 2))
        # Small weights give nearly uniform initial probabilities; airbench94 divides by 256.
        return nn.Dense(self.num_classes, kernel_init=nn.initializers.normal(1 / x.shape[-1]))(x)


class SprintNarrow(Sprint):
    """`Sprint` with half the filters; trains twice as fast."""

    widths: tuple[int, ...] = (16, 32, 64)


class SprintWide(Sprint):
    """`Sprint` with 1.5 times the filters; trains half as fast."""

    widths: tuple[int, ...] = (48, 96, 192)


class WhitenedConv(nn.Module):
    """Whitening of 5 x 5 patches of grey images, then a 1x1 convolution.

    Both maps are linear, so they are computed as one convolution. The parameter is the kernel of
    the 1x1 convolution, float32[1, 1, 25, features]. Without padding, images of 28 x 28 give maps
    of 12 x 12, 6 x 6 and 3 x 3 pixels, of which Winograd tiles cover the first two exactly.
    """

    features: int

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        if images.shape[-1] != 1:
            raise ConfigError(
                f"the images have {images.shape[-1]} channels, but this network whitens patches of "
                "grey images; choose another, such as resnet20"
            )
        patterns = whitening_patterns()
        shape = (1, 1, patterns.shape[-1], self.features)
        mixing = self.param("kernel", torch_uniform, shape, jnp.float32)
        kernel = jnp.asarray(patterns, mixing.dtype) @ mixing[0, 0]
        dimensions = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            images, kernel[:, :, None], (1, 1), "VALID", dimension_numbers=dimensions
        )


def check_pixels(x: jax.Array) -> None:
    """Raises ConfigError if convolutions and pools have left no pixels."""
    if 0 in x.shape:
        raise ConfigError("the images are too small: convolutions and pooling leave no pixels")


# PyTorch's default, with standard deviation 1 / sqrt(3 fan_in).
torch_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def dirac(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    """Draws a kernel float[3, 3, channels, features] whose first filters are the identity."""
    count = min(shape[2:])
    identity = jnp.zeros((*shape[:3], count), dtype).at[1, 1].set(jnp.eye(shape[2], count))
    return torch_uniform(key, shape, dtype).at[..., :count].set(identity)


def whitening_patterns() -> np.ndarray:
    """Returns the filters that whiten 5 x 5 patches of Fashion-MNIST.

    Returns:
      float64[5, 5, 25], the basis of the discrete cosine transform, each function divided by the
      standard deviation of its coefficient. The 25 outputs have variance 1 and small correlations.
    """
    size = len(_PATCH_VARIANCES)
    frequency, position = np.meshgrid(np.arange(size), np.arange(size), indexing="ij")
    cosines = np.cos(np.pi * (position + 0.5) * frequency / size)
    cosines /= np.linalg.norm(cosines, axis=1, keepdims=True)
    patterns = np.einsum("fi,gj->ijfg", cosines, cosines) / np.sqrt(_PATCH_VARIANCES)
    return patterns.reshape(size, size, -1)
