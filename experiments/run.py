"""Trains a recipe and writes a report; the same as `fmnist-jax run`."""

from fmnist_jax.commands.main import main

main("run")
