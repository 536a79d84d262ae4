"""`python -m fmnist_jax COMMAND`."""

from fmnist_jax.commands.main import main

if __name__ == "__main__":
    main()
