"""The command line; each command is a thin layer over the package's functions."""
