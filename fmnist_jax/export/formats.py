"""Exports a classifier to StableHLO, ONNX or safetensors.

Each function creates the folder if needed and returns the path of the file. It raises ConfigError
if a package is missing or the folder has another export, and VerificationError if logits or
probabilities of 256 images differ from those of the network by more than `TOLERANCE`, or the
deserialized export gives other bits than the one in memory. Nothing is written then.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from fmnist_jax.data.batches import as_stored, input_shape, scale
from fmnist_jax.data.sources import load_fashion_mnist
from fmnist_jax.digest import params_sha256
from fmnist_jax.errors import ConfigError, VerificationError, import_optional
from fmnist_jax.runs import files
from fmnist_jax.runs.classifier import Classifier
from fmnist_jax.version import __version__

PLATFORMS = ("cpu", "cuda", "tpu")
OUTPUTS = ("logits", "probabilities")

# Relative to the largest logit. float32 has 6e-8; another order of summation of a thousand products
# loses two digits.
TOLERANCE = 1e-5

NUM_TESTED = 256


def export_stablehlo(classifier: Classifier, folder: Path) -> Path:
    """Writes `model.stablehlo`, a program for CPU, CUDA and TPU, and `model.json`.

    `jax.export.deserialize(content).call(images)` runs it; this needs JAX and flatbuffers only. It
    takes uint8[batch, height, width], or [batch, height, width, 3] in colour, with any batch size,
    and returns logits and probabilities. It includes the weights. `model.json` has its SHA-256,
    because JAX does not verify the content.
    """
    import_optional("flatbuffers", "export")
    exported = export.export(_function(classifier), platforms=PLATFORMS)(_images(classifier))
    content = bytes(exported.serialize())
    loaded = export.deserialize(bytearray(content))
    # Not bitwise with the network, whose program has one platform and batch size.
    _check(classifier, loaded.call, exported.call)
    description = _metadata(classifier) | {
        "format": "stablehlo",
        "sha256": hashlib.sha256(content).hexdigest(),
        "platforms": list(PLATFORMS),
        "calling_convention": exported.calling_convention_version,
        "jax": jax.__version__,
    }
    path = folder / "model.json"
    # Source locations in the program differ from call to call, and so does its SHA-256.
    if path.exists() and files.read_json(path) | {"sha256": ""} != description | {"sha256": ""}:
        raise ConfigError(f"{path} is another export; choose another folder")
    files.make_folder(folder)
    files.write_bytes(folder / "model.stablehlo", content)
    files.write_json(path, description)
    return folder / "model.stablehlo"


def export_onnx(classifier: Classifier, folder: Path) -> Path:
    """Writes `model.onnx`, with the input "images" and the outputs "logits" and "probabilities".

    The input is that of `export_stablehlo`. The metadata has names and recipe.
    """
    import_optional("onnx", "export")
    runtime = import_optional("onnxruntime", "export")
    from fmnist_jax.export.onnx_graph import to_onnx

    metadata = {name: json.dumps(value) for name, value in _metadata(classifier).items()}
    model = to_onnx(_function(classifier), _images(classifier), OUTPUTS, metadata)
    content = model.SerializeToString()
    session = runtime.InferenceSession(content, providers=["CPUExecutionProvider"])
    _check(classifier, lambda images: session.run(None, {"images": images}))
    return _write(folder / "model.onnx", content)


def export_safetensors(classifier: Classifier, folder: Path) -> Path:
    """Writes `model.safetensors`: the variables by path, such as "params.Conv_0.kernel" in Linen.

    Linen's kernels of convolutions are float32[height, width, input, output]. The metadata has one
    entry, "fmnist_jax": JSON with class names, temperature and recipe.
    """
    safetensors = import_optional("safetensors.numpy", "export")
    leaves, treedef = jax.tree.flatten_with_path(classifier.variables)
    arrays = {
        jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf)
        for path, leaf in leaves
    }
    # A single entry, because safetensors writes several in varying order.
    metadata = {"fmnist_jax": json.dumps(_metadata(classifier))}
    content = safetensors.save(arrays, metadata)
    loaded = safetensors.load(content)
    variables = jax.tree.unflatten(treedef, [jnp.asarray(loaded[name]) for name in arrays])
    restored = dataclasses.replace(classifier, variables=variables)
    _check(classifier, _function(restored), _function(classifier))
    return _write(folder / "model.safetensors", content)


FORMATS: dict[str, Callable[[Classifier, Path], Path]] = {
    "stablehlo": export_stablehlo,
    "onnx": export_onnx,
    "safetensors": export_safetensors,
}


def _images(classifier: Classifier) -> jax.ShapeDtypeStruct:
    (batch,) = export.symbolic_shape("batch")
    return jax.ShapeDtypeStruct((batch, *(classifier.image_shape or (28, 28))), jnp.uint8)


def _function(classifier: Classifier) -> Any:
    def apply(image: jax.Array) -> tuple[jax.Array, jax.Array]:
        images = scale(image[None])
        logits = classifier.model.apply(classifier.variables, images, train=False)[0]
        return logits, jax.nn.softmax(logits / classifier.temperature)

    # One image at a time, because `len` of an array with a symbolic batch size is an error.
    return jax.jit(jax.vmap(apply))


def _metadata(classifier: Classifier) -> dict[str, Any]:
    shape = ", ".join(map(str, ("batch", *_images(classifier).shape[1:])))
    content = ", the article light on black" if classifier.prepares_articles else ""
    num_classes = len(classifier.class_names)
    return {
        "fmnist_jax": __version__,
        "class_names": list(classifier.class_names),
        "temperature": classifier.temperature,
        "recipe": dataclasses.asdict(classifier.recipe),
        "step": classifier.step,
        "params_sha256": params_sha256(classifier.variables["params"]),
        "input": f"images: uint8[{shape}]{content}",
        "outputs": [f"{name}: float32[batch, {num_classes}]" for name in OUTPUTS],
    }


def _check(
    classifier: Classifier,
    exported: Callable[[np.ndarray], Any],
    in_memory: Callable[[np.ndarray], Any] | None = None,
) -> None:
    """Compares a deserialized export with the network, and bitwise with the export in memory."""
    height, width, channels = input_shape(_images(classifier).shape[1:])
    grid = np.arange(height) * 28 // height, np.arange(width) * 28 // width
    # Channels are different images, so that exchanged ones are found.
    images = load_fashion_mnist(sample=True).test_images[: NUM_TESTED * channels]
    images = images[:, grid[0]][:, :, grid[1]]
    images = as_stored(np.stack(np.split(images, channels), -1))
    found = [np.asarray(array) for array in exported(images)]
    expected = classifier.logits(images), classifier.probabilities(images)
    limits = TOLERANCE * np.abs(expected[0]).max(), TOLERANCE
    for name, *arrays, limit in zip(OUTPUTS, found, expected, limits, strict=True):
        difference = np.abs(np.subtract(*arrays)).max()
        if not difference <= limit:
            raise VerificationError(
                f"{name} of the export differ from the network by {difference:.1e}; expected at "
                f"most {limit:.1e}, so nothing was written"
            )
    if in_memory is not None and not all(map(np.array_equal, found, in_memory(images))):
        raise VerificationError(
            "the deserialized export differs from the one in memory; nothing was written"
        )


def _write(path: Path, content: bytes) -> Path:
    if path.exists() and path.read_bytes() != content:
        raise ConfigError(f"{path} is another export; choose another folder")
    files.make_folder(path.parent)
    files.write_bytes(path, content)
    return path
