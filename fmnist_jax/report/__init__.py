"""HTML pages and plots from the files of a run."""
