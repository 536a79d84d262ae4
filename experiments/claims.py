"""Compares the recipes with the projects' claims; the same as `fmnist-jax claims`."""

from fmnist_jax.commands.main import main

main("claims")
