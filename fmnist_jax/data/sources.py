"""`load_fashion_mnist`: finds, verifies and loads the data.

Every source gives the arrays of the published files, in their order: images uint8[n, 28, 28] with
values 0 (background) to 255, labels int32[n].
"""

import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from fmnist_jax.data import idx
from fmnist_jax.data import tfds as tfds_source
from fmnist_jax.data.dataset import Dataset, combined_sha256, joined_sha256
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
        return _load_prepared(tfds_source.prepare(_tfds_dir() or Path("tensorflow_datasets")))
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
    found = {name: _find_file(directory, name) for name in _FILES}
    missing = [f"{name}-ubyte.gz" for name, path in found.items() if path is None]
    if missing:
        error = _NotFoundError if len(missing) == len(_FILES) else DataError
        raise error(
            f"{directory}: {', '.join(missing)} not found; expected the four IDX files of "
            "Fashion-MNIST or a TFDS directory"
        )
    return _verified(_read_files([path for path in found.values() if path]), str(directory))


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
        splits = tfds_source.read_prepared(prepared)
        return [*splits["train"], *splits["test"]]

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
