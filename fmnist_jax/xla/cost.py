"""`Cost`: floating-point operations and memory of a compiled program."""

from typing import Any, NamedTuple


class Cost(NamedTuple):
    """The compiler's figures of one program.

    Attributes:
      flops: floating-point operations. The body of a loop counts once.
      bytes: device memory for arguments, results and temporaries.
    """

    flops: float
    bytes: int


def measure_cost(compiled: Any) -> Cost:
    """Reads the cost of a compiled program.

    Args:
      compiled: a `jax.stages.Compiled`, as returned by `jax.jit(function).lower(...).compile()`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> matrix = jnp.ones((8, 8), jnp.float32)
      >>> measure_cost(jax.jit(jnp.matmul).lower(matrix, matrix).compile())
      Cost(flops=1024.0, bytes=768)
    """
    memory = compiled.memory_analysis()
    return Cost(
        float(compiled.cost_analysis().get("flops", 0.0)),  # absent without arithmetic
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes,
    )
