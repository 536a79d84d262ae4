"""Devices and processes that share one training, with the same bits for any number of them."""
