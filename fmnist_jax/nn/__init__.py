"""Networks, layers and operations."""
