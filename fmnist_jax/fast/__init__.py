"""Programs in the forms that XLA:CPU compiles to fast code."""
