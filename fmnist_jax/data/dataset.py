"""Shim."""

from fmnist_jax.data.sources import CLASS_NAMES as CLASS_NAMES
from fmnist_jax.data.sources import Dataset as Dataset
from fmnist_jax.data.sources import select_classes as select_classes
