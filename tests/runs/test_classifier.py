"""The network of a run, loaded from the folder of the run alone."""

import json
import shutil

import numpy as np
import pytest
import scipy.special
from PIL import Image

import fmnist_jax as fm
from fmnist_jax.errors import CheckpointError, ConfigError
from fmnist_jax.runs import files
from fmnist_jax.runs.classifier import classify_files


@pytest.fixture
def copied(workdir, tmp_path):
    return shutil.copytree(workdir, tmp_path / "elsewhere")


def test_results_are_those_of_the_run(copied, sample):
    classifier = fm.load_classifier(copied)
    predictions = files.read_arrays(copied / files.PREDICTIONS)
    report = json.loads((copied / files.REPORT).read_text())
    images = sample.test_images
    np.testing.assert_array_equal(classifier.logits(images), predictions["logits"])
    np.testing.assert_array_equal(classifier.logits(images[..., None]), predictions["logits"])
    assert np.mean(classifier.predict(images) == sample.test_labels) == pytest.approx(
        report["test_accuracy"]
    )
    temperature = report["calibration"]["temperature"]
    assert temperature != 1
    expected = scipy.special.softmax(predictions["logits"] / np.float64(temperature), axis=1)
    np.testing.assert_allclose(classifier.probabilities(images), expected, atol=1e-6)
    assert classifier.class_names == tuple(report["data"]["classes"])


def test_other_checkpoints_can_be_chosen(workdir, sample):
    lines = files.read_lines(workdir / files.METRICS)
    val = [line for line in lines if line["split"] == "val"]
    best = max(val, key=lambda line: line["accuracy"])
    assert fm.load_classifier(workdir, "best").step == best["step"]
    first = fm.load_classifier(workdir, val[0]["step"])
    assert first.temperature == 1  # it was fitted to the last step
    assert np.any(
        first.logits(sample.test_images) != fm.load_classifier(workdir).logits(sample.test_images)
    )
    with pytest.raises(CheckpointError, match="has no checkpoint 7"):
        fm.load_classifier(workdir, 7)


def test_a_damaged_run_is_refused(copied):
    report = json.loads((copied / files.REPORT).read_text())
    report["params_sha256"] = "0" * 64
    (copied / files.REPORT).write_text(json.dumps(report))
    with pytest.raises(CheckpointError, match=r"another SHA-256 than report\.json says"):
        fm.load_classifier(copied)
    step = report["steps"]
    manifest = copied / files.CHECKPOINTS / str(step) / "manifest.json"
    manifest.write_text(manifest.read_text().replace("params", "parama", 1))
    with pytest.raises(CheckpointError, match="is damaged"):
        fm.load_classifier(copied)


def test_a_folder_that_is_no_run_is_refused(workdir):
    with pytest.raises(ConfigError, match=r"has no checkpoints; it holds the runs run"):
        fm.load_classifier(workdir.parent)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (np.zeros((2, 28, 28), np.float32), TypeError, "expected uint8"),
        (np.zeros((28, 28), np.uint8), ValueError, "expected \\[n, height, width\\]"),
        (np.zeros((2, 32, 32), np.uint8), ValueError, "trained on images of 28 x 28"),
        (np.zeros((2, 27, 27), np.uint8), ValueError, "trained on images of 28 x 28"),
    ],
)
def test_other_arrays_are_refused(images, error, message, classifier):
    with pytest.raises(error, match=message):
        classifier.predict(images)


def test_a_network_in_colour_takes_colour_only(colour_classifier, colour_workdir, colours):
    predictions = files.read_arrays(colour_workdir / files.PREDICTIONS)
    images = colours.test_images
    np.testing.assert_array_equal(colour_classifier.logits(images), predictions["logits"])
    assert colour_classifier.image_shape == (12, 20, 3)
    for other in (images[..., 0], images[..., :1], images.swapaxes(1, 2)):
        with pytest.raises(
            ValueError, match=r"have shape \(30, .*trained on images of 12 x 20 x 3"
        ):
            colour_classifier.predict(other)


def test_a_grey_network_refuses_colour(classifier):
    with pytest.raises(ValueError, match=r"shape \(2, 28, 28, 3\), but .* on images of 28 x 28$"):
        classifier.predict(np.zeros((2, 28, 28, 3), np.uint8))


def test_pictures_get_the_size_and_the_channels_of_the_training(
    colour_classifier, colours, tmp_path
):
    large = colours.test_images[:3].repeat(4, axis=1).repeat(4, axis=2)
    for number, image in enumerate(large):
        Image.fromarray(image).save(tmp_path / f"{number}.png")
    Image.fromarray(large[0]).convert("L").save(tmp_path / "3.png")
    paths = sorted(tmp_path.iterdir())
    pictures, found = zip(*classify_files(colour_classifier, paths), strict=True)
    expected = []
    for path in paths:
        with Image.open(path) as file:
            small = file.convert("RGB").resize((20, 12), Image.Resampling.BILINEAR)
        expected.append(np.asarray(small))
    np.testing.assert_array_equal([picture.image for picture in pictures], expected)
    probabilities = colour_classifier.probabilities(np.stack(expected))
    np.testing.assert_allclose(found, probabilities, rtol=1e-5)
    assert np.any(probabilities != colour_classifier.probabilities(np.stack(expected)[:, :, ::-1]))


def test_articles_are_prepared_for_fashion_mnist_only(classifier, colour_classifier, workdir):
    assert classifier.prepares_articles
    assert not colour_classifier.prepares_articles
    checkpoint = fm.load_checkpoint(workdir)
    assert checkpoint.settings["data_sha256"] == fm.load_fashion_mnist(sample=True).sha256


def test_no_images_have_no_predictions(classifier):
    assert classifier.predict(np.zeros((0, 28, 28), np.uint8)).shape == (0,)
