"""Exports a trained network; the same as `fmnist-jax export`."""

from fmnist_jax.commands.main import main

main("export")
