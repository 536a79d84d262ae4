# mypy: disable-error-code="import-not-found"
# ruff: noqa: D102 (`forward` is described by its class)
"""The networks in PyTorch.

They map images, float32[batch, 1, 28, 28], to logits, float32[batch, 10].
"""

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import nn

from networks import ARCHS


def _mlp() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(),
        nn.Linear(512, 10),
    )  # fmt: skip


def _lenet5() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.Tanh(), nn.AvgPool2d(2),
        nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(),
        nn.Linear(400, 120), nn.Tanh(), nn.Linear(120, 84), nn.Tanh(), nn.Linear(84, 10),
    )  # fmt: skip


def _head(features: int) -> tuple[nn.Module, ...]:
    return nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(features, 10)


def _conv_norm(channels: int, features: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(channels, features, 3, stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(features))


class Residual(nn.Module):
    """Residual block: float32[batch, channels, height, width], smaller by the stride."""

    def __init__(self, channels: int, features: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv_norm(channels, features, stride)
        self.conv2 = _conv_norm(features, features)
        self.shortcut = nn.Identity()
        if channels != features:
            self.shortcut = nn.Conv2d(channels, features, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv2(F.relu(self.conv1(x)))
        return F.relu(self.shortcut(x) + y)


def _small_resnet() -> nn.Module:
    blocks = Residual(16, 16, stride=1), Residual(16, 32, stride=2), Residual(32, 64, stride=2)
    return nn.Sequential(_conv_norm(1, 16), nn.ReLU(), *blocks, *_head(64))


def _mobilenet_like() -> nn.Module:
    modules = [nn.Conv2d(1, 32, 3, stride=2, padding=1), nn.ReLU()]
    for channels, features in ((32, 64), (64, 64), (64, 128)):
        modules += [nn.Conv2d(channels, channels, 3, padding=1, groups=channels), nn.ReLU()]
        modules += [nn.Conv2d(channels, features, 1), nn.ReLU()]
    return nn.Sequential(*modules, *_head(128))


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution and a network over channels: float32[batch, 48, height, width]."""

    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(48, 48, 7, padding=3, groups=48)
        mlp = nn.LayerNorm(48), nn.Linear(48, 192), nn.GELU(), nn.Linear(192, 48)
        self.mlp = nn.Sequential(*mlp)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.depthwise(x).permute(0, 2, 3, 1)
        return x + self.mlp(y).permute(0, 3, 1, 2)


def _convnext_like() -> nn.Module:
    blocks = [ConvNeXtBlock() for _ in range(3)]
    return nn.Sequential(nn.Conv2d(1, 48, 2, stride=2), *blocks, *_head(48))


class SmallViT(nn.Module):
    """Vision transformer on 49 patches with 64 features."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 64, 4, stride=4)
        self.positions = nn.Parameter(0.02 * torch.randn(1, 49, 64))
        blocks = [
            nn.TransformerEncoderLayer(
                64, 4, 256, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(4)
        ]
        self.blocks = nn.Sequential(*blocks, nn.LayerNorm(64))
        self.head = nn.Linear(64, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.blocks(x).mean(1))


# In the order of ARCHS.
_FUNCTIONS = (_mlp, _lenet5, _small_resnet, _mobilenet_like, _convnext_like, SmallViT)


def create(arch: str) -> nn.Module:
    """Returns a network."""
    return _FUNCTIONS[ARCHS.index(arch)]()
