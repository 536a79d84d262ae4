"""One run on disk: plan, fit, checkpoints, signals and results."""
