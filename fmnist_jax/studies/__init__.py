"""Many runs: seeds, comparisons, cross-validation and label issues."""
