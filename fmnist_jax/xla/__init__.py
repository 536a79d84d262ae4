"""What JAX and XLA need from us: jit options, the persistent cache, fences, program costs."""
