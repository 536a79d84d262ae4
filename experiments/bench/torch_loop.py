# mypy: disable-error-code="import-not-found"
"""PyTorch: a Python loop over batches that are indexed from one tensor of images."""

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import nn
from worker import AUGMENTED, NETWORKS, OPTIMIZERS, Case, Conv, Dense, Dropout, Trained, affine


class Competitor:
    """A training loop.

    Attributes:
      channels_last: memory format of model and images.
      bf16: autocast to bfloat16.
      compiled: `torch.compile` of the model.
    """

    def __init__(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        case: Case,
        *,
        channels_last: bool = False,
        bf16: bool = False,
        compiled: bool = False,
    ) -> None:
        arch, self.batch_size, self.image_size, _ = case
        torch.manual_seed(0)
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")  # TF32 on a GPU, as the other competitors
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        pixels = torch.from_numpy(images).float()[:, None] / 255
        self.images = pixels.to(self.device, memory_format=self.format)
        self.labels = torch.from_numpy(labels).long().to(self.device)
        self.bf16, self.augmented = bf16, arch == AUGMENTED

        self.model = _network(arch, self.image_size).to(self.device, memory_format=self.format)
        self.optimizer = _optimizer(arch, self.model.parameters())
        self.forward = torch.compile(self.model) if compiled else self.model
        self.loss = nn.CrossEntropyLoss()
        self.batches = self._batches()

    def train(self, num_steps: int) -> Trained:
        """Trains (see `worker`)."""
        total = torch.zeros((), device=self.device)
        for batch in itertools.islice(self.batches, num_steps):
            images, labels = self.images[batch], self.labels[batch]
            if self.augmented:
                images = self._augment(images)
            self.optimizer.zero_grad(set_to_none=True)
            with self._precision():
                loss = self.loss(self.forward(images), labels)
            loss.backward()
            self.optimizer.step()
            total += loss.detach()
        return Trained(num_steps, total.item() / num_steps)

    def device_peak(self) -> float | None:
        """Returns the peak device memory in MiB; None on a CPU."""
        if self.device.type == "cpu":
            return None
        return torch.cuda.max_memory_allocated() / 2**20

    def _batches(self) -> Iterator[torch.Tensor]:
        while True:
            order = torch.randperm(len(self.labels), device=self.device)
            whole = len(order) // self.batch_size * self.batch_size
            yield from order[:whole].split(self.batch_size)

    def _precision(self) -> Any:
        if not self.bf16:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def _augment(self, images: torch.Tensor) -> torch.Tensor:
        draws = torch.rand((7, len(images)), device=self.device) * 2 - 1
        matrix = torch.stack(affine(draws.unbind(), torch.cos, torch.sin), dim=1).view(-1, 2, 3)
        shape = [len(images), 1, self.image_size, self.image_size]
        grid = F.affine_grid(matrix, shape, align_corners=False)
        pixels = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
        return pixels.expand(-1, 3, -1, -1).contiguous(memory_format=self.format)


def _network(arch: str, image_size: int) -> nn.Sequential:
    modules: list[nn.Module] = []
    channels = 3 if arch == AUGMENTED else 1
    for layer in NETWORKS[arch]:
        match layer:
            case Conv():
                modules += [
                    nn.LazyConv2d(layer.features, layer.kernel_size, padding=layer.padding),
                    nn.ReLU(),
                ]
                if layer.pool:
                    modules.append(nn.MaxPool2d(2))
            case Dropout():
                modules.append(nn.Dropout(layer.rate))
            case Dense():
                if not any(isinstance(module, nn.Flatten) for module in modules):
                    modules.append(nn.Flatten())
                modules.append(nn.LazyLinear(layer.features))
                if layer.relu:
                    modules.append(nn.ReLU())
    model = nn.Sequential(*modules)
    model(torch.zeros(1, channels, image_size, image_size))  # determines the shapes of lazy layers

    weighted = (module for module in model if hasattr(module, "weight"))
    described = (layer for layer in NETWORKS[arch] if not isinstance(layer, Dropout))
    for module, layer in zip(weighted, described, strict=True):
        nn.init.zeros_(module.bias)
        match layer.init:
            case "glorot_uniform":
                nn.init.xavier_uniform_(module.weight)
            case "he_uniform":
                nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
            case "normal_0.05":
                nn.init.normal_(module.weight, std=0.05)
    return model


def _optimizer(arch: str, parameters: Iterator[nn.Parameter]) -> torch.optim.Optimizer:
    name, rate = OPTIMIZERS[arch]
    match name:
        case "adam":
            return torch.optim.Adam(parameters, rate, eps=1e-7, fused=True)
        case "rmsprop":  # which has no fused form
            return torch.optim.RMSprop(parameters, rate, alpha=0.9, eps=1e-7)
        case _:
            return torch.optim.SGD(parameters, rate, fused=True)
