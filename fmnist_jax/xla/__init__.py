"""JAX and XLA: compiler options, compilation cache, calls that are not inlined."""
