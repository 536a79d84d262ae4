"""Searches for better settings; the same as `fmnist-jax sweep`."""

from fmnist_jax.commands.main import main

main("sweep")
