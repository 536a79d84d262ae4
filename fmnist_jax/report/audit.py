"""audit.html: duplicates, pixel statistics and label issues of the data, with pictures."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fmnist_jax.analysis import plots
from fmnist_jax.data.sources import Dataset, is_fashion_mnist
from fmnist_jax.report.render import write_page


def write_audit(
    workdir: Path, audit: dict[str, Any], dataset: Dataset, distances: Mapping[str, np.ndarray]
) -> Path:
    """Writes `audit.html` and returns its path.

    Args:
      workdir: an existing folder.
      audit: the content of audit.json.
      dataset: the audited data.
      distances: float[n] of the "test" images and of "train" images, the relative distance of each
        to its nearest training image.
    """
    class_means = []
    for label, name in enumerate(dataset.class_names):
        images = dataset.train_images[dataset.train_labels == label]
        if len(images):
            class_means.append((name, np.round(images.mean(axis=0)).astype(np.uint8)))
    histogram = plots.distance_histogram(distances, audit["near_duplicates"]["threshold"])
    return write_page(
        workdir / "audit.html",
        "audit",
        sample=dataset.sample,
        audit=audit,
        data_name="Fashion-MNIST" if is_fashion_mnist(dataset.sha256) else dataset.source,
        images={"train": dataset.train_images, "test": dataset.test_images},
        class_means=class_means,
        histogram=plots.encode(histogram, sample=dataset.sample),
    )
