"""Shared by all competitors of `bench.py`: the networks, the augmentation and the process.

    python worker.py MODULE

Imports the module and then executes commands from standard input, one JSON object per line. The
module has a class `Competitor`, created with `(images, labels, case, **options)`, whose
`train(num_steps)` takes at least that many steps, waits for them and returns `Trained`.

Needs only the standard library and NumPy, because each framework has an environment of its own.
"""

import functools
import importlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

Initializer = Literal["glorot_uniform", "he_uniform", "normal_0.05"]


class Case(NamedTuple):
    """What all competitors train.

    Attributes:
      arch: name of the network.
      batch_size: examples per step.
      image_size: side of the network's input, in pixels.
      num_images: number of training images.
    """

    arch: str
    batch_size: int
    image_size: int
    num_images: int

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
    """Result of a call of `Competitor.train`.

    Attributes:
      num_steps: steps taken.
      loss: their mean loss.
      overhead: seconds of the call that were not spent on steps.
    """

    num_steps: int
    loss: float
    overhead: float = 0.0


Layers = tuple[Conv | Dropout | Dense, ...]

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
    "valid_2x2": (
        Conv(64, kernel_size=2, pool=True),
        Dropout(0.3),
        Conv(32, kernel_size=2, pool=True),
        Dropout(0.3),
        Dense(256),
        Dropout(0.5),
        Dense(10, relu=False),
    ),
    "same_3x3": (
        Conv(64, padding="same", pool=True),
        Dropout(0.3),
        Conv(32, padding="same", pool=True),
        Dropout(0.3),
        Dense(256),
        Dropout(0.5),
        Dense(10, relu=False),
    ),
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
}
# Its images are augmented, resized to `image_size` and have three equal channels.
AUGMENTED = "deep_augmented"


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


def main() -> None:
    """Executes commands from standard input until it ends."""
    # Standard output is for replies only; what libraries print goes to standard error.
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    module = importlib.import_module(sys.argv[1])
    competitor: Any = None
    for line in sys.stdin:
        command = json.loads(line)
        match command.pop("do"):
            case "prepare":
                case = Case(*command.pop("case"))
                arrays = load(command.pop("path"), case.num_images)
                competitor = module.Competitor(*arrays, case, **command)
                reply = train(competitor, 1)
                # From the start of the process, including that of Python.
                reply["seconds"] = time.time() - float(os.environ["BENCH_STARTED"])
            case "train":
                reply = train(competitor, **command)
            case "memory":
                device_peak = getattr(competitor, "device_peak", lambda: None)()
                reply = {"host_mib": host_peak(), "device_mib": device_peak}
            case "versions":
                names = ("jax", "jaxlib", "flax", "optax", "keras", "torch", "numpy")
                reply = {"python": sys.version.split()[0]} | {
                    package.name: package.version
                    for package in metadata.distributions()
                    if package.name in names or package.name.startswith("tensorflow")
                }
            case "curve":  # seconds and accuracy after each epoch of a whole training
                trainer = importlib.import_module(command.pop("module"))
                with np.load(command.pop("path")) as arrays:
                    reply = trainer.curve(dict(arrays), **command)
            case "call":  # a function of the module
                case = Case(*command["case"])
                arrays = load(command["path"], case.num_images)
                reply = getattr(module, command["function"])(*arrays, case)
        print(json.dumps(reply), file=replies)


def train(competitor: Any, num_steps: int, num_calls: int = 1) -> dict[str, Any]:
    """Calls `Competitor.train` and measures the time."""
    start = time.perf_counter()
    results = [competitor.train(num_steps) for _ in range(num_calls)]
    seconds = time.perf_counter() - start - sum(result.overhead for result in results)
    loss = float(np.mean([result.loss for result in results]))
    return {
        "steps": sum(result.num_steps for result in results),
        "seconds": seconds,
        "loss": loss if math.isfinite(loss) else None,  # JSON has no NaN
    }


@functools.cache
def load(path: str, num_images: int) -> tuple[np.ndarray, np.ndarray]:
    """Reads the first images, uint8[n, 28, 28], and labels, int32[n]."""
    with np.load(path) as arrays:
        return arrays["images"][:num_images], arrays["labels"][:num_images]


def host_peak() -> float | None:
    """Reads the peak resident memory in MiB from Linux; None elsewhere.

    `ru_maxrss` would start at the memory of the parent process.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) / 1024


if __name__ == "__main__":
    main()
