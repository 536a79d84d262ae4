"""XLA's flags of the tests. Imports nothing that reads them."""

import os
from importlib.metadata import version

# Later versions have no such flag.
_UNFUSED = "--xla_cpu_use_fusion_emitters=false" if version("jaxlib") < "0.11" else ""

# Most of the time goes into compilation, half of it into LLVM's optimizations and, before jaxlib
# 0.11, into the code of fused loops, which change neither XLA's program nor what is tested.
QUICK = f"--xla_backend_optimization_level=0 {_UNFUSED}"


def alike() -> dict[str, str]:
    """Variables for processes whose programs differ and must round alike."""
    flags = os.environ.get("XLA_FLAGS", "")
    return {"XLA_FLAGS": flags.replace(_UNFUSED, "") if _UNFUSED else flags}
