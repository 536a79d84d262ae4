"""Classifies pictures with a trained network; the same as `fmnist-jax predict`."""

from fmnist_jax.commands.main import main

main("predict")
