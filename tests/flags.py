"""XLA's flags of the tests. Imports nothing that reads them."""

import os
from importlib.metadata import version

# Later versions have no such flag.
_UNFUSED = "--xla_cpu_use_fusion_emitters=false" if version("jaxlib") < "0.11" else ""

# Most of the time goes into compilation. LLVM's optimizations take a third of it; the emitters of
# fused loops, which can be disabled before jaxlib 0.11, take 7 of the 19 s of test_step.py.
QUICK = f"--xla_backend_optimization_level=0 {_UNFUSED}"


def alike() -> dict[str, str]:
    """Variables for processes whose programs differ and must round alike."""
    flags = os.environ.get("XLA_FLAGS", "")
    return {"XLA_FLAGS": flags.replace(_UNFUSED, "") if _UNFUSED else flags}
