"""Scores, statistics, calibration and duplicates, without JAX."""
