"""How a step grows: in the length of the sequence, the number of layers, and that of experts.

Forward and backward of the small model of models.py (hidden size 512, 8 experts a token), each
series from the same first model. `gflop` is what `step35_patch.costs` counts, so that
`over_previous` has something to be held against: what grows more than that is overhead. Experts
beyond the 8 that a token takes add no operations but the router's; what they add is bookkeeping,
and gradients to write. Peak memory is the largest resident size beyond that before the step:
activations, and the gradients of all weights.

Not covered: optimizers, Transformer Engine, more than one process.

    python benchmarks/growth.py            # some 20 minutes, 5 GiB
    python benchmarks/growth.py --quick    # a minute; writes no file
"""

from __future__ import annotations

import gc

import models
import paired

MODEL: dict[tuple[int, int], tuple[dict, object]] = {}


def measure(implementation: str, case: paired.Case) -> paired.Result:
    from step35_patch import Step35Config
    from step35_patch.costs.accounting import training_flops

    size = case["layers"], case["experts"]
    if size not in MODEL:
        models.prepare()
        MODEL.clear()  # one at a time
        gc.collect()
        config = models.small(layers=case["layers"], experts=case["experts"])
        model = models.provider(config, use_cpu_initialization=True).provide()
        MODEL[size] = config, model
        models.step(model, 64)
    config, model = MODEL[size]
    tokens = case["seq_len"]
    flops = training_flops(
        Step35Config.from_dict(config),
        tokens=tokens,
        squared_lengths=tokens**2,
        vocab_size=config["vocab_size"],
        mtp_layers=0,
    )
    return models.step(model, tokens) | {"gflop": flops / 1e9}


def case(tokens: int = 1024, layers: int = 4, experts: int = 8) -> paired.Case:
    return {"dtype": "float32", "seq_len": tokens, "layers": layers, "experts": experts}


BENCHMARK = paired.Benchmark(
    script=__file__,
    implementations=("step35_patch",),
    measure=measure,
    # By model, so that each is built once a round.
    cases=[
        *(case(tokens=tokens) for tokens in (1024, 2048, 4096, 8192)),
        *(case(layers=layers) for layers in (8, 16)),
        *(case(experts=experts) for experts in (32, 96, 288)),
    ],
    quick=[case(tokens=256), case(tokens=512), case(tokens=256, experts=32)],
    growth=("seq_len", "layers", "experts"),
)

if __name__ == "__main__":
    paired.main(BENCHMARK)
