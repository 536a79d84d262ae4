"""Fashion-MNIST through TensorFlow Datasets, without TensorFlow."""

import hashlib
import io
import socket
import struct
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from fmnist_jax.data.idx import read_images, read_labels
from fmnist_jax.errors import DataError

_TIMEOUT_SECONDS = 5.0
_IDX_FILES = {
    "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
    "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
}


def find_prepared(directory: Path) -> Path | None:
    """Returns the newest prepared version in or at a TFDS directory, or None.

    Example:
      >>> find_prepared(Path("/nowhere")) is None
      True
    """
    places = [directory, *sorted(directory.glob("fashion_mnist/*.*.*"), reverse=True)]
    return next((place for place in places if record_files(place)), None)


def record_files(prepared: Path) -> list[Path]:
    """Returns the record files of a prepared version, in the order of their shards."""
    return sorted(prepared.glob("fashion_mnist-*record-*-of-*"))


def read_prepared(prepared: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Reads both splits in the order of the published files.

    TFDS stores the examples in the order of the MD5 of split name and position; the positions are
    recovered from it.

    Args:
      prepared: folder with the record files, in ArrayRecord or TFRecord format.

    Returns:
      {"train": (uint8[count, 28, 28], uint8[count]), "test": ...}.

    Raises:
      DataError: if the records are missing, damaged or of another data set.
    """
    # Imported here, because only this source needs them.
    from PIL import Image
    from tensorflow_datasets.proto import tf_example_pb2

    splits = {}
    for split in ("train", "test"):
        paths = [path for path in record_files(prepared) if f"-{split}." in path.name]
        if not paths:
            raise DataError(f"{prepared}: no record files of the {split} split; prepare it again")
        images, labels = [], []
        try:
            for path in paths:
                for record in _records(path):
                    feature = tf_example_pb2.Example.FromString(record).features.feature
                    png = Image.open(io.BytesIO(feature["image"].bytes_list.value[0]))
                    images.append(np.asarray(png))
                    labels.append(feature["label"].int64_list.value[0])
            stored = np.stack(images), np.array(labels, np.uint8)
        except Exception as error:  # protobuf, PIL and array_record share no base class
            raise DataError(
                f"{prepared}: the {split} records cannot be read ({error}); prepare them again"
            ) from error
        order = np.argsort(sorted(range(len(labels)), key=lambda i: _position_hash(split, i)))
        splits[split] = (stored[0][order], stored[1][order])
    return splits


def prepare(data_dir: Path) -> Path:
    """Downloads Fashion-MNIST into a TFDS directory, and returns the folder of the version.

    Version, features and checksums are those of TFDS. Only its decoding and encoding, which need
    TensorFlow, are replaced.

    Raises:
      DataError: if the files cannot be downloaded or their checksums differ.
    """
    import tensorflow_datasets as tfds
    from PIL import Image

    with tfds.core.registered.skip_registration():

        class FashionMNIST(tfds.image_classification.FashionMNIST):
            name = "fashion_mnist"

            def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[Any]]:
                urls = {
                    name: urllib.parse.urljoin(self.URL, name)
                    for names in _IDX_FILES.values()
                    for name in names
                }
                paths = dl_manager.download(urls)
                return {
                    split: self._generate_examples(paths[images], paths[labels])
                    for split, (images, labels) in _IDX_FILES.items()
                }

            def _generate_examples(self, images_path: Any, labels_path: Any) -> Iterator[Any]:
                images, labels = read_images(Path(images_path)), read_labels(Path(labels_path))
                for position, (image, label) in enumerate(zip(images, labels, strict=True)):
                    yield position, {"image": Image.fromarray(image), "label": int(label)}

    _check_reachable(FashionMNIST.URL)
    try:
        builder = FashionMNIST(data_dir=str(data_dir), file_format="array_record")
        config = tfds.download.DownloadConfig(
            try_download_gcs=False, force_checksums_validation=True
        )
        builder.download_and_prepare(download_config=config)
    except Exception as error:  # requests, TFDS and the file system share no base class
        raise DataError(f"TFDS could not prepare Fashion-MNIST: {error}") from error
    return Path(builder.data_dir)


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
