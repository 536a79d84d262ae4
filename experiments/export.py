"""Exports a trained network; the same as `fmnist-jax export`."""

from fmnist_jax.commands.main import main

if __name__ == "__main__":
    main("export")
