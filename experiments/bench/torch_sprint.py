# mypy: disable-error-code="import-not-found"
"""PyTorch: the network and the recipe of sprint_94, as a user of PyTorch would write them."""

import itertools
import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import nn


class _Whitened(nn.Module):
    """5 x 5 convolution with filters that are mixed from fixed patterns."""

    def __init__(self, patterns: torch.Tensor, features: int) -> None:
        super().__init__()
        self.register_buffer("patterns", patterns)
        self.mixing = nn.Parameter(torch.empty(features, len(patterns), 1, 1))
        nn.init.kaiming_uniform_(self.mixing, a=5**0.5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        filters = (self.mixing[:, :, 0, 0] @ self.patterns.flatten(1)).view(-1, 1, 5, 5)
        return F.conv2d(images, filters)


class _Norm(nn.BatchNorm2d):
    """Batch normalization without scale."""

    def __init__(self, features: int) -> None:
        super().__init__(features, momentum=0.05)
        self.weight.requires_grad_(False)


def _network(patterns: torch.Tensor, widths: tuple[int, ...] = (32, 64, 128)) -> nn.Sequential:
    """Returns the network of `fmnist_jax.nn.sprint`."""
    width = widths[0]
    modules = [_Whitened(patterns, width), nn.MaxPool2d(2), _Norm(width), nn.ReLU()]
    modules += [_conv(width, width), _Norm(width), nn.ReLU()]
    for before, width in itertools.pairwise(widths):
        modules += [_conv(before, width), nn.MaxPool2d(2), _Norm(width), nn.ReLU()]
        modules += [_conv(width, width), _Norm(width), nn.ReLU()]
    head = nn.Linear(width, 10)
    nn.init.normal_(head.weight, std=1 / width)
    nn.init.zeros_(head.bias)
    return nn.Sequential(*modules, nn.AdaptiveMaxPool2d(1), nn.Flatten(), head)


def _conv(channels: int, features: int) -> nn.Conv2d:
    conv = nn.Conv2d(channels, features, 3, padding="same", bias=False)
    nn.init.dirac_(conv.weight.data[:channels])
    return conv


class _Muon(torch.optim.Optimizer):
    """The update of airbench94 for filters."""

    def __init__(self, filters: list[nn.Parameter], lr: float) -> None:
        super().__init__(filters, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                buffer = self.state[param].setdefault("momentum", torch.zeros_like(param))
                buffer.mul_(0.6).add_(param.grad)
                direction = (param.grad + 0.6 * buffer).flatten(1)
                param.mul_(len(param) ** 0.5 / param.norm())
                param.add_(_orthogonal(direction).view_as(param), alpha=-group["lr"])


def _orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    x = matrix / (matrix.norm() + 1e-8)
    if len(x) > x.shape[1]:
        return _orthogonal(matrix.T).T
    for _ in range(3):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x


def curve(path: str, recipe: dict[str, Any], seed: int) -> list[tuple[float, float]]:
    """Trains the recipe; returns seconds and test accuracy after each epoch."""
    arrays = np.load(path)
    torch.manual_seed(seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    patterns = torch.from_numpy(arrays["patterns"]).float().permute(2, 0, 1)
    model = _network(patterns).to(device, memory_format=torch.channels_last)
    train = arrays["train_examples"]
    images = torch.from_numpy(arrays["images"][train]).to(device)[:, None]
    labels = torch.from_numpy(arrays["labels"][train]).long().to(device)
    test_images = (torch.from_numpy(arrays["test_images"]).to(device)[:, None] / 255).split(1000)
    test_labels = torch.from_numpy(arrays["test_labels"]).to(device)

    filters = [param for param in model.parameters() if param.ndim == 4]
    biases = [p for p in model.parameters() if p.ndim == 1 and p.requires_grad]
    dense = [param for param in model.parameters() if param.ndim == 2]
    rate, batch_size = recipe["learning_rate"], recipe["batch_size"]
    groups = [{"params": biases, "lr": rate}, {"params": dense, "lr": 0.1 * rate}]
    optimizers = [
        _Muon(filters, rate),
        torch.optim.SGD(groups, momentum=0.85, nesterov=True, fused=True),
    ]
    loss = nn.CrossEntropyLoss(label_smoothing=recipe["label_smoothing"])
    steps_per_epoch = -(-len(labels) // batch_size)
    total = steps_per_epoch * recipe["epochs"]
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / total)
        for optimizer in optimizers
    ]
    mirrored = torch.rand(len(labels), device=device) < 0.5
    parts = batch_size // recipe["microbatch_size"]

    seconds, points = 0.0, []
    for epoch in range(recipe["epochs"]):
        start = time.perf_counter()
        model.train()
        for batch in torch.randperm(len(labels), device=device).split(batch_size):
            pixels = _augmented(images[batch], mirrored[batch] ^ bool(epoch % 2))
            for part, target in zip(pixels.chunk(parts), labels[batch].chunk(parts), strict=True):
                (loss(model(part), target) / parts).backward()
            for optimizer, schedule in zip(optimizers, schedules, strict=True):
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                schedule.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds += time.perf_counter() - start
        model.eval()
        with torch.no_grad():
            classes = torch.cat([model(part).argmax(1) for part in test_images])
        points.append((seconds, (classes == test_labels).float().mean().item()))
    return points


def _augmented(images: torch.Tensor, mirrored: torch.Tensor) -> torch.Tensor:
    """Shifts by at most a pixel and mirrors; returns float32 in [0, 1]."""
    images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
    padded = F.pad(images[:, 0], (1, 1, 1, 1))
    rows, columns = torch.randint(3, (2, len(images), 1), device=images.device)
    pixels = torch.arange(images.shape[-1], device=images.device)
    examples = torch.arange(len(images), device=images.device)[:, None, None]
    shifted = padded[examples, (rows + pixels)[:, :, None], (columns + pixels)[:, None, :]]
    shifted = shifted[:, None].float() / 255
    return shifted.contiguous(memory_format=torch.channels_last)
