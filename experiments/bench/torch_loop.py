# mypy: disable-error-code="import-not-found"
"""PyTorch: a Python loop over batches that are indexed from one tensor of images."""

import functools
import itertools
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from networks import ARCHS, torch_networks
from torch import nn
from worker import AUGMENTED, NETWORKS, OPTIMIZERS, Case, Conv, Dense, Dropout, Trained, affine

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MAKERS = {
    "adam": functools.partial(torch.optim.Adam, eps=1e-7, fused=True),
    "rmsprop": functools.partial(torch.optim.RMSprop, alpha=0.9, eps=1e-7),  # has no fused form
    "sgd": functools.partial(torch.optim.SGD, fused=True),
}
INITIALIZERS = {
    "glorot_uniform": nn.init.xavier_uniform_,
    "he_uniform": functools.partial(nn.init.kaiming_uniform_, nonlinearity="relu"),
    "normal_0.05": functools.partial(nn.init.normal_, std=0.05),
}


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
        torch.manual_seed(0)
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")  # TF32 on a GPU, as the other competitors
        self.case, self.bf16 = case, bf16
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        pixels = torch.from_numpy(images).float()[:, None] / 255
        self.images = pixels.to(DEVICE, memory_format=self.format)
        self.labels = torch.from_numpy(labels).long().to(DEVICE)
        model = _network(case).to(DEVICE, memory_format=self.format)
        name, rate = OPTIMIZERS[case.arch]
        self.optimizer = MAKERS[name](model.parameters(), lr=rate)
        self.forward = torch.compile(model) if compiled else model
        self.loss = nn.CrossEntropyLoss()
        self.batches = self._batches()

    def train(self, num_steps: int) -> Trained:
        """Trains (see `worker`)."""
        total = torch.zeros((), device=DEVICE)
        for batch in itertools.islice(self.batches, num_steps):
            images, labels = self.images[batch], self.labels[batch]
            if self.case.arch == AUGMENTED:
                images = self._augment(images)
            self.optimizer.zero_grad(set_to_none=True)
            with torch.autocast(DEVICE.type, dtype=torch.bfloat16, enabled=self.bf16):
                loss = self.loss(self.forward(images), labels)
            loss.backward()
            self.optimizer.step()
            total += loss.detach()
        return Trained(num_steps, total.item() / num_steps)

    def _batches(self) -> Iterator[torch.Tensor]:
        while True:
            order = torch.randperm(len(self.labels), device=DEVICE)
            yield from order.split(self.case.batch_size)

    def _augment(self, images: torch.Tensor) -> torch.Tensor:
        draws = torch.rand((7, len(images)), device=DEVICE) * 2 - 1
        matrix = torch.stack(affine(draws.unbind(), torch.cos, torch.sin), dim=1).view(-1, 2, 3)
        shape = [len(images), 1, *self.case.input_shape[:2]]
        grid = F.affine_grid(matrix, shape, align_corners=False)
        pixels = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
        return pixels.expand(-1, 3, -1, -1).contiguous(memory_format=self.format)


def _network(case: Case) -> nn.Module:
    if case.arch in ARCHS:
        return torch_networks.create(case.arch)
    modules: list[nn.Module] = []
    for layer in NETWORKS[case.arch]:
        match layer:
            case Conv(features, size, padding, pool):
                modules += [nn.LazyConv2d(features, size, padding=padding), nn.ReLU()]
                modules += [nn.MaxPool2d(2)] * pool
            case Dropout(rate):
                modules.append(nn.Dropout(rate))
            case Dense(features, relu):
                # Flattening a second time does nothing.
                modules += [nn.Flatten(), nn.LazyLinear(features)] + [nn.ReLU()] * relu
    model = nn.Sequential(*modules)
    height, width, channels = case.input_shape
    model(torch.zeros(1, channels, height, width))  # determines the shapes of lazy layers

    weighted = (module for module in model if hasattr(module, "weight"))
    described = (layer for layer in NETWORKS[case.arch] if not isinstance(layer, Dropout))
    for module, layer in zip(weighted, described, strict=True):
        nn.init.zeros_(module.bias)
        INITIALIZERS[layer.init](module.weight)
    return model
