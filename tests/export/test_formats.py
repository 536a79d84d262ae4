"""Exports give the results of the network in other programs."""

import dataclasses
import hashlib
import json
import sys

import jax
import numpy as np
import onnxruntime
import pytest
import safetensors
import scipy.special
from jax import export

import fmnist_jax as fm
from fmnist_jax.errors import ConfigError, VerificationError
from fmnist_jax.export import formats


@pytest.fixture(scope="module")
def images(sample):
    return sample.test_images


def check(outputs, classifier, images):
    logits, probabilities = (np.asarray(array) for array in outputs)
    expected = classifier.logits(images)
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max())
    expected = scipy.special.softmax(expected / np.float64(classifier.temperature), axis=1)
    np.testing.assert_allclose(probabilities, expected, atol=1e-5)


def test_stablehlo_runs_with_any_batch_size(classifier, images, tmp_path):
    path = formats.export_stablehlo(classifier, tmp_path / "new")
    description = json.loads((tmp_path / "new" / "model.json").read_text())
    content = path.read_bytes()
    assert description["sha256"] == hashlib.sha256(content).hexdigest()
    assert description["class_names"] == list(classifier.class_names)
    loaded = export.deserialize(bytearray(content))
    assert loaded.platforms == ("cpu", "cuda", "tpu")
    for size in (1, 7, 300):
        check(loaded.call(images[:size]), classifier, images[:size])


def test_onnx_runs_with_any_batch_size(classifier, images, tmp_path):
    path = formats.export_onnx(classifier, tmp_path)
    session = onnxruntime.InferenceSession(path)
    (entry,) = session.get_inputs()
    assert (entry.name, entry.type, entry.shape) == ("images", "tensor(uint8)", ["batch", 28, 28])
    assert [output.name for output in session.get_outputs()] == ["logits", "probabilities"]
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["class_names"]) == list(classifier.class_names)
    for size in (1, 7, 300):
        check(session.run(None, {"images": images[:size]}), classifier, images[:size])


def test_safetensors_holds_all_variables(classifier, tmp_path):
    path = formats.export_safetensors(classifier, tmp_path)
    with safetensors.safe_open(path, "numpy") as file:
        description = json.loads(file.metadata()["fmnist_jax"])
        names = set(file.keys())
        kernel = file.get_tensor("params.Conv_0.kernel")
    assert description["recipe"]["arch"] == classifier.recipe.arch
    np.testing.assert_array_equal(kernel, classifier.variables["params"]["Conv_0"]["kernel"])
    assert {"batch_stats.BatchNorm_0.mean", "params.Dense_0.bias"} < names
    assert len(names) == len(jax.tree.leaves(classifier.variables))


@pytest.mark.parametrize("name", formats.FORMATS)
def test_an_export_with_other_results_is_not_written(
    name, classifier, images, tmp_path, monkeypatch
):
    function = formats._function

    def other(classifier):
        apply = function(classifier)
        return jax.jit(lambda images: tuple(1.0001 * output for output in apply(images)))

    monkeypatch.setattr(formats, "_function", other)
    limit = 1e-5 * np.abs(classifier.logits(images[:256])).max()
    with pytest.raises(VerificationError, match=f"logits of the export .* at most {limit:.1e}"):
        formats.FORMATS[name](classifier, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", formats.FORMATS)
def test_another_export_is_not_overwritten(name, classifier, workdir, tmp_path):
    for _ in range(2):  # the same one may be repeated
        path = formats.FORMATS[name](classifier, tmp_path)
    content = path.read_bytes()
    with pytest.raises(ConfigError, match="is another export"):
        formats.FORMATS[name](fm.load_classifier(workdir, 4), tmp_path)
    assert path.read_bytes() == content


def test_a_missing_package_is_named(classifier, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ConfigError, match="onnxruntime is not installed; pip install"):
        formats.export_onnx(classifier, tmp_path)


def test_networks_in_colour_are_exported(colour_classifier, colours, tmp_path):
    images = colours.test_images
    path = formats.export_stablehlo(colour_classifier, tmp_path)
    description = json.loads((tmp_path / "model.json").read_text())
    assert description["input"] == "images: uint8[batch, 12, 20, 3]"
    loaded = export.deserialize(bytearray(path.read_bytes()))
    session = onnxruntime.InferenceSession(formats.export_onnx(colour_classifier, tmp_path))
    assert session.get_inputs()[0].shape == ["batch", 12, 20, 3]
    for size in (1, 7, 30):
        check(loaded.call(images[:size]), colour_classifier, images[:size])
        check(session.run(None, {"images": images[:size]}), colour_classifier, images[:size])
    with safetensors.safe_open(
        formats.export_safetensors(colour_classifier, tmp_path), "numpy"
    ) as file:
        assert file.get_tensor("params.Conv_0.kernel").shape == (2, 2, 3, 4)


@pytest.mark.parametrize("name", formats.FORMATS)
def test_an_export_with_exchanged_channels_is_not_written(
    name, colour_classifier, tmp_path, monkeypatch
):
    function = formats._function

    def other(classifier):
        reverse = {(2, 2, 3, 4): lambda kernel: kernel[:, :, ::-1]}
        variables = jax.tree.map(
            lambda leaf: reverse.get(leaf.shape, lambda same: same)(leaf), classifier.variables
        )
        return function(dataclasses.replace(classifier, variables=variables))

    monkeypatch.setattr(formats, "_function", other)
    with pytest.raises(VerificationError, match="differ from the network"):
        formats.FORMATS[name](colour_classifier, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_input_of_fashion_mnist_says_what_it_shows(classifier, tmp_path):
    formats.export_stablehlo(classifier, tmp_path)
    description = json.loads((tmp_path / "model.json").read_text())
    assert description["input"] == "images: uint8[batch, 28, 28], the article light on black"
