"""Image sets of any source: every layout gives the same data, and every fault its own error."""

import dataclasses
import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets
from PIL import Image

import fmnist_jax as fm
from fmnist_jax.data import image_sets, tfds
from fmnist_jax.data.dataset import describe
from fmnist_jax.runs.plan import create_plan
from tests.data.idx_files import write_idx

# TFDS' files name TensorFlow so; only what reads files may be used of it.
tf: Any = None

ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")


@pytest.fixture(scope="module")
def colours() -> fm.Dataset:
    """Forty training and twenty test images in colour, 9 x 12 pixels, three classes."""
    rng = np.random.default_rng(0)
    labels = np.arange(60, dtype=np.int32) % 3
    images = rng.integers(0, 256, (60, 9, 12, 3), np.uint8)
    names = ("cat", "dog", "owl")
    return fm.Dataset(images[:40], labels[:40], images[40:], labels[40:], class_names=names)


def write_pictures(folder, dataset, splits=("train", "test")):
    """Writes pictures that are numbered through; returns the folder."""
    for split in splits:
        images, labels = getattr(dataset, f"{split}_images"), getattr(dataset, f"{split}_labels")
        for position, (image, label) in enumerate(zip(images, labels, strict=True)):
            place = folder / split / dataset.class_names[label]
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(place / f"{position}.png")
    return folder


def write_archive(path, dataset, **changes):
    arrays = {name: getattr(dataset, name) for name in ARRAYS} | changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def assert_same(dataset, expected):
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(dataset, name), getattr(expected, name))
    assert dataset.sha256 == expected.sha256
    assert dataset.class_names == expected.class_names


def keras_archive(folder, sample):
    np.savez(folder / "set.npz", x_train=sample.train_images, y_train=sample.train_labels,
             x_test=sample.test_images, y_test=sample.test_labels)  # fmt: skip
    return folder / "set.npz"


def medmnist_archive(folder, sample):
    labels = {name: getattr(sample, name)[:, None] for name in ("train_labels", "test_labels")}
    images = {name: getattr(sample, name)[..., None] for name in ("train_images", "test_images")}
    return write_archive(folder / "set.npz", sample, **labels, **images)


def pictures(folder, sample):
    numbered = dataclasses.replace(sample, class_names=tuple("9876543210"))
    write_pictures(folder, numbered)
    # Folders in the order of the labels.
    for place in folder.glob("*/?"):
        place.rename(place.with_name(f"class {9 - int(place.name)}"))
    return folder


def idx_files(folder, sample):
    for name, file in zip(ARRAYS, ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3",
                                   "t10k-labels-idx1"), strict=True):  # fmt: skip
        write_idx(folder / f"{file}-ubyte", getattr(sample, name).astype(np.uint8))
    return folder


@pytest.mark.parametrize("write", [keras_archive, medmnist_archive, pictures, idx_files])
def test_fashion_mnist_is_recognised_in_every_layout(write, tmp_path, sample):
    dataset = fm.load_dataset(write(tmp_path, sample))
    assert_same(dataset, sample)
    assert dataset.sample
    assert dataset.source.startswith("Fashion-MNIST in ")


def test_a_folder_of_pictures_is_read_as_it_was_written(tmp_path, colours):
    assert_same(fm.load_dataset(write_pictures(tmp_path, colours)), colours)
    other = fm.load_dataset(write_archive(tmp_path / "set.npz", colours))
    assert other.class_names == ("0", "1", "2")
    assert other.sha256 == colours.sha256
    (tmp_path / "classes.txt").write_text("cat\ndog\n\nowl\n")
    assert_same(fm.load_dataset(tmp_path / "set.npz"), colours)


def test_classes_are_in_the_order_of_the_list(tmp_path, colours):
    write_pictures(tmp_path, colours)
    (tmp_path / "classes.txt").write_text("owl\ncat\ndog\n", encoding="utf-8-sig")
    dataset = fm.load_dataset(tmp_path)
    assert dataset.class_names == ("owl", "cat", "dog")
    np.testing.assert_array_equal(dataset.train_labels, (colours.train_labels + 1) % 3)


def test_classes_without_images_are_left_out(tmp_path, colours):
    labels = {name: getattr(colours, name) * 2 + 1 for name in ("train_labels", "test_labels")}
    dataset = fm.load_dataset(write_archive(tmp_path / "set.npz", colours, **labels))
    assert dataset.class_names == ("1", "3", "5")
    assert dataset.source.endswith("without 3 classes that have no images")
    np.testing.assert_array_equal(dataset.train_labels, colours.train_labels)


def test_other_files_are_named(tmp_path, colours):
    write_pictures(tmp_path, colours)
    (tmp_path / "test" / "owl" / "owl.gif").touch()
    with pytest.warns(fm.errors.DataWarning, match=r"1 other files are ignored: test/owl/owl\.gif"):
        fm.load_dataset(tmp_path)


def test_a_validation_split_is_kept(tmp_path, colours):
    write_pictures(tmp_path, colours)
    (tmp_path / "val").mkdir()
    for name in colours.class_names:
        (tmp_path / "test" / name).rename(tmp_path / "val" / name)
    write_pictures(tmp_path, colours, ["test"])
    dataset = fm.load_dataset(tmp_path)
    np.testing.assert_array_equal(dataset.val_examples, np.arange(40, 60))
    np.testing.assert_array_equal(dataset.train_images[40:], colours.test_images)
    recipe = fm.Recipe(arch="tests.small:Linear", epochs=1, batch_size=8)
    run = fm.Run(recipe=recipe, workdir=tmp_path / "run", exclude=[3, 41])
    plan = create_plan(run, dataset)
    np.testing.assert_array_equal(plan.val_examples, [40, *range(42, 60)])
    np.testing.assert_array_equal(plan.train_examples, [*range(3), *range(4, 40)])
    owls = fm.select_classes(dataset, "owl,cat")
    np.testing.assert_array_equal(
        owls.train_images[owls.val_examples], colours.test_images[colours.test_labels != 1]
    )
    # A run does not resume with another split of the same images.
    other = dataclasses.replace(dataset, val_examples=np.arange(30, 50))
    fm.fit(run, dataset, hooks=())
    with pytest.raises(fm.errors.ConfigError, match="val_examples_sha256"):
        fm.fit(run, other, hooks=())


def test_test_images_are_drawn_where_there_are_none(tmp_path, colours):
    write_pictures(tmp_path, colours, ["train"])
    dataset = fm.load_dataset(tmp_path / "train")
    assert "6 of its training images, drawn with seed 0, as test images" in dataset.source
    assert np.bincount(dataset.test_labels).tolist() == [2, 2, 2]
    together = np.concatenate([dataset.train_images, dataset.test_images]).reshape(40, -1)
    expected = colours.train_images.reshape(40, -1)
    np.testing.assert_array_equal(np.unique(together, axis=0), np.unique(expected, axis=0))
    assert fm.load_dataset(tmp_path / "train").sha256 == dataset.sha256


def test_images_of_several_sizes_are_resized(tmp_path, colours):
    write_pictures(tmp_path, colours)
    path = tmp_path / "train" / "owl" / "5.png"
    Image.fromarray(colours.train_images[5, :6]).save(path)
    with pytest.raises(fm.errors.DataError, match=r"2 sizes: 9 x 12 \(.*\), 6 x 12 \(train/owl/5"):
        fm.load_dataset(tmp_path)
    dataset = fm.load_dataset(tmp_path, resize=8)
    expected = Image.open(path).resize((8, 8), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(dataset.train_images[5], expected)
    assert dataset.image_shape == (8, 8, 3)
    again = fm.load_dataset(write_archive(tmp_path / "set.npz", colours), resize=8)
    np.testing.assert_array_equal(again.test_images, dataset.test_images)


def test_grey_pictures_among_others_are_in_colour(tmp_path, colours):
    write_pictures(tmp_path, colours)
    grey = colours.train_images[5, ..., 0]
    Image.fromarray(grey).save(tmp_path / "train" / "owl" / "5.png")
    dataset = fm.load_dataset(tmp_path)
    np.testing.assert_array_equal(dataset.train_images[5], np.stack([grey] * 3, axis=-1))


def test_converted_pictures_are_named(tmp_path, colours):
    write_pictures(tmp_path, colours)
    deep = colours.train_images[5, ..., 0].astype(np.uint16) * 257
    Image.fromarray(deep).save(tmp_path / "train" / "owl" / "5.png")
    clear = np.dstack([colours.train_images[4], np.zeros((9, 12), np.uint8)])
    Image.fromarray(clear).save(tmp_path / "train" / "dog" / "4.png")
    with pytest.warns(
        fm.errors.DataWarning,
        match=r"2 of 60 pictures have 16 bits.*: train/dog/4.png, train/owl/5.png",
    ):
        dataset = fm.load_dataset(tmp_path)
    np.testing.assert_array_equal(dataset.train_images[5, ..., 1], colours.train_images[5, ..., 0])
    np.testing.assert_array_equal(dataset.train_images[4], np.full((9, 12, 3), 255))


def test_unreadable_pictures_are_counted_and_skipped_if_asked(tmp_path, colours):
    write_pictures(tmp_path, colours)
    for position in range(0, 18, 3):
        path = tmp_path / "train" / "cat" / f"{position}.png"
        path.write_bytes(path.read_bytes()[:-20])
    match = r"6 of 60 pictures cannot be read: train/cat/0.png is damaged.* and 1 more"
    with pytest.raises(fm.errors.DataError, match=match):
        fm.load_dataset(tmp_path)
    with pytest.warns(fm.errors.DataWarning, match=f"{match}; they are left out"):
        dataset = fm.load_dataset(tmp_path, skip_unreadable=True)
    kept = [position for position in range(40) if position not in range(0, 18, 3)]
    np.testing.assert_array_equal(dataset.train_images, colours.train_images[kept])
    np.testing.assert_array_equal(dataset.train_labels, colours.train_labels[kept])


def unlink_split(folder):
    (folder / "test").rename(folder / "other")


def empty_class(folder):
    for path in (folder / "test" / "owl").iterdir():
        path.rename(path.with_suffix(".txt"))


def other_class(folder):
    (folder / "test" / "owl").rename(folder / "test" / "Owl")


def cases(folder):
    for split in ("train", "test"):
        (folder / split / "owl").rename(folder / split / "Cat")


def one_class(folder):
    for split in ("train", "test"):
        for name in ("owl", "cat"):
            (folder / split / name).rename(folder / f"{name}-{split}")
    (folder / "classes").mkdir()
    (folder / "train").rename(folder / "classes" / "train")
    (folder / "test").rename(folder / "classes" / "test")


def no_classes(folder):
    for place in folder.glob("*/*"):
        for path in place.iterdir():
            path.rename(place.parent / f"{place.name}{path.name}")
        place.rmdir()


def both_names(folder):
    (folder / "val").mkdir()
    (folder / "Val").mkdir()


def unprintable(folder):
    for split in ("train", "test"):
        (folder / split / "owl").rename(folder / split / "owl\x1b[31m")


def names(text):
    return lambda folder: (folder / "classes.txt").write_text(text)


@pytest.mark.parametrize(
    ("change", "place", "message"),
    [
        (unlink_split, ".", "other"),
        (empty_class, ".", "owl: holds no picture; expected files that end in .png"),
        (other_class, ".", "test and train have different classes: Owl, owl"),
        (cases, ".", "the classes Cat and cat differ in case only|cat and Cat differ in case only"),
        (one_class, "classes", "has the class dog only"),
        (lambda folder: None, "train/owl", "holds no subfolder per class"),
        (no_classes, ".", "train: holds no subfolder per class"),
        (both_names, ".", "has a split twice"),
        (unprintable, ".", "class_names have .*; expected different strings of printable"),
        (
            names("cat\ndog"),
            ".",
            "classes.txt: names cat, dog; expected the subfolders, cat, dog, owl",
        ),
        (names("cat\ndog\nwol"), ".", "names cat, dog, wol; expected the subfolders"),
        (lambda folder: (folder / "test").rename(folder / "val"), ".", "no folder test; it has"),
    ],
)
def test_faulty_folders(change, place, message, tmp_path, colours):
    change(write_pictures(tmp_path, colours))
    with pytest.raises(fm.errors.DataError, match=message):
        fm.load_dataset(tmp_path / place)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test_images": None}, "has one of test_images and test_labels; expected both"),
        ({"test_images": None, "test_labels": None}, "no test split; expected test_images, test_l"),
        ({"train_labels": np.full(40, 0.5)}, r"train labels are float64\[40\]; expected integers"),
        ({"train_labels": np.full(40, "cat")}, r"train labels are <U3\[40\]"),
        ({"test_labels": np.eye(20, 3, dtype=int)}, r"test labels are int64\[20, 3\]"),
        ({"train_labels": np.array([object()] * 40)}, "pickled objects, which are not read"),
        ({"train_images": np.zeros((40, 9, 12, 3))}, "train_images are float64"),
        ({"train_images": np.zeros((40, 3, 9, 12), np.uint8)}, "uint8\\[count, height, width\\]"),
        ({"test_images": np.zeros((20, 9, 12), np.uint8)}, r"test_images \[9, 12\]; expected"),
        ({"train_labels": np.arange(39) % 3}, "40 train images but 39 train labels"),
        ({"val_images": np.zeros((2, 8, 8), np.uint8), "val_labels": np.zeros(2, int)},
         r"validation images have \[8, 8\] pixels"),
        ({"train_labels": np.zeros(40, int), "test_labels": np.zeros(20, int)}, "the class 0 only"),
        ({"val_images": np.zeros((2, 9, 12, 3), np.uint8)}, "one of val_images and val_labels"),
        ({"test_labels": np.full(20, 3)}, "the test images have the label 3, which no training"),
        ({"test_labels": np.full(20, -1)}, "the test images have the label -1, which no"),
        ({"test_labels": np.full(20, 10**9)}, "has the label 1,000,000,000"),
    ],
)  # fmt: skip
def test_faulty_archives(change, message, tmp_path, colours):
    path = write_archive(tmp_path / "set.npz", colours, **change)
    with pytest.raises(fm.errors.DataError, match=message):
        fm.load_dataset(path)


class _Bomb:
    def __reduce__(self):
        return (Path("/nowhere/bomb").write_text, ("unpickled",))


def test_nothing_is_unpickled(tmp_path, colours):
    array = np.array([_Bomb()], dtype=object)
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
    write_archive(tmp_path / "set.npz", colours, train_labels=None)
    with zipfile.ZipFile(tmp_path / "set.npz", "a") as archive:
        archive.writestr("train_labels.npy", file.getvalue() + pickle.dumps([_Bomb()]))
    with pytest.raises(fm.errors.DataError, match="pickled objects, which are not read"):
        fm.load_dataset(tmp_path / "set.npz")


def test_archives_that_ask_for_too_much_memory(tmp_path, colours, monkeypatch):
    path = write_archive(tmp_path / "set.npz", colours, train_images=None)
    file = io.BytesIO()
    header = {"descr": "|u1", "fortran_order": False, "shape": (1 << 45, 28, 28)}
    np.lib.format.write_array_header_1_0(file, header)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("train_images.npy", file.getvalue() + b"little")
    with pytest.raises(fm.errors.DataError, match=r"is no readable \.npz archive"):
        fm.load_dataset(path)
    monkeypatch.setattr(image_sets, "_MAX_BYTES", 1000)
    with pytest.raises(fm.errors.DataError, match=r"unpacks to .* bytes; expected at most 1,000"):
        fm.load_dataset(path)
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(fm.errors.DataError, match=r"is no readable \.npz archive"):
        fm.load_dataset(path)


def test_unknown_sources(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(fm.errors.DataError, match=r"x/y/z is neither a file nor a folder, nor"):
        fm.load_dataset("x/y/z")
    with pytest.raises(
        fm.errors.DataError, match="no file or folder fashion_mist, and TFDS has no"
    ):
        fm.load_dataset("fashion_mist")
    with pytest.raises(fm.errors.ConfigError, match="is a URL"):
        fm.load_dataset("https://example.org/set.npz")
    with pytest.raises(fm.errors.DataError, match="is neither a file nor a folder"):
        fm.load_dataset("")
    wrong: Any
    for wrong in (0, 10**6, "12", True):
        with pytest.raises(fm.errors.DataError, match=f"resize is {wrong!r}; expected an integer"):
            fm.load_dataset(resize=wrong)


class Colours(tensorflow_datasets.core.GeneratorBasedBuilder):
    """A set in TFDS that reads its file by TensorFlow, and gives arrays of pixels."""

    VERSION = tensorflow_datasets.core.Version("1.0.0")
    name = "colours"
    path = ""

    def _info(self):
        features = tensorflow_datasets.features
        return tensorflow_datasets.core.DatasetInfo(
            builder=self,
            features=features.FeaturesDict({
                "id": features.Text(),
                "picture": features.Image(shape=(9, 12, 3)),
                "kind": features.ClassLabel(names=["cat", "dog", "owl"]),
            }),
            supervised_keys=("picture", "kind"),
        )  # fmt: skip

    def _split_generators(self, dl_manager):
        return {split: self._generate_examples(split) for split in ("train", "test")}

    def _generate_examples(self, split):
        with tf.io.gfile.GFile(self.path, "rb") as file:
            arrays = dict(np.load(io.BytesIO(file.read())))
        for position, image in enumerate(arrays[f"{split}_images"]):
            kind = arrays[f"{split}_labels"][position]
            yield position, {"id": str(position), "picture": image, "kind": int(kind)}


def test_a_set_of_tfds_is_prepared_without_tensorflow(tmp_path, colours, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))
    load = {"colours": Colours}
    monkeypatch.setattr(
        tensorflow_datasets, "builder", lambda name, **options: load[name](**options)
    )
    monkeypatch.setattr(Colours, "path", str(write_archive(tmp_path / "set.npz", colours)))
    prepared = fm.load_dataset("colours")
    assert prepared.class_names == colours.class_names
    assert prepared.source == f"TFDS {tmp_path / 'tfds' / 'colours' / '1.0.0'}"
    for split in ("train", "test"):  # in an order of TFDS
        pixels, expected = (
            {image.tobytes(): label for image, label in zip(
                getattr(each, f"{split}_images"), getattr(each, f"{split}_labels"), strict=True)}
            for each in (prepared, colours)
        )  # fmt: skip
        assert pixels == expected
    assert tf is None
    # The second time it is read, also as a folder.
    monkeypatch.setattr(tfds, "prepare", None)
    assert_same(fm.load_dataset("colours"), prepared)
    assert_same(fm.load_dataset(tmp_path / "tfds" / "colours" / "1.0.0"), prepared)
    info = tmp_path / "tfds" / "colours" / "1.0.0" / "features.json"
    info.write_text(info.read_text().replace('"image": {', '"video": {'))
    with pytest.raises(fm.errors.DataError, match="no prepared set of images with one class each"):
        fm.load_dataset("colours")


def test_data_that_are_not_known_are_described(colours):
    facts = describe(colours)
    assert facts["images"] == "9 x 12 pixels, colour"
    assert "cat 14, dog 13, owl 13" in facts.values()
    arrays = {name: np.concatenate([getattr(colours, name)] * 2) for name in ARRAYS}
    twice = dataclasses.replace(colours, **arrays, test_indices=None)
    text = describe(twice)["same pixels as another image"]
    assert text == "80 training images, 40 test images"


def test_erased_rectangles_have_the_mean_pixel_of_the_data(colours, sample, tmp_path):
    def value(dataset, **options):
        recipe = fm.Recipe(arch="tests.small:Linear", epochs=1, batch_size=8,
                           augmentation="shift_erase", augmentation_options=options)  # fmt: skip
        plan = create_plan(fm.Run(recipe=recipe, workdir=tmp_path), dataset)
        augment: Any = plan.config.augment
        return augment.erase_value

    expected = colours.train_images.mean(axis=(0, 1, 2)) / 255
    np.testing.assert_allclose(value(colours), expected, atol=5e-5)
    assert value(colours, erase_value=(0.5, 0.5, 0.5)) == (0.5, 0.5, 0.5)
    assert value(sample) is None
