"""Image sets in files: NumPy archives and folders of pictures."""

import re
import unicodedata
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from fmnist_jax.data.pictures import PICTURES, decode, resized
from fmnist_jax.errors import DataError

CLASSES = "classes.txt"

# MedMNIST's and Keras' names of the arrays of a split, and of the folders of one.
_ARRAYS = {
    split: ((f"{short}_images", f"{short}_labels"), (f"x_{short}", f"y_{short}"))
    for split, short in (("train", "train"), ("validation", "val"), ("test", "test"))
}
_FOLDERS = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}

# Larger than the largest set of MedMNIST, 107,180 images of 224 x 224 in colour.
_MAX_BYTES = 1 << 35

# An error names this many pictures.
_NUM_NAMED = 5


class Split(NamedTuple):
    """Images, uint8[n, height, width] or [n, height, width, 3], and labels, int[n]."""

    images: np.ndarray
    labels: np.ndarray


class ImageSet(NamedTuple):
    """What a source holds.

    Attributes:
      splits: by "train", "validation" and "test"; of the last two, those that there are.
      class_names: one name per class; None where the classes have numbers only.
      source: where it came from, for display.
      notes: what was left out or converted.
    """

    splits: Mapping[str, Split]
    class_names: tuple[str, ...] | None
    source: str
    notes: tuple[str, ...] = ()


def read_archive(path: Path) -> ImageSet:
    """Reads an .npz archive with the names of MedMNIST (train_images) or of Keras (x_train).

    Labels may have the shape [n, 1]. Nothing is unpickled.

    Raises:
      DataError: if it is damaged, has pickled objects, or lacks training or test images.
    """
    splits: dict[str, Split] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            num_bytes = sum(member.file_size for member in archive.infolist())
        if num_bytes > _MAX_BYTES:
            raise DataError(
                f"{path}: unpacks to {num_bytes:,} bytes; expected at most {_MAX_BYTES:,}"
            )
        with np.load(path, allow_pickle=False) as arrays:
            for split, choices in _ARRAYS.items():
                for images, labels in choices:
                    if (images in arrays.files) != (labels in arrays.files):
                        raise DataError(f"{path}: has one of {images} and {labels}; expected both")
                    if images in arrays.files:
                        splits[split] = Split(arrays[images], _flat(arrays[labels]))
            found = ", ".join(arrays.files) or "nothing"
    except DataError:
        raise
    # NumPy and zipfile have no common base class; a false header asks for too much memory.
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, MemoryError) as error:
        is_pickled = "allow_pickle" in str(error)
        reason = "it has pickled objects, which are not read" if is_pickled else error
        raise DataError(f"{path}: is no readable .npz archive: {reason}") from error
    for split in ("train", "test"):
        if split not in splits:
            names = " or ".join(", ".join(pair) for pair in _ARRAYS[split])
            raise DataError(f"{path}: no {split} split; expected {names}, and it holds {found}")
    return ImageSet(splits, read_class_names(path.parent), str(path))


def _flat(labels: np.ndarray) -> np.ndarray:
    return labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels


def read_class_names(folder: Path) -> tuple[str, ...] | None:
    """Reads classes.txt, a name per line in the order of the labels; None if there is none."""
    path = folder / CLASSES
    if not path.is_file():
        return None
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text ({error})") from error
    return tuple(line.strip() for line in lines if line.strip())


def find_pictures(folder: Path) -> dict[str, dict[str, list[Path]]]:
    """Finds the pictures of each class of each split.

    Args:
      folder: with a subfolder per class, or with subfolders train, test and perhaps val that have
        them. Other files, and hidden ones, are ignored.

    Returns:
      Paths by split and class, the classes in the order of classes.txt, or of their names. A folder
      without train and test has the split "train" alone.

    Raises:
      DataError: if a split or the pictures of a class are missing, the splits or classes.txt have
        other classes, or two classes differ in case only.
    """
    found = _subfolders(folder)
    subfolders = {path.name.lower(): path for path in found}
    if not subfolders:
        raise DataError(f"{folder}: holds no subfolder per class, no IDX files and no TFDS records")
    splits = {name: split for split, names in _FOLDERS.items() for name in names}
    places = {splits[name]: subfolders[name] for name in splits if name in subfolders}
    if len(places) < sum(path.name.lower() in splits for path in found):
        raise DataError(f"{folder}: has a split twice: {', '.join(subfolders)}")
    has_splits = {"train", "test"} <= set(places) or set(subfolders) <= set(splits)
    if not has_splits:
        places = {"train": folder}
    elif missing := {"train", "test"} - set(places):
        raise DataError(f"{folder}: no folder {', '.join(missing)}; it has {', '.join(subfolders)}")
    pictures = {
        split: {path.name: _pictures(path) for path in _subfolders(place)}
        for split, place in places.items()
    }
    if not pictures["train"]:
        raise DataError(f"{places['train']}: holds no subfolder per class")
    for split, by_class in pictures.items():
        if different := sorted(set(by_class) ^ set(pictures["train"])):
            raise DataError(
                f"{folder}: {split} and train have different classes: "
                f"{', '.join(different[:_NUM_NAMED])}; expected the same subfolders in both"
            )
        for name, paths in by_class.items():
            if not paths:
                raise DataError(
                    f"{places[split] / name}: holds no picture; expected files that end in "
                    f"{', '.join(PICTURES)}"
                )
    seen: dict[str, str] = {}
    for name in pictures["train"]:
        plain = unicodedata.normalize("NFC", name).casefold()
        if plain in seen:
            raise DataError(
                f"{folder}: the classes {seen[plain]} and {name} differ in case only, or look alike"
            )
        seen[plain] = name
    order = read_class_names(folder) or tuple(pictures["train"])
    if sorted(order) != sorted(pictures["train"]):
        raise DataError(
            f"{folder / CLASSES}: names {_listed(order)}; expected the subfolders, "
            f"{_listed(list(pictures['train']))}"
        )
    return {split: {name: by_class[name] for name in order} for split, by_class in pictures.items()}


def read_folder(
    folder: Path, size: tuple[int, int] | None = None, *, skip_unreadable: bool = False
) -> ImageSet:
    """Reads a folder of pictures, a subfolder per class (`find_pictures`).

    The pictures of a split are in the order of their names, numbers by value, and then of their
    classes, so that a set that was numbered through keeps its order. If one picture is in colour,
    all are.

    Args:
      folder: the folder.
      size: height and width to which the pictures are resized; None keeps theirs.
      skip_unreadable: whether pictures that cannot be read are left out.

    Raises:
      DataError: as `find_pictures`; if a picture cannot be read; or if their sizes differ.
    """
    pictures = find_pictures(folder)
    files = []
    for split, by_class in pictures.items():
        found = [(split, path, i) for i, paths in enumerate(by_class.values()) for path in paths]
        files += sorted(found, key=lambda file: (_natural(file[1].name), file[2]))
    # Threads share the filters of warnings. Pillow's are about metadata.
    with warnings.catch_warnings(), ThreadPoolExecutor() as pool:
        warnings.simplefilter("ignore")
        results = list(pool.map(lambda file: _read(file[1], size), files))
    names = [str(path.relative_to(folder)) for _, path, _ in files]
    errors = [
        f"{name} {each.error}" for name, each in zip(names, results, strict=True) if each.error
    ]
    notes = []
    # Of any split: `predict` counts such files too.
    others = [
        str(path.relative_to(folder))
        for place in sorted({path.parent for _, path, _ in files})
        for path in sorted(place.iterdir())
        if path.suffix.lower() not in PICTURES and path.name[0] != "."
    ]
    if others:
        notes.append(f"{len(others):,} other files are ignored: {_listed(others)}")
    if errors:
        text = f"{len(errors):,} of {len(files):,} pictures cannot be read: {_listed(errors)}"
        if not skip_unreadable or len(errors) == len(files):
            raise DataError(
                f"{folder}: {text}; repair them, or pass skip_unreadable (--skip-unreadable)"
            )
        notes.append(f"{text}; they are left out")
    if converted := [name for name, each in zip(names, results, strict=True) if each.is_converted]:
        notes.append(
            f"{len(converted):,} of {len(files):,} pictures have 16 bits, which are reduced to 8, "
            f"or transparency, which is replaced by white: {_listed(converted)}"
        )
    kept = [i for i, each in enumerate(results) if each.image is not None]
    images = stack([results[i].image for i in kept], [names[i] for i in kept])
    labels = np.array([files[i][2] for i in kept], np.int32)
    split_of = np.array([files[i][0] for i in kept])
    return ImageSet(
        {split: Split(images[split_of == split], labels[split_of == split]) for split in pictures},
        tuple(pictures["train"]),
        str(folder),
        tuple(notes),
    )


def stack(images: Sequence[Any], names: Sequence[str]) -> np.ndarray:
    """Stacks images of one size; if one is in colour, all are.

    Args:
      images: each uint8[height, width] or [height, width, 3].
      names: of the images, for the error.

    Raises:
      DataError: if their sizes differ.

    Example:
      >>> stack([np.zeros((8, 8), np.uint8), np.ones((8, 8, 3), np.uint8)], ["a", "b"]).shape
      (2, 8, 8, 3)
    """
    sizes: dict[tuple[int, ...], str] = {}
    for image, name in zip(images, names, strict=True):
        sizes.setdefault(image.shape[:2], name)
    if len(sizes) > 1:
        found = [f"{height} x {width} ({name})" for (height, width), name in sizes.items()]
        raise DataError(
            f"the images have {len(sizes)} sizes: {_listed(found)}; pass resize "
            "(--resize N), to which all are resized"
        )
    if any(image.ndim == 3 for image in images):
        images = [image if image.ndim == 3 else np.stack([image] * 3, -1) for image in images]
    return np.stack(images)


class _Read(NamedTuple):
    image: np.ndarray | None = None
    error: DataError | None = None
    is_converted: bool = False


def _read(path: Path, size: tuple[int, int] | None) -> _Read:
    def convert(picture: Image.Image) -> _Read:
        is_converted = picture.has_transparency_data or picture.mode.startswith(("I", "F"))
        return _Read(resized(picture, size=size), is_converted=is_converted)

    try:
        return decode(path, convert)
    except DataError as error:
        return _Read(error=error)


def _listed(items: Sequence[str]) -> str:
    more = f" and {len(items) - _NUM_NAMED:,} more" if len(items) > _NUM_NAMED else ""
    return ", ".join(items[:_NUM_NAMED]) + more


def _subfolders(folder: Path) -> list[Path]:
    found = [path for path in folder.iterdir() if path.is_dir() and path.name[0] not in "._"]
    return sorted(found, key=lambda path: _natural(path.name))


def _pictures(folder: Path) -> list[Path]:
    return [
        path for path in folder.iterdir() if path.suffix.lower() in PICTURES and path.name[0] != "."
    ]


def _natural(name: str) -> list[str | int]:
    """Returns a key that sorts numbers by value: 2 before 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]
