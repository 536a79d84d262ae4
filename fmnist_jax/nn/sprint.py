"""A network for much accuracy in little time: airbench94 (Jordan 2024) for 28 x 28 grey images."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from fmnist_jax.nn import ops
from fmnist_jax.nn.layers import BatchNorm, Dense

# Variances of the 5 x 5 patches of every tenth training image (within 2 % of those of all 60,000)
# along the products of cosines (the discrete cosine transform), vertical frequency down, horizontal
# frequency to the right. The eigenvalues of their covariance differ from these by at most 8 %.
_PATCH_VARIANCES = np.array(
    [
        [2.1721, 0.3741, 0.1243, 0.0589, 0.0358],
        [0.2029, 0.0408, 0.0223, 0.0150, 0.0108],
        [0.0605, 0.0191, 0.0117, 0.0077, 0.0051],
        [0.0318, 0.0116, 0.0076, 0.0050, 0.0032],
        [0.0175, 0.0069, 0.0048, 0.0032, 0.0021],
    ]
)


class Sprint(nn.Module):
    """Whitened patches, three pairs of convolutions with batch statistics, global maximum.

    As in airbench94, pooling comes before normalization, and the first filters of a convolution
    pass its input on. Changed for two cores of a CPU: fewer filters, ReLU in place of GELU, and a
    single first convolution, which whitens and mixes patches and is pooled.

    Attributes:
      widths: filters of the three pairs.
    """

    num_classes: int = 10
    widths: tuple[int, ...] = (32, 64, 128)

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        x = WhitenedConv(self.widths[0])(images)
        x = nn.relu(BatchNorm()(x, train=train))
        x = nn.relu(BatchNorm()(DiracConv(self.widths[0])(x), train=train))
        for width in self.widths[1:]:
            x = nn.relu(BatchNorm()(DiracConv(width, pool=True)(x), train=train))
            x = nn.relu(BatchNorm()(DiracConv(width)(x), train=train))
        x = ops.global_max_pool(x)
        # Small, so that the network starts with even probabilities; airbench94 divides by 256.
        return Dense(self.num_classes, kernel_init=nn.initializers.normal(1 / x.shape[-1]))(x)


class SprintNarrow(Sprint):
    """The same with half of the filters, twice as fast."""

    widths: tuple[int, ...] = (16, 32, 64)


class SprintWide(Sprint):
    """The same with half as many filters again, half as fast."""

    widths: tuple[int, ...] = (48, 96, 192)


class WhitenedConv(nn.Module):
    """5 x 5 convolution of grey images whose patches are whitened first, 2 x 2 max pool.

    Whitening and the mixing of its 25 outputs are two linear maps, and so one convolution. The
    parameter is the second, float32[1, 1, 25, features]. Without padding, images of 28 x 28 leave
    maps of 12 x 12, 6 x 6 and 3 x 3 pixels in the network, which tiles cover exactly.
    """

    features: int

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        patterns = whitening_patterns()
        shape = (1, 1, patterns.shape[-1], self.features)
        mixing = self.param("kernel", torch_uniform, shape, jnp.float32)
        kernel = jnp.asarray(patterns, mixing.dtype) @ mixing[0, 0]
        return ops.conv2d_max_pool(images, kernel[:, :, None], "VALID")


class DiracConv(nn.Module):
    """3 x 3 convolution without bias, padded; its first filters start by passing their input on."""

    features: int
    pool: bool = False

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        shape = (3, 3, images.shape[-1], self.features)
        kernel = self.param("kernel", _dirac, shape, jnp.float32)
        return (ops.conv2d_max_pool if self.pool else ops.conv2d)(images, kernel, "SAME")


# PyTorch's default, whose standard deviation is 1 / sqrt(3 fan_in).
torch_uniform = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


def _dirac(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    passed = min(shape[2:])
    identity = jnp.zeros((*shape[:3], passed), dtype).at[1, 1].set(jnp.eye(shape[2], passed))
    return torch_uniform(key, shape, dtype).at[..., :passed].set(identity)


def whitening_patterns() -> np.ndarray:
    """Returns the filters that whiten 5 x 5 patches of Fashion-MNIST.

    Returns:
      float64[5, 5, 25]: products of cosines over the standard deviation of the training patches
      along them. Each of the 25 outputs has variance 1, and their correlations are small.
    """
    size = len(_PATCH_VARIANCES)
    frequency, position = np.meshgrid(np.arange(size), np.arange(size), indexing="ij")
    cosines = np.cos(np.pi * (position + 0.5) * frequency / size)
    cosines /= np.linalg.norm(cosines, axis=1, keepdims=True)
    patterns = np.einsum("fi,gj->ijfg", cosines, cosines) / np.sqrt(_PATCH_VARIANCES)
    return patterns.reshape(size, size, -1)
