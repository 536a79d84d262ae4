"""Exports of a classifier that other programs can run: StableHLO, ONNX, safetensors.

Each export is tested before it gets its name. On 256 images, it must give the results of the live
network within `TOLERANCE`. What was read back must give the same bits as what was written.
"""

import dataclasses
import hashlib
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from fmnist_jax.data.batches import scale
from fmnist_jax.data.sources import load_fashion_mnist
from fmnist_jax.digest import params_sha256
from fmnist_jax.errors import ConfigError, VerificationError
from fmnist_jax.runs import files
from fmnist_jax.runs.classifier import Classifier
from fmnist_jax.version import __version__

PLATFORMS = ("cpu", "cuda", "tpu")
IMAGE_SHAPE = (28, 28)
OUTPUTS = ("logits", "probabilities")

# Of the largest logit. float32 has 6e-8; sums of a thousand products in another order lose two
# digits.
TOLERANCE = 1e-5

NUM_TESTED = 256


def export_stablehlo(classifier: Classifier, folder: Path) -> Path:
    """Writes `model.stablehlo`, a program for CPU, CUDA and TPU, and `model.json`.

    `jax.export.deserialize(content).call(images)` runs it, with nothing but JAX and flatbuffers. It
    takes uint8[batch, 28, 28] with any batch size, and returns logits and probabilities. The
    weights are inside. `model.json` has its SHA-256, because JAX does not notice changed bytes.

    Args:
      classifier: the network.
      folder: created if needed.

    Returns:
      The path of the program.

    Raises:
      ConfigError: if flatbuffers is not installed, or the folder has another export.
      VerificationError: if the program gives other results than the network.
    """
    _import("flatbuffers")
    exported = export.export(jax.jit(_function(classifier)), platforms=PLATFORMS)(_images())
    content = bytes(exported.serialize())
    loaded = export.deserialize(bytearray(content))
    # The live network may differ in the last bits: its program has one platform and batch size.
    _check(classifier, loaded.call, exported.call)
    description = _describe(classifier) | {
        "format": "stablehlo",
        "sha256": hashlib.sha256(content).hexdigest(),
        "platforms": list(PLATFORMS),
        "calling_convention": exported.calling_convention_version,
        "jax": jax.__version__,
    }
    path = folder / "model.json"
    # The program itself has places in the source, which differ from call to call.
    if path.exists() and files.read_json(path) | {"sha256": ""} != description | {"sha256": ""}:
        raise ConfigError(f"{path} is another export; choose another folder")
    files.make_folder(folder)
    files.write_bytes(folder / "model.stablehlo", content)
    files.write_json(path, description)
    return folder / "model.stablehlo"


def export_onnx(classifier: Classifier, folder: Path) -> Path:
    """Writes `model.onnx`, with the input "images" and the outputs "logits" and "probabilities".

    The input is uint8[batch, 28, 28] with any batch size. Class names and recipe are in the
    metadata of the model.

    Args, returns and raises as `export_stablehlo`; onnx and onnxruntime are needed.
    """
    _import("onnx")
    runtime = _import("onnxruntime")
    from fmnist_jax.export.onnx_graph import to_onnx

    metadata = {name: json.dumps(value) for name, value in _describe(classifier).items()}
    content = to_onnx(_function(classifier), _images(), OUTPUTS, metadata).SerializeToString()
    session = runtime.InferenceSession(content, providers=["CPUExecutionProvider"])
    _check(classifier, lambda images: session.run(None, {"images": images}))
    return _write(folder / "model.onnx", content)


def export_safetensors(classifier: Classifier, folder: Path) -> Path:
    """Writes `model.safetensors`: the variables by name.

    The metadata has one entry, "fmnist_jax": JSON with class names, temperature and recipe.

    The names are those of Flax, such as "params.Conv_0.kernel"; kernels of convolutions are
    [height, width, input, output].

    Args, returns and raises as `export_stablehlo`; safetensors is needed.
    """
    safetensors = _import("safetensors.numpy")
    leaves = jax.tree.leaves_with_path(classifier.variables)
    arrays = {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf)
        for path, leaf in leaves
    }
    # One entry, because the order of several changes.
    metadata = {"fmnist_jax": json.dumps(_describe(classifier))}
    content = safetensors.save(arrays, metadata)
    loaded = safetensors.load(content)
    variables = jax.tree.unflatten(
        jax.tree.structure(classifier.variables), [loaded[name] for name in arrays]
    )
    reference = jax.jit(_function(classifier))
    _check(classifier, jax.jit(_function(classifier, variables)), reference)
    return _write(folder / "model.safetensors", content)


FORMATS: dict[str, Callable[[Classifier, Path], Path]] = {
    "stablehlo": export_stablehlo,
    "onnx": export_onnx,
    "safetensors": export_safetensors,
}


def _images() -> jax.ShapeDtypeStruct:
    (batch,) = export.symbolic_shape("batch")
    return jax.ShapeDtypeStruct((batch, *IMAGE_SHAPE), jnp.uint8)


def _function(
    classifier: Classifier, variables: Any = None
) -> Callable[[jax.Array], tuple[jax.Array, jax.Array]]:
    variables = classifier.variables if variables is None else variables

    def apply(images: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = classifier.model.apply(variables, scale(images), train=False)
        return logits, jax.nn.softmax(logits / classifier.temperature)

    return apply


def _describe(classifier: Classifier) -> dict[str, Any]:
    height, width = IMAGE_SHAPE
    num_classes = len(classifier.class_names)
    return {
        "fmnist_jax": __version__,
        "class_names": list(classifier.class_names),
        "temperature": classifier.temperature,
        "recipe": dataclasses.asdict(classifier.recipe),
        "step": classifier.step,
        "params_sha256": params_sha256(classifier.variables["params"]),
        "input": f"images: uint8[batch, {height}, {width}], the article light on black",
        "outputs": [f"{name}: float32[batch, {num_classes}]" for name in OUTPUTS],
    }


def _check(
    classifier: Classifier,
    exported: Callable[[np.ndarray], Any],
    reference: Callable[[np.ndarray], Any] | None = None,
) -> None:
    """Compares logits and probabilities of the test images of the embedded sample.

    Args:
      classifier: the network.
      exported: the export, as it was read back.
      reference: the export before it was written.
    """
    images = load_fashion_mnist(sample=True).test_images[:NUM_TESTED]
    found = [np.asarray(array) for array in exported(images)]
    logits = classifier.logits(images)
    difference = np.abs(found[0] - logits).max() / np.abs(logits).max()
    if not difference <= TOLERANCE:
        raise VerificationError(
            f"the export differs from the network by {difference:.1e} of the largest logit; "
            f"expected at most {TOLERANCE:.0e}, so nothing was written"
        )
    probabilities = classifier.probabilities(images)
    if not np.abs(found[1] - probabilities).max() <= TOLERANCE:
        raise VerificationError("the probabilities of the export differ; nothing was written")
    if reference is None:
        return
    for array, other in zip(found, reference(images), strict=True):
        if not np.array_equal(array, np.asarray(other)):
            raise VerificationError("the export was not read back as it was; nothing was written")


def _write(path: Path, content: bytes) -> Path:
    if path.exists() and path.read_bytes() != content:
        raise ConfigError(f"{path} is another export; choose another folder")
    files.make_folder(path.parent)
    files.write_bytes(path, content)
    return path


def _import(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"{name.partition('.')[0]} is not installed; pip install 'fmnist_jax[export]'"
        ) from error
