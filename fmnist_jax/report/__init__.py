"""HTML pages and event files, from the files and the log of a run."""
