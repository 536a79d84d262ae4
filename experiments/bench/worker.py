"""Shared by all competitors: the networks, the augmentation, and the loop of their processes.

    python worker.py MODULE

Executes commands from standard input, one JSON object per line, and prints their replies. MODULE
has a class `Competitor`, created with `(images, labels, case, **options)`, whose
`train(num_steps)` takes at least that many steps, waits for them and returns `Trained`.

Needs only the standard library and NumPy, because each framework has an environment of its own.
"""

import importlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from networks import ARCHS

Initializer = Literal["glorot_uniform", "he_uniform", "normal_0.05"]
# Its images are augmented, resized to 150 x 150 and have three equal channels.
AUGMENTED = "deep_augmented"


class Case(NamedTuple):
    """What all competitors train: a network and the number of examples per step."""

    arch: str
    batch_size: int

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of the network's input."""
        return (150, 150, 3) if self.arch == AUGMENTED else (28, 28, 1)

    def __str__(self) -> str:
        return f"{self.arch}, batch size {self.batch_size:,}"


class Conv(NamedTuple):
    """Convolution, bias, ReLU and an optional 2x2 max pool."""

    features: int
    kernel_size: int = 3
    padding: Literal["valid", "same"] = "valid"
    pool: bool = False
    init: Initializer = "glorot_uniform"


class Dropout(NamedTuple):
    """Dropout in training."""

    rate: float


class Dense(NamedTuple):
    """A dense layer with bias and optional ReLU. The first one flattens its input."""

    features: int
    relu: bool = True
    init: Initializer = "glorot_uniform"


class Optimizer(NamedTuple):
    """Adam with beta 0.9 and 0.999, RMSprop with rho 0.9, both with epsilon 1e-7, or plain SGD."""

    name: Literal["adam", "rmsprop", "sgd"]
    learning_rate: float


class Trained(NamedTuple):
    """Steps taken, their mean loss, and seconds of the call that were not spent on steps."""

    num_steps: int
    loss: float
    overhead: float = 0.0


Layers = tuple[Conv | Dropout | Dense, ...]


def _two_convs(kernel_size: int, padding: Literal["valid", "same"]) -> Layers:
    return (
        Conv(64, kernel_size, padding, pool=True),
        Dropout(0.3),
        Conv(32, kernel_size, padding, pool=True),
        Dropout(0.3),
        Dense(256),
        Dropout(0.5),
        Dense(10, relu=False),
    )


# The networks of `fmnist_jax.nn.models`, for competitors that cannot import it.
NETWORKS: dict[str, Layers] = {
    "small_dropout": (
        Conv(32, pool=True, init="normal_0.05"),
        Dropout(0.2),
        Conv(64, pool=True),
        Dropout(0.2),
        Conv(128),
        Dropout(0.5),
        Dense(128),
        Dense(10, relu=False),
    ),
    "valid_2x2": _two_convs(kernel_size=2, padding="valid"),
    "same_3x3": _two_convs(kernel_size=3, padding="same"),
    "he_stack": (
        Conv(64, init="he_uniform"),
        Conv(64, init="he_uniform"),
        Conv(64, init="he_uniform", pool=True),
        Dense(128, init="he_uniform"),
        Dense(10, relu=False),
    ),
    "deep_augmented": (
        Conv(64, pool=True),
        Conv(64, pool=True),
        Conv(128, pool=True),
        Conv(128, pool=True),
        Dropout(0.5),
        Dense(512),
        Dense(10, relu=False),
    ),
}
OPTIMIZERS = {
    "small_dropout": Optimizer("adam", 1e-3),
    "valid_2x2": Optimizer("adam", 1e-3),
    "same_3x3": Optimizer("adam", 1e-3),
    "he_stack": Optimizer("sgd", 0.01),
    "deep_augmented": Optimizer("rmsprop", 1e-3),
    **dict.fromkeys(ARCHS, Optimizer("sgd", 0.01)),
}


def affine(
    draws: Sequence[Any], cos: Callable[[Any], Any], sin: Callable[[Any], Any]
) -> tuple[Any, ...]:
    """Composes random rotation, shift, shear, zoom and flip to one affine map, in any framework.

    Args:
      draws: seven arrays of shape [batch], uniform in [-1, 1].
      cos: the framework's cosine.
      sin: the framework's sine.

    Returns:
      (a, b, c, d, e, f), each of shape [batch]: the pixel at (x, y) of the result is the one at
      (ax + by + c, dx + ey + f) of the source, both from -1 to 1 across the image.
    """
    degree = math.pi / 180
    angle, shear = 40 * degree * draws[0], 0.2 * degree * draws[1]
    shift_x, shift_y = 0.4 * draws[2], 0.4 * draws[3]  # 0.2 of a side of length 2
    zoom_x, zoom_y = 1 + 0.2 * draws[4], 1 + 0.2 * draws[5]
    flip = draws[6] + 1e-9  # never zero, so its sign is 1 or -1
    scale_x = zoom_x * flip / abs(flip)
    c, s = cos(angle), sin(angle)
    height, slope = cos(shear), sin(shear)
    return (
        c * scale_x,
        -(c * slope + s * height) * zoom_y,
        c * shift_x - s * shift_y,
        s * scale_x,
        (c * height - s * slope) * zoom_y,
        s * shift_x + c * shift_y,
    )


def load(path: str, case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Reads images, uint8[n, 28, 28], and labels, int32[n], where n is a multiple of the batch."""
    with np.load(path) as arrays:
        whole = len(arrays["labels"]) // case.batch_size * case.batch_size
        return arrays["images"][:whole], arrays["labels"][:whole]


def main() -> None:
    """Executes commands from standard input until it ends."""
    # Standard output is for replies only; what libraries print goes to standard error.
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    module = importlib.import_module(sys.argv[1])
    competitor: Any = None
    for line in sys.stdin:
        command = json.loads(line)
        if "case" in command:
            command["case"] = Case(*command["case"])
        reply: Any
        match command.pop("do"):
            case "prepare":
                path, case = command.pop("path"), command.pop("case")
                competitor = module.Competitor(*load(path, case), case, **command)
                reply = train(competitor, 1)
            case "train":
                reply = train(competitor, **command)
            case "memory":
                reply = peak_memory()
            case function:  # of any module in this folder
                name, function = function.split(".")
                reply = getattr(importlib.import_module(name), function)(**command)
        print(json.dumps(reply), file=replies)


def train(competitor: Any, num_steps: int) -> dict[str, Any]:
    """Calls `Competitor.train` and measures the time."""
    start = time.perf_counter()
    done, loss, overhead = competitor.train(num_steps)
    seconds = time.perf_counter() - start - overhead
    # JSON has no NaN.
    return {"steps": done, "seconds": seconds, "loss": loss if math.isfinite(loss) else None}


def peak_memory() -> float:
    """Reads the peak resident memory in MiB. `ru_maxrss` would start at that of the parent."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) / 1024


if __name__ == "__main__":
    main()
