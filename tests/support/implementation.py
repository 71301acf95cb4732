"""Which implementation of Megatron-Core's layers the tests of this process run on.

`./run test` runs the tests that are marked `transformer_engine` once more with
STEP35_TEST_IMPLEMENTATION=transformer_engine: on Transformer Engine's own Python, whose compiled
kernels `support.te_on_cpu` stands in for.
"""

from __future__ import annotations

import os

from step35_patch import cpu

VARIABLE = "STEP35_TEST_IMPLEMENTATION"
IMPLEMENTATION = os.environ.get(VARIABLE, "local")
if IMPLEMENTATION not in ("local", "transformer_engine"):
    raise ValueError(f"{VARIABLE}: expected local or transformer_engine, found {IMPLEMENTATION}")
ON_TRANSFORMER_ENGINE = IMPLEMENTATION == "transformer_engine"


def install(cudnn: bool = False) -> None:
    """Let this process take its CPU for a GPU, with Transformer Engine if that is tested.

    To be called before the first `import megatron`, and again with `cudnn` for its attention, the
    only one on a CPU that knows context parallelism.
    """
    cpu.install()
    if ON_TRANSFORMER_ENGINE:
        from support import te_on_cpu

        te_on_cpu.install(cudnn)
