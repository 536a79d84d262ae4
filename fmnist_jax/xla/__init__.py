"""JAX and XLA: compiler options, persistent cache, fusion boundaries, program cost."""
