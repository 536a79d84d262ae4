"""`Dataset`: images and labels in memory, and selection of classes."""

import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from fmnist_jax.analysis.duplicates import exact_duplicates
from fmnist_jax.data.batches import input_shape
from fmnist_jax.digest import sha256_array, sha256_bytes
from fmnist_jax.errors import DataError

CLASS_NAMES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
    "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip

_NUM_SHOWN = 20  # with more classes, `describe` gives the smallest and the largest


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """Training and test images as NumPy arrays.

    Attributes:
      train_images: uint8[n, height, width], or [n, height, width, 3] in colour.
      train_labels: int32[n], values in [0, num_classes).
      test_images: uint8[m, ...], of the same shape.
      test_labels: int32[m].
      class_names: one name per class; the default is Fashion-MNIST's ten.
      val_examples: int32[k], positions in the training images of the validation split that the
        data bring; None if a run is to draw one.
      test_indices: int32[m], each test image's position in the published test file.
      source: where the data came from, for display.
      sha256: of the four arrays, before classes were selected.
      sample: True for the embedded sample, whose accuracies are not comparable with published ones.

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
    val_examples: np.ndarray | None = None

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Height and width of an image, and 3 if it is in colour."""
        return self.train_images.shape[1:]

    @property
    def mean_pixel(self) -> tuple[float, ...]:
        """Mean of each channel of the training images, in [0, 1], to four decimals."""
        num_channels = input_shape(self.image_shape)[2]
        means = self.train_images.reshape(-1, num_channels).mean(axis=0) / 255
        return tuple(round(float(mean), 4) for mean in means)

    def __post_init__(self) -> None:
        for name, count in Counter(self.class_names).items():
            if not (isinstance(name, str) and name.isprintable() and count == 1):
                raise DataError(
                    f"class_names have {name!r}; expected different strings of printable characters"
                )
        for split in ("train", "test"):
            images, labels = getattr(self, f"{split}_images"), getattr(self, f"{split}_labels")
            shape = (images.ndim, *images.shape[3:])
            if images.dtype != np.uint8 or shape not in ((3,), (4, 1), (4, 3)):
                raise DataError(
                    f"{split}_images are {images.dtype}{list(images.shape)}; expected "
                    "uint8[count, height, width], or [count, height, width, 3] in colour"
                )
            if shape == (4, 1):
                object.__setattr__(self, f"{split}_images", images[..., 0])
            if labels.shape != images.shape[:1]:
                raise DataError(
                    f"{split}_labels have shape {labels.shape} for {len(images):,} images; "
                    "expected one label per image"
                )
            if not np.issubdtype(labels.dtype, np.integer):
                raise DataError(f"{split}_labels are {labels.dtype}; expected integers")
            if len(labels) == 0 or labels.min() < 0 or labels.max() >= len(self.class_names):
                raise DataError(
                    f"{split}_labels are empty or out of range; expected at least one label, each "
                    f"from 0 to {len(self.class_names) - 1}"
                )
            object.__setattr__(self, f"{split}_labels", labels.astype(np.int32))
        if self.train_images.shape[1:] != self.test_images.shape[1:]:
            raise DataError(
                f"train_images have {list(self.train_images.shape[1:])} pixels and test_images "
                f"{list(self.test_images.shape[1:])}; expected the same"
            )
        if self.test_indices is None:
            indices = np.arange(len(self.test_labels), dtype=np.int32)
            object.__setattr__(self, "test_indices", indices)
        if not self.sha256:
            arrays = (self.train_images, self.train_labels, self.test_images, self.test_labels)
            object.__setattr__(self, "sha256", combined_sha256(arrays))


def select_classes(dataset: Dataset, classes: str | Sequence[str | int]) -> Dataset:
    """Selects classes; the i-th gets label i.

    Args:
      dataset: the data.
      classes: two or more names or numbers, as a sequence or separated by commas. Case, spaces and
        punctuation are ignored.

    Raises:
      DataError: if a class is unknown or repeated, or fewer than two are named.

    Example:
      >>> import fmnist_jax as fm
      >>> subset = select_classes(fm.load_fashion_mnist(sample=True), "sandal,bag,1")
      >>> subset.class_names, subset.train_images.shape
      (('Sandal', 'Bag', 'Trouser'), (1800, 28, 28))
    """
    names = classes.split(",") if isinstance(classes, str) else [str(name) for name in classes]
    numbers = [_class_number(dataset, name) for name in names]
    if len(set(numbers)) != len(numbers) or len(numbers) < 2:
        raise DataError(f"classes are {','.join(names)}; expected two or more, each once")
    new_label = np.full(len(dataset.class_names), -1, np.int32)
    new_label[numbers] = np.arange(len(numbers))
    train, test = new_label[dataset.train_labels] >= 0, new_label[dataset.test_labels] >= 0
    assert dataset.test_indices is not None  # set in __post_init__
    val_examples = dataset.val_examples
    if val_examples is not None:
        is_val = np.isin(np.arange(len(train)), val_examples)
        val_examples = np.flatnonzero(is_val[train]).astype(np.int32)
    return dataclasses.replace(
        dataset,
        train_images=dataset.train_images[train],
        train_labels=new_label[dataset.train_labels[train]],
        test_images=dataset.test_images[test],
        test_labels=new_label[dataset.test_labels[test]],
        test_indices=dataset.test_indices[test],
        val_examples=val_examples,
        class_names=tuple(dataset.class_names[number] for number in numbers),
    )


def describe(dataset: Dataset) -> dict[str, str]:
    """Describes data that are not known: sizes, images by class, duplicates and SHA-256.

    Example:
      >>> images, labels = np.zeros((4, 8, 8), np.uint8), np.array([0, 0, 0, 1])
      >>> for name, text in describe(Dataset(images, labels, images[:1], labels[:1],
      ...                                    class_names=("a", "b"))).items():
      ...     print(f"{name}: {text}")
      images: 8 x 8 pixels, grey
      by class, without test images: a 3, b 1
      same pixels as another image: 4 training images, 1 test images
      SHA-256: f6d018aa336e286f
    """
    height, width, channels = input_shape(dataset.image_shape)
    counts = np.bincount(dataset.train_labels, minlength=len(dataset.class_names)).tolist()
    by_class = ", ".join(
        f"{name} {count:,}" for name, count in zip(dataset.class_names, counts, strict=True)
    )
    if len(counts) > _NUM_SHOWN:
        by_class = f"{min(counts):,} to {max(counts):,} of each"
    groups = exact_duplicates(itertools.chain(dataset.train_images, dataset.test_images))
    positions = [position for group in groups for position in group]
    num_train = sum(position < len(dataset.train_labels) for position in positions)
    return {
        "images": f"{height} x {width} pixels, {'grey' if channels == 1 else 'colour'}",
        "by class, without test images": by_class,
        "same pixels as another image": f"{num_train:,} training images, "
        f"{len(positions) - num_train:,} test images",
        "SHA-256": dataset.sha256[:16],
    }


def combined_sha256(arrays: Sequence[np.ndarray]) -> str:
    """Returns the SHA-256 of the SHA-256s of the arrays."""
    return joined_sha256(map(sha256_array, arrays))


def joined_sha256(hashes: Iterable[str]) -> str:
    """Returns the SHA-256 of several in a row."""
    return sha256_bytes("".join(hashes).encode())


def _class_number(dataset: Dataset, name: str) -> int:
    names = list(map(_plain, dataset.class_names))
    if _plain(name) in names:
        return names.index(_plain(name))
    if name.strip().isdecimal() and int(name) < len(names):
        return int(name)
    known = ", ".join(f"{i} {name}" for i, name in enumerate(dataset.class_names))
    raise DataError(f"unknown class {name!r}; the classes are {known}")


def _plain(name: str) -> str:
    return "".join(filter(str.isalnum, name.lower()))
