"""Building the model on the meta device: ours beside stock Megatron-Core's of the same shape.

The published config with 4 and with all 45 layers, without MTP layers, by the local implementation
(each expert is a module of its own: 288 in a layer). Nothing is allocated or initialized, so that
the time is that of Python and of torch's modules.

Not covered: Transformer Engine's modules, initialization, loading.

    python benchmarks/build.py            # some minutes
    python benchmarks/build.py --quick    # 4 layers, a minute; writes no file
"""

from __future__ import annotations

import gc

import models
import paired
import torch


def measure(implementation: str, case: paired.Case) -> paired.Result:
    from support.ours import initialize_megatron

    # Without the stand-in for CUDA, whose functions are none that torch.device("meta") knows.
    torch.cuda.current_device = lambda: "cpu"  # for the buffers of the routers
    initialize_megatron()
    config = models.with_layers(models.published(), case["layers"], dense=3)
    options = {"params_dtype": torch.bfloat16, "bf16": True}
    # No device by name, and no draws.
    options |= {"use_cpu_initialization": True, "perform_initialization": False}
    gc.collect()  # the last round's model is not this one's
    start = paired.clock()
    with torch.device("meta"):
        if implementation == "step35_patch":
            model = models.provider(config, **options).provide()
        else:
            model = models.stock_gpt(config, **options)
    if any(not parameter.is_meta for parameter in model.parameters()):
        raise RuntimeError("expected parameters on the meta device, found others")
    return {"total_s": paired.clock() - start}


BENCHMARK = paired.Benchmark(
    script=__file__,
    implementations=("megatron_core", "step35_patch"),
    measure=measure,
    cases=[{"layers": layers, "experts": 288} for layers in (4, 45)],
    quick=[{"layers": 4, "experts": 288}],
    warm_up=[{"layers": 4}],
)

if __name__ == "__main__":
    paired.main(BENCHMARK)
