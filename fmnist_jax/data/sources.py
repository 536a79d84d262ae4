"""Fashion-MNIST, found, verified and loaded; and image sets of any other source."""

import dataclasses
import re
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from fmnist_jax.data import idx
from fmnist_jax.data import tfds as tfds_source
from fmnist_jax.data.dataset import Dataset, combined_sha256, joined_sha256
from fmnist_jax.data.image_sets import (
    ImageSet,
    Split,
    read_archive,
    read_class_names,
    read_folder,
)
from fmnist_jax.data.pictures import resized
from fmnist_jax.data.split import stratified_split
from fmnist_jax.digest import sha256_array, sha256_bytes
from fmnist_jax.errors import DataError, DataWarning
from fmnist_jax.paths import local_path, user_folder

# SHA-256 of train images, train labels, test images and test labels, from files whose checksums are
# those recorded in TensorFlow Datasets.
PUBLISHED_SHA256 = (
    "2e487a6c89124f78f2d7521542223cafe96f7123c3ca13d447772ac6ecbb3012",
    "657fbd221bfc9f4198cc14b5619cc33ec57c58dd0e47af4d99d6650759e869a7",
    "c867c93ff95360594e8ec3287995350b824dd110b11595c0e13d5423f621867a",
    "3d0e6c6ea990b53b6f8f500a41cac93881d981b315f84578b7d915342ade01e9",
)
SAMPLE_SHA256 = (
    "2b17438af55637db62c122a92490b5b4275bed5719a838b5b0486ea2193a98a4",
    "f16e201ddc15b401c509545575d23793b230f5735ae378c1ced3a6156cb72251",
    "3d7f6d64869a3f2d1afe64ae33ffb9b20670a91b31e3bbf0657e3999ec7b35cf",
    "6b25654537ff83dd6c40fe0a122c7778d8219b2a88ff02c36dbdd21152fdb075",
)

_FILES = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
_SAMPLE_DIR = Path(__file__).parent / "sample"
# Below the root that a user passes to torchvision.
_TORCHVISION = "FashionMNIST/raw"
# MNIST has the same file names and sizes, but other class counts.
_MNIST_TRAIN_COUNTS = (5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949)


# Larger labels are no numbers of classes, but perhaps of images.
_MAX_CLASSES = 10_000
_MAX_SIDE = 1024  # in pixels; small images are what the library is for
# Of a source without test images, this fraction becomes test images, as in Fashion-MNIST.
_TEST_FRACTION = 1 / 7


def load_dataset(
    source: str | Path = "fashion_mnist",
    *,
    resize: int | None = None,
    skip_unreadable: bool = False,
) -> Dataset:
    """Loads an image classification set.

    A validation split that the source has is kept (`Dataset.val_examples`). A source without test
    images gets them from its training images, a seventh of each class, drawn with seed 0.

    Args:
      source: "fashion_mnist", as `load_fashion_mnist` finds it; a folder with four IDX files; an
        .npz archive in the layout of MedMNIST or Keras; a folder of pictures with a subfolder per
        class, or with such folders in train and test; a prepared TFDS version; or the name of an
        image classification set in TFDS, such as "cifar10" or "emnist/letters", which is read from
        the TFDS directory or downloaded.
      resize: side in pixels to which all images are resized; None keeps their sizes, which must
        then be equal.
      skip_unreadable: whether pictures that cannot be read are left out, with a warning; otherwise
        they are an error.

    Returns:
      The data; Fashion-MNIST is recognised by its SHA-256 in any of these forms. Class names are
      those of TFDS, the subfolders, or the lines of a file classes.txt beside the data; otherwise
      numbers.

    Raises:
      DataError: if there is no such source, or its images or labels are missing, damaged or of
        another kind.

    Example:
      >>> from sklearn.datasets import load_digits
      >>> digits = load_digits()
      >>> images, labels = (digits.images * 15).astype("uint8"), digits.target
      >>> folder = Path(tempfile.mkdtemp())
      >>> np.savez(folder / "digits.npz", x_train=images[:1500], y_train=labels[:1500],
      ...          x_test=images[1500:], y_test=labels[1500:])
      >>> digits = load_dataset(folder / "digits.npz")
      >>> digits.train_images.shape, digits.class_names[:3]
      ((1500, 8, 8), ('0', '1', '2'))
    """
    if resize is not None and not (type(resize) is int and 1 <= resize <= _MAX_SIDE):
        raise DataError(f"resize is {resize!r}; expected an integer from 1 to {_MAX_SIDE:,}")
    size = None if resize is None else (resize, resize)
    if source == "fashion_mnist":
        return _resized(load_fashion_mnist(), size)
    path = local_path(source)
    try:
        if str(source) and path.is_dir():
            image_set = _read_folder(path, size, skip_unreadable)
        elif path.is_file():
            image_set = read_archive(path)
        elif re.fullmatch(r"\w+(/[\w-]+)?", str(source)):
            image_set = _read_tfds(str(source), size)
        else:
            raise DataError(
                f"{source} is neither a file nor a folder, nor the name of a set in TFDS"
            )
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror})") from error
    for note in image_set.notes:
        warnings.warn(f"{path}: {note}", DataWarning, stacklevel=2)
    return _resized(_create_dataset(image_set), size)


def _read_folder(path: Path, size: tuple[int, int] | None, skip_unreadable: bool) -> ImageSet:
    if (path / _TORCHVISION).is_dir():
        path = path / _TORCHVISION
    if any(_find_file(path, name) for name in _FILES):
        arrays = _read_idx(path)
        splits = {"train": Split(*arrays[:2]), "test": Split(*arrays[2:])}
        return ImageSet(splits, read_class_names(path), str(path))
    prepared = tfds_source.find_prepared(path)
    if prepared is not None:
        return tfds_source.read_prepared(prepared, size)
    return read_folder(path, size, skip_unreadable=skip_unreadable)


def _read_tfds(name: str, size: tuple[int, int] | None) -> ImageSet:
    directory = _tfds_dir() or Path("tensorflow_datasets")
    prepared = tfds_source.find_prepared(directory, name)
    return tfds_source.read_prepared(prepared or tfds_source.prepare(name, directory), size)


def _create_dataset(image_set: ImageSet) -> Dataset:
    splits, source = dict(image_set.splits), image_set.source
    for split, (images, labels) in splits.items():
        if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer) or len(labels) == 0:
            raise DataError(
                f"{source}: the {split} labels are {labels.dtype}{list(labels.shape)}; expected "
                "integers, one per image"
            )
        if len(images) != len(labels):
            raise DataError(
                f"{source}: {len(images):,} {split} images but {len(labels):,} {split} labels"
            )
    if "test" not in splits:
        images, labels = splits["train"]
        kept, drawn = stratified_split(jax.random.key(0), labels, _TEST_FRACTION)
        splits["train"] = Split(images[kept], labels[kept])
        splits["test"] = Split(images[drawn], labels[drawn])
        source += f", {len(drawn):,} of its training images, drawn with seed 0, as test images"
        if len(drawn) < 1:
            raise DataError(f"{source}: has too few images to draw test images from")
    source, names = _without_empty_classes(splits, source, image_set.class_names)
    train, test = splits["train"], splits["test"]
    val_examples = None
    if "validation" in splits:
        images, labels = splits["validation"]
        val_examples = np.arange(len(train.labels), len(train.labels) + len(labels))
        if images.shape[1:] != train.images.shape[1:]:
            raise DataError(
                f"{source}: the validation images have {list(images.shape[1:])} pixels and the "
                f"training images {list(train.images.shape[1:])}; expected the same"
            )
        train = Split(
            np.concatenate([train.images, images]), np.concatenate([train.labels, labels])
        )
    sha256 = ""
    if train.images.shape[1:3] == (28, 28):  # large sets are hashed once, by `Dataset`
        sha256 = combined_sha256(_published_form(train, test))
    if is_fashion_mnist(sha256):
        return Dataset(
            *train, *test, source=f"Fashion-MNIST in {source}", sha256=sha256,
            sample=sha256 == joined_sha256(SAMPLE_SHA256), val_examples=val_examples,
        )  # fmt: skip
    return Dataset(*train, *test, class_names=names, source=source, val_examples=val_examples)


def _without_empty_classes(
    splits: dict[str, Split], source: str, class_names: tuple[str, ...] | None
) -> tuple[str, tuple[str, ...]]:
    """Leaves out classes without images; returns the source with a note, and the other names."""
    highest = max(int(split.labels.max()) for split in splits.values())
    if highest >= _MAX_CLASSES:
        raise DataError(
            f"{source}: has the label {highest:,}; expected labels from 0 to the number of classes "
            f"less one, at most {_MAX_CLASSES - 1:,}"
        )
    names = class_names or tuple(map(str, range(highest + 1)))
    if highest >= len(names):
        raise DataError(f"{source}: has the label {highest}, but {len(names)} names of classes")
    labels = np.unique(splits["train"].labels)
    for split, (_, others) in splits.items():
        if len(unknown := np.setdiff1d(others, labels)):
            raise DataError(
                f"{source}: the {split} images have the label {unknown[0]}, which no training "
                "image has"
            )
    if len(labels) < 2:
        raise DataError(f"{source}: has the class {names[labels[0]]} only; expected two or more")
    if labels[0] < 0:
        raise DataError(f"{source}: has the label {labels[0]}; expected labels from 0")
    if len(labels) < len(names):
        source += f", without {len(names) - len(labels)} classes that have no images"
        for split, (images, others) in splits.items():
            splits[split] = Split(images, np.searchsorted(labels, others))
    return source, tuple(names[label] for label in labels)


def _published_form(train: Split, test: Split) -> list[np.ndarray]:
    """Returns the arrays of both splits, with labels as in IDX files, for the known SHA-256."""
    return [train.images, train.labels.astype(np.uint8), test.images, test.labels.astype(np.uint8)]


def _resized(dataset: Dataset, size: tuple[int, int] | None) -> Dataset:
    if size is None or dataset.image_shape[:2] == size:
        return dataset
    train_images, test_images = (
        np.stack([resized(Image.fromarray(image), size=size) for image in images])
        for images in (dataset.train_images, dataset.test_images)
    )
    return dataclasses.replace(
        dataset, train_images=train_images, test_images=test_images, sha256=""
    )


def load_fashion_mnist(data_dir: str | Path | None = None, *, sample: bool = False) -> Dataset:
    """Loads Fashion-MNIST from the first source that has it.

    The sources are, in this order: `data_dir`; a prepared TFDS directory; copies of other tools
    (Debian's dataset-fashion-mnist, Keras, torchvision); a download through TFDS; and the embedded
    sample of 6,000 training and 1,000 test images, with a warning.

    Args:
      data_dir: a folder with the four IDX files, gzipped or not, or a TFDS directory. If given, no
        other source is tried.
      sample: load the embedded sample.

    Returns:
      The data, whose SHA-256 is that of the published files or of the sample.

    Raises:
      DataError: if `data_dir` has no Fashion-MNIST, or a damaged copy.

    Example:
      >>> load_fashion_mnist(sample=True).train_images.shape
      (6000, 28, 28)
    """
    if sample:
        return _load_sample()
    if data_dir is not None:
        return _load_directory(local_path(data_dir))
    for place in standard_places():
        try:
            return _load_directory(place)
        except _NotFoundError:
            continue
        except DataError as error:  # a damaged copy
            warnings.warn(f"skipped: {error}", DataWarning, stacklevel=2)
    try:
        return _load_prepared(
            tfds_source.prepare("fashion_mnist", _tfds_dir() or Path("tensorflow_datasets"))
        )
    except DataError as error:
        warnings.warn(
            f"Fashion-MNIST was not found on this machine, and {error}. USING THE EMBEDDED SAMPLE "
            "of 6,000 training and 1,000 test images, whose accuracies are not comparable with "
            "published ones. Pass the data with --data-dir, or install it (Debian: apt-get install "
            "dataset-fashion-mnist).",
            DataWarning,
            stacklevel=2,
        )
        return _load_sample()


def standard_places() -> Iterator[Path]:
    """Yields the folders that `load_fashion_mnist` tries, in order."""
    if tfds_dir := _tfds_dir():
        yield tfds_dir
    yield Path("/usr/share/datasets/fashion-mnist")
    if keras := user_folder("~/.keras", "KERAS_HOME"):
        yield keras / "datasets/fashion-mnist"
    for root in (Path("data"), user_folder("~/data"), Path()):
        if root is not None:
            yield root / _TORCHVISION


class _NotFoundError(DataError):
    """The folder does not exist or has none of the files."""


def _load_directory(directory: Path) -> Dataset:
    try:
        return _read_directory(directory)
    except PermissionError as error:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror})") from error


def _read_directory(directory: Path) -> Dataset:
    if not directory.is_dir():
        raise _NotFoundError(f"{directory}: not a folder; expected one with the four IDX files")
    if (directory / _TORCHVISION).is_dir():
        directory = directory / _TORCHVISION
    prepared = tfds_source.find_prepared(directory)
    if prepared is not None:
        return _load_prepared(prepared)
    return _verified(_read_idx(directory), str(directory))


def _read_idx(directory: Path) -> list[np.ndarray]:
    found = {name: _find_file(directory, name) for name in _FILES}
    missing = [f"{name}-ubyte.gz" for name, path in found.items() if path is None]
    if missing:
        error = _NotFoundError if len(missing) == len(_FILES) else DataError
        raise error(
            f"{directory}: {', '.join(missing)} not found; expected the four IDX files of "
            "Fashion-MNIST or a TFDS directory"
        )
    return _read_files([path for path in found.values() if path])


def _read_files(paths: Sequence[Path]) -> list[np.ndarray]:
    readers = 2 * (idx.read_images, idx.read_labels)
    # In parallel, because decompressing the training images takes a third of a second.
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda read, path: read(path), readers, paths))


def _find_file(directory: Path, name: str) -> Path | None:
    names = [f"{name}-ubyte", f"{name.replace('-idx', '.idx')}-ubyte"]
    candidates = [directory / f"{name}{suffix}" for name in names for suffix in (".gz", "")]
    return next((path for path in candidates if path.is_file()), None)


def _load_sample() -> Dataset:
    arrays = _read_files([_SAMPLE_DIR / f"{name}-ubyte.gz" for name in _FILES])
    return _verified(arrays, "embedded sample", sample=True)


def _load_prepared(prepared: Path) -> Dataset:
    def read() -> list[np.ndarray]:
        splits = tfds_source.read_prepared(prepared).splits
        return _published_form(splits["train"], splits["test"])

    # Decoding 70,000 PNG files takes seconds, reading the cache a tenth of a second. The name of a
    # cache depends on the state of the files, and its content is verified.
    state = [
        (str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns)
        for path in tfds_source.record_files(prepared)
    ]
    arrays = _cached(f"tfds-{sha256_bytes(repr(state).encode())[:16]}.npz", read)
    return _verified(arrays, f"TFDS {prepared}")


def _cached(name: str, read: Callable[[], list[np.ndarray]]) -> list[np.ndarray]:
    cache = user_folder("~/.cache", "XDG_CACHE_HOME")
    if cache is None:
        return read()
    folder = cache / "fmnist_jax"
    try:
        with np.load(folder / name) as stored:
            arrays = [stored[array] for array in stored.files]
        if tuple(sha256_array(array) for array in arrays) == PUBLISHED_SHA256:
            return arrays
    except Exception:  # noqa: BLE001, S110 (missing or damaged in any way: the source is read again)
        pass
    arrays = read()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as place:
            np.savez(Path(place) / name, *arrays)
            (Path(place) / name).replace(folder / name)
    except OSError:
        pass  # not cached in a read-only home
    return arrays


def _verified(arrays: list[np.ndarray], source: str, *, sample: bool = False) -> Dataset:
    train_images, train_labels, test_images, test_labels = arrays
    splits = {"training": (train_images, train_labels), "test": (test_images, test_labels)}
    for split, (images, labels) in splits.items():
        if len(images) != len(labels):
            raise DataError(
                f"{source}: {len(images):,} {split} images but {len(labels):,} {split} labels; "
                "the files do not belong together"
            )
    expected = SAMPLE_SHA256 if sample else PUBLISHED_SHA256
    found = tuple(map(sha256_array, arrays))
    if found != expected:
        if tuple(np.bincount(train_labels, minlength=10)) == _MNIST_TRAIN_COUNTS:
            raise DataError(
                f"{source}: this is MNIST (handwritten digits), not Fashion-MNIST; "
                "the two have the same file names"
            )
        names = [name for name, a, b in zip(_FILES, found, expected, strict=True) if a != b]
        raise DataError(
            f"{source}: {', '.join(names)} differ from the published Fashion-MNIST (SHA-256 "
            f"{found[_FILES.index(names[0])][:12]}...); fetch the files again"
        )
    return Dataset(
        train_images, train_labels, test_images, test_labels,
        source=source, sha256=combined_sha256(arrays), sample=sample,
    )  # fmt: skip


def is_fashion_mnist(sha256: str) -> bool:
    """Whether `Dataset.sha256` is that of the published data or of the embedded sample."""
    return sha256 in map(joined_sha256, (PUBLISHED_SHA256, SAMPLE_SHA256))


def _tfds_dir() -> Path | None:
    return user_folder("~/tensorflow_datasets", "TFDS_DATA_DIR")
