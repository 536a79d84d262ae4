"""Examines the data; the same as `fmnist-jax audit`."""

from fmnist_jax.commands.main import main

main("audit")
