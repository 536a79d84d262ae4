"""Finding, verifying, loading and splitting the data; every way in which it can be wrong."""

import errno
import functools
import gzip
import shutil
import socket
import struct
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest

import fmnist_jax as fm
from fmnist_jax.data import idx, sources, tfds
from fmnist_jax.data.split import stratified_split
from tests.data.idx_files import write_idx

NAMES = {
    "train_images": "train-images-idx3-ubyte",
    "train_labels": "train-labels-idx1-ubyte",
    "test_images": "t10k-images-idx3-ubyte",
    "test_labels": "t10k-labels-idx1-ubyte",
}
PUBLISHED_DIR = Path("/usr/share/datasets/fashion-mnist")


@pytest.fixture
def sample_as_published(monkeypatch):
    """Lets the embedded sample pass for the published data, to test the ways to read it."""
    monkeypatch.setattr(sources, "PUBLISHED_SHA256", sources.SAMPLE_SHA256)


@pytest.fixture
def idx_dir(tmp_path):
    """A folder with the sample as four gzipped IDX files."""
    for path in Path(sources.__file__).parent.glob("sample/*.gz"):
        shutil.copy(path, tmp_path)
    return tmp_path


def assert_same(dataset, expected):
    for attribute in NAMES:
        np.testing.assert_array_equal(getattr(dataset, attribute), getattr(expected, attribute))
    assert dataset.sha256 == expected.sha256


def test_the_embedded_sample(sample):
    assert sample.sample
    assert sample.train_images.shape == (6000, 28, 28)
    assert sample.train_images.dtype == np.uint8
    np.testing.assert_array_equal(np.bincount(sample.train_labels), [600] * 10)
    np.testing.assert_array_equal(np.bincount(sample.test_labels), [100] * 10)


@pytest.mark.skipif(not PUBLISHED_DIR.is_dir(), reason="needs the package dataset-fashion-mnist")
def test_the_sample_is_the_beginning_of_each_class(sample):
    full = fm.load_fashion_mnist(PUBLISHED_DIR)
    assert not full.sample
    for split, count in (("train", 600), ("test", 100)):
        images, labels = getattr(full, f"{split}_images"), getattr(full, f"{split}_labels")
        first = np.sort(
            np.concatenate([np.flatnonzero(labels == label)[:count] for label in range(10)])
        )
        np.testing.assert_array_equal(getattr(sample, f"{split}_images"), images[first])
        np.testing.assert_array_equal(getattr(sample, f"{split}_labels"), labels[first])


@pytest.mark.usefixtures("sample_as_published")
@pytest.mark.parametrize("form", ["gzip", "raw", "dots"])
def test_idx_files_in_every_form(form, idx_dir, sample):
    for path in list(idx_dir.iterdir()):
        if form == "raw":
            path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
            path.unlink()
        elif form == "dots":
            path.rename(path.with_name(path.name.replace("-idx", ".idx")))
    dataset = fm.load_fashion_mnist(idx_dir)
    assert_same(dataset, sample)
    assert dataset.source == str(idx_dir)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-1000])


def corrupt(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def swap_magic(path):
    content = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(struct.pack(">I", 0x801) + content[4:]))


def cut_payload(path):
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-5]))


def empty(path):
    path.write_bytes(b"")


def not_gzip(path):
    path.write_bytes(b"<html>not found</html>")


def flip_pixel(path):
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[-1] ^= 1
    path.write_bytes(gzip.compress(bytes(content)))


@pytest.mark.usefixtures("sample_as_published")
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "damaged gzip file"),
        (corrupt, "damaged gzip file"),
        (empty, "it starts with nothing"),
        (not_gzip, "it starts with 0x3c68746d"),
        (swap_magic, "it starts with 0x801, expected 0x803"),
        (cut_payload, "its header says 4,704,000 bytes of images, but it holds 4,703,995"),
        (flip_pixel, "train-images-idx3 differ from the published"),
        (Path.unlink, "train-images-idx3-ubyte.gz not found"),
    ],
)
def test_damaged_files_are_named(damage, message, idx_dir):
    damage(idx_dir / f"{NAMES['train_images']}.gz")
    with pytest.raises(fm.errors.DataError, match=message) as caught:
        fm.load_fashion_mnist(idx_dir)
    assert str(idx_dir) in str(caught.value)


@pytest.mark.parametrize("noun", ["missing", "empty", "file"])
def test_a_folder_without_data_is_named(noun, tmp_path):
    place = tmp_path / "data"
    if noun == "empty":
        place.mkdir()
    elif noun == "file":
        place.write_text("")
    expected = "not found" if noun == "empty" else "not a folder"
    with pytest.raises(fm.errors.DataError, match=expected):
        fm.load_fashion_mnist(place)


def test_counts_that_differ(idx_dir, sample):
    write_idx(idx_dir / f"{NAMES['test_labels']}.gz", sample.test_labels[:-1])
    with pytest.raises(fm.errors.DataError, match="1,000 test images but 999 test labels"):
        fm.load_fashion_mnist(idx_dir)


def test_mnist_is_recognised(tmp_path):
    counts = (5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949)
    write_idx(tmp_path / f"{NAMES['train_labels']}.gz", np.repeat(np.arange(10), counts))
    write_idx(tmp_path / f"{NAMES['test_labels']}.gz", np.zeros(10_000))
    for split, count in (("train", 60_000), ("test", 10_000)):
        images = np.zeros((count, 28, 28), np.uint8)
        # Level 9 of 47 MB takes seconds; raw files do as well.
        header = np.array([idx.IMAGES_MAGIC, count, 28, 28], ">u4").tobytes()
        (tmp_path / NAMES[f"{split}_images"]).write_bytes(header + images.tobytes())
    with pytest.raises(fm.errors.DataError, match="this is MNIST"):
        fm.load_fashion_mnist(tmp_path)


@pytest.mark.usefixtures("sample_as_published")
def test_standard_places_are_searched_in_order(idx_dir, tmp_path_factory, monkeypatch, sample):
    empty_dir, broken = tmp_path_factory.mktemp("empty"), tmp_path_factory.mktemp("broken")
    (broken / f"{NAMES['train_images']}.gz").write_bytes(b"")
    places = [Path("/nowhere"), empty_dir, broken, idx_dir]
    monkeypatch.setattr(sources, "standard_places", lambda: iter(places))
    with pytest.warns(fm.errors.DataWarning, match=f"skipped: {broken}"):
        assert_same(fm.load_fashion_mnist(), sample)
    is_dir = Path.is_dir

    def refuse(path):
        if path == empty_dir:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return is_dir(path)

    monkeypatch.setattr(Path, "is_dir", refuse)
    places.remove(broken)
    with pytest.warns(fm.errors.DataWarning, match=rf"skipped: {empty_dir}.*Permission denied"):
        assert_same(fm.load_fashion_mnist(), sample)


def test_the_standard_places():
    places = [str(place) for place in sources.standard_places()]
    assert places[0].endswith("tensorflow_datasets")
    assert places[1] == "/usr/share/datasets/fashion-mnist"
    assert places[2].endswith(".keras/datasets/fashion-mnist")
    assert all(place.endswith("FashionMNIST/raw") for place in places[3:])


def test_without_data_and_network_the_sample_is_used_loudly(monkeypatch, sample):
    monkeypatch.setattr(sources, "standard_places", lambda: iter(()))
    monkeypatch.setattr(tfds, "prepare", lambda *_: tfds._check_reachable("http://127.0.0.1:9/x"))
    with pytest.warns(fm.errors.DataWarning, match=r"cannot be reached.*USING THE EMBEDDED"):
        dataset = fm.load_fashion_mnist()
    assert dataset.sample
    assert_same(dataset, sample)


def test_a_proxy_is_reached_in_place_of_the_host(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        port = proxy.getsockname()[1]
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{port}")
        tfds._check_reachable("http://data.invalid/x")
        monkeypatch.setenv("no_proxy", "data.invalid")
        with pytest.raises(fm.errors.DataError, match=r"data\.invalid cannot be reached"):
            tfds._check_reachable("http://data.invalid/x")
    monkeypatch.delenv("no_proxy")
    with pytest.raises(fm.errors.DataError, match=r"127\.0\.0\.1 cannot be reached"):
        tfds._check_reachable("http://data.invalid/x")


@pytest.mark.usefixtures("sample_as_published")
def test_the_root_that_torchvision_takes_is_found(idx_dir, tmp_path, sample):
    raw = tmp_path / "root" / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for path in idx_dir.glob("*.gz"):
        path.rename(raw / path.name)
    assert_same(fm.load_fashion_mnist(tmp_path / "root"), sample)


def write_tfds(directory, sample):
    """Prepares the sample as TFDS' Fashion-MNIST, with TFDS' own writer."""
    import tensorflow_datasets as tfds
    from PIL import Image

    with tfds.core.registered.skip_registration():

        class FashionMNIST(tfds.image_classification.FashionMNIST):
            name = "fashion_mnist"

            def _split_generators(self, dl_manager):
                return {split: self._generate_examples(split) for split in ("train", "test")}

            def _generate_examples(self, split):
                images, labels = (
                    getattr(sample, f"{split}_images"),
                    getattr(sample, f"{split}_labels"),
                )
                for i, (image, label) in enumerate(zip(images, labels, strict=True)):
                    yield i, {"image": Image.fromarray(image), "label": int(label)}

    builder = FashionMNIST(data_dir=str(directory), file_format="array_record")
    builder.download_and_prepare()
    return Path(builder.data_dir)


@pytest.mark.usefixtures("sample_as_published")
def test_tfds_comes_out_in_file_order(tmp_path, sample, monkeypatch):
    prepared = write_tfds(tmp_path, sample)
    for place in (tmp_path, prepared):
        assert_same(fm.load_fashion_mnist(place), sample)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    dataset = fm.load_fashion_mnist()
    assert dataset.source == f"TFDS {prepared}"

    # The second start does not decode again.
    monkeypatch.setattr(tfds, "read_prepared", None)
    assert_same(fm.load_fashion_mnist(tmp_path), sample)


@pytest.mark.usefixtures("sample_as_published")
def test_tfds_in_tfrecord_format(tmp_path, sample):
    prepared = write_tfds(tmp_path / "array", sample)
    other = tmp_path / "tf" / "fashion_mnist" / "3.0.1"
    other.mkdir(parents=True)
    for path in tfds.record_files(prepared):
        records = b"".join(
            struct.pack("<QI", len(record), 0) + record + bytes(4) for record in tfds._records(path)
        )
        (other / path.name.replace("array_record", "tfrecord")).write_bytes(records)
    assert_same(fm.load_fashion_mnist(tmp_path / "tf"), sample)


@pytest.mark.usefixtures("sample_as_published")
def test_damaged_tfds_records_and_caches(tmp_path, sample, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    prepared = write_tfds(tmp_path, sample)
    fm.load_fashion_mnist(tmp_path)
    (cache,) = (tmp_path / "cache" / "fmnist_jax").iterdir()
    corrupt(cache)
    assert_same(fm.load_fashion_mnist(tmp_path), sample)  # read again, and the cache mended
    monkeypatch.setattr(tfds, "read_prepared", None)
    assert_same(fm.load_fashion_mnist(tmp_path), sample)
    monkeypatch.undo()
    (path,) = [path for path in tfds.record_files(prepared) if "train" in path.name]
    truncate(path)
    with pytest.raises(fm.errors.DataError, match="train records cannot be read"):
        fm.load_fashion_mnist(tmp_path)


@pytest.mark.skipif(not PUBLISHED_DIR.is_dir(), reason="needs the package dataset-fashion-mnist")
@pytest.mark.slow
def test_tfds_prepares_without_tensorflow_under_its_own_checksums(tmp_path, monkeypatch):
    from tensorflow_datasets import download

    # The package's files lack the name and time that the published gzip headers have; with them
    # they are the published files to the byte.
    manual, times = tmp_path / "manual", {"train": 1504176606, "t10k": 1504176627}
    manual.mkdir()
    for name in NAMES.values():
        content = (PUBLISHED_DIR / f"{name}.gz").read_bytes()
        time = struct.pack("<I", times[name[:5].strip("-")])
        header = b"\x1f\x8b\x08\x08" + time + content[8:10] + f"{name}\0".encode()
        (manual / f"{name}.gz").write_bytes(header + content[10:])
    # Files of `manual_dir` replace the download, and their checksums are verified.
    config = functools.partial(download.DownloadConfig, manual_dir=str(manual))
    monkeypatch.setattr(download, "DownloadConfig", config)
    monkeypatch.setattr(tfds, "_check_reachable", lambda url: None)
    prepared = tfds.prepare("fashion_mnist", tmp_path / "tfds")
    expected = fm.load_fashion_mnist(PUBLISHED_DIR)
    assert_same(fm.load_fashion_mnist(tmp_path / "tfds"), expected)
    assert (prepared / "dataset_info.json").exists()

    import sys

    assert "tensorflow" not in sys.modules

    corrupt(manual / "train-images-idx3-ubyte.gz")
    with pytest.raises(fm.errors.DataError, match="TFDS could not prepare fashion_mnist"):
        tfds.prepare("fashion_mnist", tmp_path / "other")


def test_select_classes(sample):
    subset = fm.select_classes(sample, ["sandal", " Bag", "1"])
    assert subset.class_names == ("Sandal", "Bag", "Trouser")
    kept = np.isin(sample.test_labels, [5, 8, 1])
    np.testing.assert_array_equal(subset.test_images, sample.test_images[kept])
    np.testing.assert_array_equal(subset.test_indices, np.flatnonzero(kept))
    for classes in ([5, 8, 1], "Sandal,bag,trouser"):
        same = fm.select_classes(sample, classes)
        np.testing.assert_array_equal(same.test_labels, subset.test_labels)
    boots = fm.select_classes(sample, "ankle_boot,t-shirt top")
    assert boots.class_names == ("Ankle boot", "T-shirt/top")
    names = np.array(sample.class_names)[sample.test_labels[kept]]
    np.testing.assert_array_equal(np.array(subset.class_names)[subset.test_labels], names)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["sandal", "hat"], "unknown class 'hat'; the classes are 0 T-shirt/top, 1 Trouser"),
        (["10", "1"], "unknown class '10'"),
        (["sandal"], "expected two or more"),
        (["sandal", "5"], "each once"),
        ([""], "unknown class ''"),
    ],
)
def test_select_classes_errors(classes, message, sample):
    with pytest.raises(fm.errors.DataError, match=message):
        fm.select_classes(sample, classes)


def test_the_split_is_stratified_disjoint_and_follows_its_key(sample):
    labels = sample.train_labels
    train, val = stratified_split(jax.random.key(0), labels, 0.15)
    np.testing.assert_array_equal(np.bincount(labels[val]), [90] * 10)
    np.testing.assert_array_equal(np.sort(np.concatenate([train, val])), np.arange(6000))
    again, _ = stratified_split(jax.random.key(0), labels, 0.15)
    other, _ = stratified_split(jax.random.key(1), labels, 0.15)
    np.testing.assert_array_equal(train, again)
    assert not np.array_equal(train, other)


def test_the_split_of_uneven_classes():
    labels = np.repeat([0, 1, 2], [100, 10, 1])
    train, val = stratified_split(jax.random.key(0), labels, 0.5, train_examples=11)
    np.testing.assert_allclose(np.bincount(labels[val], minlength=3), [50, 5, 0.5], atol=1)
    np.testing.assert_allclose(np.bincount(labels[train], minlength=3), [10, 1, 0], atol=1)
    assert (len(train), len(val)) == (11, 56)
    train, val = stratified_split(jax.random.key(0), labels, 0.0)
    assert (len(train), len(val)) == (111, 0)


def test_too_many_train_examples(sample):
    with pytest.raises(fm.errors.DataError, match="only 5,400 training examples"):
        stratified_split(jax.random.key(0), sample.train_labels, 0.1, 5401)


def test_excluded_examples_are_in_neither_split():
    labels = np.repeat(np.arange(3), 40)
    key, exclude = jax.random.key(0), [0, 5, 41, 119]
    train, val = stratified_split(key, labels, 0.25, exclude=exclude)
    assert len(val) == 29
    assert sorted([*train, *val, *exclude]) == list(range(120))
    # The others stay about where they were.
    _, before = stratified_split(key, labels, 0.25)
    assert len(set(val) & set(before)) >= 26
    with pytest.raises(
        fm.errors.DataError, match="exclude has positions from 0 to 120; expected 0 to 119"
    ):
        stratified_split(key, labels, 0.25, exclude=[0, 120])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_images": np.zeros((60, 28, 28))}, r"train_images are float64\[60, 28, 28\]"),
        ({"train_images": np.zeros((60, 784), np.uint8)}, r"uint8\[60, 784\]"),
        ({"test_labels": np.zeros(3, int)}, "test_labels have shape \\(3,\\) for 20 images"),
        ({"train_labels": np.full(60, 10)}, "train_labels are empty or out of range"),
        ({"train_labels": np.full(60, 0.7)}, "train_labels are float64; expected integers"),
        (
            {"test_images": np.zeros((20, 32, 32), np.uint8)},
            r"train_images have \[28, 28\] pixels and test_images \[32, 32\]; expected the same",
        ),
    ],
)
def test_arrays_of_ones_own_are_checked(change, message, tiny):
    arrays = {name: getattr(tiny, name) for name in NAMES}
    assert fm.Dataset(**arrays).sha256
    with pytest.raises(fm.errors.DataError, match=message):
        fm.Dataset(**(arrays | change))


def test_loading_the_sample_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fm.load_fashion_mnist(sample=True)
