"""Compares two recipes over the same seeds; the same as `fmnist-jax compare`."""

from fmnist_jax.commands.main import main

main("compare")
