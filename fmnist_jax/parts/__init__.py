"""The parts of a run: import paths to objects, and what each part must fulfil."""
