"""The training step, the training loop, optimizers, metrics and prediction: pure functions."""
