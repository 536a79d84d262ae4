"""Image sets through TensorFlow Datasets, without TensorFlow."""

import contextlib
import hashlib
import json
import os
import socket
import struct
import sys
import types
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
from PIL import Image

from fmnist_jax.data.image_sets import ImageSet, Split, stack
from fmnist_jax.data.pictures import read_image
from fmnist_jax.errors import DataError, first_line

_TIMEOUT_SECONDS = 5.0
_SPLITS = ("train", "validation", "test")

# Sets whose examples are numbered in the order of their files.
_NUMBERED = ("fashion_mnist", "mnist", "kmnist")


def find_prepared(directory: Path, name: str = "fashion_mnist") -> Path | None:
    """Returns the newest prepared version of a set in or at a TFDS directory, or None.

    Example:
      >>> find_prepared(Path("/nowhere")) is None
      True
    """
    places = [directory, *sorted(directory.glob(f"{name}/*.*.*"), reverse=True)]
    return next((place for place in places if record_files(place)), None)


def record_files(prepared: Path) -> list[Path]:
    """Returns the record files of a prepared version, in the order of their shards."""
    return sorted(prepared.glob("*-*.*record-*-of-*"))


def read_prepared(prepared: Path, size: tuple[int, int] | None = None) -> ImageSet:
    """Reads the splits of an image classification set that TFDS has prepared.

    TFDS stores the examples in the order of the MD5 of split name and key. Where the keys are
    positions, they are recovered from it.

    Args:
      prepared: folder with the record files, in ArrayRecord or TFRecord format.
      size: height and width to which the images are resized; None keeps theirs.

    Returns:
      The splits train, test and validation, as far as there are any.

    Raises:
      DataError: if the records are missing, damaged or have no image with one class, or the images
        have several sizes.
    """
    # Imported here, because only this source needs it.
    from tensorflow_datasets.proto import tf_example_pb2

    name = record_files(prepared)[0].name.partition("-")[0]
    is_numbered = name in _NUMBERED
    # Of these sets the features are known; older versions of TFDS wrote less about them.
    features = (
        _Features("image", "label", 1, _class_names(prepared, "label", 10))
        if is_numbered
        else _read_features(prepared)
    )
    splits: dict[str, Split] = {}
    for split in _SPLITS:
        paths = [path for path in record_files(prepared) if f"-{split}." in path.name]
        if not paths:
            continue
        images, labels = [], []
        try:
            for path in paths:
                for record in _records(path):
                    feature = tf_example_pb2.Example.FromString(record).features.feature
                    content = feature[features.image].bytes_list.value[0]
                    images.append(read_image(content, features.channels, size))
                    labels.append(feature[features.label].int64_list.value[0])
        except Exception as error:  # protobuf, Pillow and array_record share no base class
            raise DataError(
                f"{prepared}: the {split} records cannot be read ({error}); prepare them again"
            ) from error
        stacked = stack(images, [f"{split} image {i}" for i in range(len(images))])
        splits[split] = Split(stacked, np.array(labels))
        if is_numbered:
            order = sorted(range(len(labels)), key=lambda i: _position_hash(split, i))
            splits[split] = Split(*(array[np.argsort(order)] for array in splits[split]))
    for split in ("train", "test") if is_numbered else ("train",):
        if split not in splits:
            raise DataError(f"{prepared}: no record files of the {split} split; prepare it again")
    return ImageSet(splits, features.class_names, f"TFDS {prepared}")


class _Features(NamedTuple):
    """Keys of image and label in an example, and what is known of both."""

    image: str
    label: str
    channels: int | None
    class_names: tuple[str, ...]


def _read_features(prepared: Path) -> _Features:
    try:
        info = json.loads((prepared / "dataset_info.json").read_text(encoding="utf-8"))
        image, label = (item["featureKey"] for item in info["supervisedKeys"]["tuple"]["items"])
        text = (prepared / "features.json").read_text(encoding="utf-8")
        features = json.loads(text)["featuresDict"]["features"]
        num_classes = int(features[label]["classLabel"]["numClasses"])
        channels = {"1": 1, "3": 3}.get(features[image]["image"]["shape"]["dimensions"][-1])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{prepared} is no prepared set of images with one class each: its dataset_info.json "
            f"and features.json say otherwise ({type(error).__name__}: {first_line(error)})"
        ) from error
    return _Features(image, label, channels, _class_names(prepared, label, num_classes))


def _class_names(prepared: Path, label: str, num_classes: int) -> tuple[str, ...]:
    try:
        names = (prepared / f"{label}.labels.txt").read_text(encoding="utf-8").splitlines()
    except OSError:
        return tuple(map(str, range(num_classes)))
    return tuple(filter(None, map(str.strip, names)))


def prepare(name: str, data_dir: Path) -> Path:
    """Downloads a set into a TFDS directory, and returns the folder of the version.

    Version, features and checksums are those of TFDS. Only its access to files and the encoding of
    images, which need TensorFlow, are replaced.

    Args:
      name: of an image classification set in TFDS, such as "cifar10" or "emnist/letters".
      data_dir: the TFDS directory. A version that is there is not downloaded again.

    Raises:
      DataError: if TFDS has no such set, or the files cannot be downloaded or their checksums
        differ.
    """
    import tensorflow_datasets as tfds

    settings = tfds.download.DownloadConfig(try_download_gcs=False, force_checksums_validation=True)
    try:
        builder = tfds.builder(name, data_dir=str(data_dir), file_format="array_record")
        _check_features(name, builder.info)
        if not record_files(Path(builder.data_dir)):
            for url in list(builder.url_infos or ())[:1]:
                _check_reachable(url)
        generate = builder._generate_examples

        def encodable(*args: Any, **kwargs: Any) -> Iterator[Any]:
            for key, example in generate(*args, **kwargs):
                yield key, {feature: _as_picture(each) for feature, each in example.items()}

        builder._generate_examples = encodable
        with _without_tensorflow(builder):
            builder.download_and_prepare(download_config=settings)
    except DataError:
        raise
    except tfds.core.registered.DatasetNotFoundError as error:
        raise DataError(
            f"there is no file or folder {name}, and TFDS has no data set of this name"
        ) from error
    except Exception as error:  # requests, TFDS and the file system share no base class
        raise DataError(f"TFDS could not prepare {name}: {first_line(error)}") from error
    return Path(builder.data_dir)


def _check_features(name: str, info: Any) -> None:
    """Refuses a set that has no pairs of an image and a class, before it is downloaded."""
    from tensorflow_datasets import features

    keys = info.supervised_keys or ()
    kinds = [type(info.features[key]) for key in keys if isinstance(key, str)]
    if kinds != [features.Image, features.ClassLabel]:
        found = ", ".join(f"{key} {type(kind).__name__}" for key, kind in info.features.items())
        raise DataError(
            f"TFDS' {name} is no set of images with one class each, but one of {found}; "
            "choose another"
        )


@contextlib.contextmanager
def _without_tensorflow(builder: Any) -> Iterator[None]:
    """Replaces TensorFlow where TFDS extracts and reads files by functions of Python."""
    from tensorflow_datasets.core.download import extractor

    functions = types.SimpleNamespace(
        io=types.SimpleNamespace(gfile=types.SimpleNamespace(GFile=open)),
        compat=types.SimpleNamespace(as_text=os.fsdecode),
    )
    with contextlib.ExitStack() as stack:
        for module in (sys.modules[type(builder).__module__], extractor):
            stack.enter_context(mock.patch.object(module, "tf", functions, create=True))
        yield


def _as_picture(feature: Any) -> Any:
    """Returns arrays of pixels as pictures, which TFDS encodes without TensorFlow."""
    if not (isinstance(feature, np.ndarray) and feature.dtype == np.uint8 and feature.ndim == 3):
        return feature
    return Image.fromarray(feature[..., 0] if feature.shape[-1] == 1 else feature)


def _check_reachable(url: str) -> None:
    # If packets are dropped, TFDS retries for minutes; this fails within seconds.
    parts = urllib.parse.urlsplit(url)
    proxies = urllib.request.getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if proxy and not urllib.request.proxy_bypass(parts.hostname or ""):  # as TFDS would connect
        parts = urllib.parse.urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    try:
        socket.create_connection((parts.hostname or "", parts.port or 80), _TIMEOUT_SECONDS).close()
    except (OSError, ValueError) as error:  # the latter for a port that is no number
        raise DataError(f"{parts.hostname} cannot be reached ({error})") from error


def _position_hash(split: str, position: int) -> bytes:
    return hashlib.md5(f"{split}{position}".encode(), usedforsecurity=False).digest()


def _records(path: Path) -> Iterator[bytes]:
    if ".array_record-" in path.name:
        from array_record.python import array_record_module

        reader = array_record_module.ArrayRecordReader(str(path))
        yield from reader.read_all()
        reader.close()
        return
    content = memoryview(path.read_bytes())
    position = 0
    while position < len(content):  # length, its checksum, the record, its checksum
        (length,) = struct.unpack_from("<Q", content, position)
        yield bytes(content[position + 12 : position + 12 + length])
        position += 12 + length + 4
