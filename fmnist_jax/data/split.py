"""Shim."""

from fmnist_jax.data.sources import stratified_split as stratified_split
