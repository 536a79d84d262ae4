"""Finds, verifies and loads Fashion-MNIST, and splits it.

Whatever the source, the arrays come out in the order of the published files and must have their
SHA-256. Images are uint8[count, 28, 28] with values 0 (background) to 255, labels int32[count].
"""

import dataclasses
import hashlib
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np

from fmnist_jax.data import idx
from fmnist_jax.data import tfds as tfds_source
from fmnist_jax.errors import DataError, DataWarning

CLASS_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)

# SHA-256 of train images, train labels, test images and test labels, as bytes in file order. The
# published files were identified by the checksums that TensorFlow Datasets has on record for them.
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
# MNIST has the same file names and sizes, but not the same number of examples in each class.
_MNIST_TRAIN_COUNTS = (5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949)


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Training and test images as NumPy arrays.

    Attributes:
      train_images: uint8[n, height, width].
      train_labels: int32[n], from 0 to the number of classes - 1.
      test_images: uint8[m, height, width].
      test_labels: int32[m].
      class_names: one name a class.
      test_indices: int32[m], each test image's position in the published test file.
      source: where the data came from, for people.
      sha256: of the bytes of the four full arrays, whatever classes were selected since.
      sample: True for the embedded sample, whose results mean little.

    Raises:
      DataError: if shapes, dtypes or labels do not fit together.
    """

    train_images: np.ndarray
    train_labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    class_names: tuple[str, ...] = CLASS_NAMES
    test_indices: np.ndarray | None = None
    source: str = "arrays"
    sha256: str = ""
    sample: bool = False

    def __post_init__(self) -> None:
        for split in ("train", "test"):
            images, labels = getattr(self, f"{split}_images"), getattr(self, f"{split}_labels")
            if images.dtype != np.uint8 or images.ndim != 3:
                raise DataError(
                    f"{split}_images are {images.dtype}{list(images.shape)}; "
                    "they must be uint8[count, height, width]"
                )
            if labels.shape != images.shape[:1]:
                raise DataError(
                    f"{len(images):,} {split} images, but labels of shape {labels.shape}; "
                    "each image needs one label"
                )
            if len(labels) == 0 or labels.min() < 0 or labels.max() >= len(self.class_names):
                raise DataError(
                    f"{split}_labels must be from 0 to {len(self.class_names) - 1}, "
                    "and there must be at least one"
                )
            object.__setattr__(self, f"{split}_labels", labels.astype(np.int32))
        if self.test_indices is None:
            object.__setattr__(
                self, "test_indices", np.arange(len(self.test_labels), dtype=np.int32)
            )
        if not self.sha256:
            arrays = (self.train_images, self.train_labels, self.test_images, self.test_labels)
            object.__setattr__(self, "sha256", _combined([_sha256(array) for array in arrays]))


def load_fashion_mnist(data_dir: str | Path | None = None, *, sample: bool = False) -> Dataset:
    """Loads Fashion-MNIST from the first place that has it.

    Looked at, in this order: `data_dir`; a prepared TFDS directory; the copies that other tools
    leave (Debian's dataset-fashion-mnist, Keras, torchvision); a download through TFDS; and last
    the embedded sample of 6,000 training and 1,000 test images, with a warning.

    Args:
      data_dir: a folder with the four IDX files (gzipped or not) or a TFDS directory. If it is
        given, nothing else is looked at.
      sample: take the embedded sample at once.

    Returns:
      The data, verified: its SHA-256 is that of the published files, or of the sample.

    Raises:
      DataError: if `data_dir` has no Fashion-MNIST, or a damaged one.

    Example:
      >>> load_fashion_mnist(sample=True).train_images.shape
      (6000, 28, 28)
    """
    if sample:
        return _load_sample()
    if data_dir is not None:
        return _load_directory(Path(data_dir).expanduser())
    for place in standard_places():
        if not place.is_dir():
            continue
        try:
            return _load_directory(place)
        except DataError as error:
            # An empty or unrelated folder is no news, a broken copy is.
            if any(place.iterdir()) and not isinstance(error, _NotFoundError):
                warnings.warn(f"passed over: {error}", DataWarning, stacklevel=2)
    try:
        return _load_prepared(tfds_source.prepare(_tfds_dir()))
    except DataError as error:
        warnings.warn(
            f"no Fashion-MNIST on this machine, and {error}. USING THE EMBEDDED SAMPLE: 6,000 "
            "training and 1,000 test images. Its accuracies are no results. Give the real data "
            "with --data-dir, or install it (Debian: apt-get install dataset-fashion-mnist).",
            DataWarning,
            stacklevel=2,
        )
        return _load_sample()


def standard_places() -> Iterator[Path]:
    """The folders that `load_fashion_mnist` looks into, in order."""
    yield _tfds_dir()
    yield Path("/usr/share/datasets/fashion-mnist")
    yield Path(os.environ.get("KERAS_HOME", "~/.keras")).expanduser() / "datasets/fashion-mnist"
    for root in (Path("data"), Path("~/data").expanduser(), Path()):
        yield root / "FashionMNIST/raw"


def select_classes(dataset: Dataset, classes: str | Sequence[str | int]) -> Dataset:
    """Keeps some classes; label i becomes the i-th class asked for.

    Args:
      dataset: the data.
      classes: two or more names or numbers, one by one or separated by commas. Capitals, spaces
        and punctuation do not matter.

    Raises:
      DataError: if a class is unknown or named twice, or only one is left.

    Example:
      >>> subset = select_classes(load_fashion_mnist(sample=True), "sandal,bag,1")
      >>> subset.class_names, subset.train_images.shape
      (('Sandal', 'Bag', 'Trouser'), (1800, 28, 28))
    """
    names = classes.split(",") if isinstance(classes, str) else [str(name) for name in classes]
    numbers = [_class_number(dataset, name) for name in names]
    if len(set(numbers)) != len(numbers) or len(numbers) < 2:
        raise DataError(f"classes are {','.join(names)}; name two or more, each once")
    new_label = np.full(len(dataset.class_names), -1, np.int32)
    new_label[numbers] = np.arange(len(numbers))
    train, test = new_label[dataset.train_labels] >= 0, new_label[dataset.test_labels] >= 0
    assert dataset.test_indices is not None  # set in __post_init__
    return dataclasses.replace(
        dataset,
        train_images=dataset.train_images[train],
        train_labels=new_label[dataset.train_labels[train]],
        test_images=dataset.test_images[test],
        test_labels=new_label[dataset.test_labels[test]],
        test_indices=dataset.test_indices[test],
        class_names=tuple(dataset.class_names[number] for number in numbers),
    )


def stratified_split(
    key: jax.Array,
    labels: np.ndarray,
    val_fraction: float,
    train_examples: int | None = None,
    exclude: Sequence[int] = (),
) -> tuple[np.ndarray, np.ndarray]:
    """Draws a validation split with the classes in proportion; the rest is for training.

    Args:
      key: a typed PRNG key, used here and nowhere else.
      labels: int[n].
      val_fraction: share for validation, in [0, 1).
      train_examples: keep so many of the rest, the classes in proportion; None keeps all.
      exclude: positions that are in neither; those that are left keep their random order.

    Returns:
      int32 positions of the training and of the validation examples, ascending.

    Raises:
      DataError: if there are fewer than `train_examples` left to train on, or a position to
        exclude is not there.

    Example:
      >>> labels = np.repeat([0, 1], 10)
      >>> train, val = stratified_split(jax.random.key(0), labels, 0.2)
      >>> np.bincount(labels[train]).tolist(), np.bincount(labels[val]).tolist()
      ([8, 8], [2, 2])
    """
    if len(exclude) and not 0 <= min(exclude) <= max(exclude) < len(labels):
        raise DataError(
            f"exclude has {min(exclude)} to {max(exclude)}; the {len(labels):,} training images "
            "are counted from 0"
        )
    shuffled = np.asarray(jax.random.permutation(key, len(labels)))
    shuffled = shuffled[~np.isin(shuffled, np.asarray(exclude, int))]
    val, rest = _take(shuffled, labels, round(val_fraction * len(shuffled)))
    if train_examples is not None:
        if train_examples > len(rest):
            raise DataError(
                f"train_examples is {train_examples:,}, but only {len(rest):,} training examples "
                "are left beside validation; ask for fewer"
            )
        rest, _ = _take(rest, labels, train_examples)
    return np.sort(rest).astype(np.int32), np.sort(val).astype(np.int32)


def _take(positions: np.ndarray, labels: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `count` positions with the classes in proportion, and the others."""
    # A position's rank within its class, as a share of the class: the smallest shares are taken.
    share = np.empty(len(positions))
    for label in np.unique(labels[positions]):
        members = np.flatnonzero(labels[positions] == label)
        share[members] = (np.arange(len(members)) + 0.5) / len(members)
    taken = np.zeros(len(positions), bool)
    taken[np.argsort(share, kind="stable")[:count]] = True
    return positions[taken], positions[~taken]


class _NotFoundError(DataError):
    """The folder holds something else, or nothing."""


def _load_directory(directory: Path) -> Dataset:
    if not directory.is_dir():
        raise _NotFoundError(f"{directory}: not a folder; name one with the four IDX files")
    prepared = tfds_source.find_prepared(directory)
    if prepared is not None:
        return _load_prepared(prepared)
    paths = [_find_file(directory, name) for name in _FILES]
    missing = [f"{name}-ubyte.gz" for name, path in zip(_FILES, paths, strict=True) if path is None]
    if missing:
        error = _NotFoundError if len(missing) == len(_FILES) else DataError
        raise error(
            f"{directory}: {', '.join(missing)} not there; a data folder has the four IDX files of "
            "Fashion-MNIST, or is a TFDS directory"
        )
    # The test images are unpacked beside the training images, which take a third of a second.
    with ThreadPoolExecutor() as pool:
        readers = 2 * (idx.read_images, idx.read_labels)
        arrays = list(pool.map(lambda read, path: read(path), readers, paths))
    return _verified(arrays, str(directory))


def _find_file(directory: Path, name: str) -> Path | None:
    names = [f"{name}-ubyte", f"{name.replace('-idx', '.idx')}-ubyte"]
    candidates = [directory / f"{name}{suffix}" for name in names for suffix in (".gz", "")]
    return next((path for path in candidates if path.is_file()), None)


def _load_sample() -> Dataset:
    arrays = [
        read(_SAMPLE_DIR / f"{name}-ubyte.gz")
        for name, read in zip(_FILES, 2 * (idx.read_images, idx.read_labels), strict=True)
    ]
    return _verified(arrays, "embedded sample", sample=True)


def _load_prepared(prepared: Path) -> Dataset:
    def read() -> list[np.ndarray]:
        splits = tfds_source.read_prepared(prepared)
        return [*splits["train"], *splits["test"]]

    # Decoding 70,000 PNG files takes seconds, reading arrays a tenth of one. The copy belongs to
    # exactly these files in this state, and its content is verified like every other.
    state = [
        (str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns)
        for path in tfds_source.record_files(prepared)
    ]
    arrays = _cached(f"tfds-{hashlib.sha256(repr(state).encode()).hexdigest()[:16]}.npz", read)
    return _verified(arrays, f"TFDS {prepared}")


def _cached(name: str, read: Callable[[], list[np.ndarray]]) -> list[np.ndarray]:
    folder = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "fmnist_jax"
    try:
        with np.load(folder / name) as stored:
            arrays = [stored[array] for array in stored.files]
        if tuple(_sha256(array) for array in arrays) == PUBLISHED_SHA256:
            return arrays
    except Exception:  # noqa: BLE001, S110 (absent or damaged in any way: read the source again)
        pass
    arrays = read()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
            np.savez(file, *arrays)
        Path(file.name).replace(folder / name)
    except OSError:
        pass  # a read-only home costs a few seconds at the next start, no more
    return arrays


def _verified(arrays: list[np.ndarray], source: str, *, sample: bool = False) -> Dataset:
    train_images, train_labels, test_images, test_labels = arrays
    for split, images, labels in (
        ("training", train_images, train_labels),
        ("test", test_images, test_labels),
    ):
        if len(images) != len(labels):
            raise DataError(
                f"{source}: {len(images):,} {split} images but {len(labels):,} {split} labels; "
                "the files do not belong together"
            )
    expected = SAMPLE_SHA256 if sample else PUBLISHED_SHA256
    found = tuple(_sha256(array) for array in arrays)
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
        train_images,
        train_labels,
        test_images,
        test_labels,
        source=source,
        sha256=_combined(found),
        sample=sample,
    )


def _class_number(dataset: Dataset, name: str) -> int:
    names = [_plain(known) for known in dataset.class_names]
    if _plain(name) in names:
        return names.index(_plain(name))
    if name.strip().isdecimal() and int(name) < len(names):
        return int(name)
    raise DataError(
        f"unknown class {name!r}; the classes are "
        + ", ".join(f"{i} {known}" for i, known in enumerate(dataset.class_names))
    )


def _plain(name: str) -> str:
    return "".join(character for character in name.lower() if character.isalnum())


def _tfds_dir() -> Path:
    return Path(os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")).expanduser()


def _sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()


def _combined(digests: Sequence[str]) -> str:
    return hashlib.sha256("".join(digests).encode()).hexdigest()
