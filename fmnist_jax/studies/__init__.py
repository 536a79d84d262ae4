"""Many runs: seeds, comparisons, sweeps, cross-validation, audits, executors."""
