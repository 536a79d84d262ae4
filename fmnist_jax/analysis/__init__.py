"""Scores, statistics, calibration and duplicates, in NumPy alone."""
