"""HTML pages and plots, made from a run's files alone."""
