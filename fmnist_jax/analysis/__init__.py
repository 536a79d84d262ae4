"""Scores, statistics, calibration, duplicates, label issues and figures, without JAX."""
