"""Searches for better settings; the same as `fmnist-jax sweep`."""

from fmnist_jax.commands.main import main

if __name__ == "__main__":
    main("sweep")
