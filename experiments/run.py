"""Trains a recipe and writes a report; the same as `fmnist-jax run`."""

from fmnist_jax.commands.main import main

if __name__ == "__main__":
    main("run")
