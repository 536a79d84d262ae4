"""A trained network outside of its run: predictions, pictures, other formats."""
