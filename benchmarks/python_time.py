"""Python time of a layer: forward and backward on tensors so small that little else is left.

- `megatron_core`: stock Megatron-Core's local layer of the same shape, without an output gate.
- `megatron_core_gate`: the same with its `attention_output_gate`.
- `step35_patch`: ours, of each kind. `clamped` has both clamps.

8 tokens, hidden size 32, 8 experts of which a token takes 8; a run is 50 times forward and backward
after each other, and its times are divided by that. On a GPU this time is hidden as long as the
kernels of a layer take longer.

Not covered: Transformer Engine's layers, data-parallel hooks, recomputation.

    python benchmarks/python_time.py            # three minutes
    python benchmarks/python_time.py --quick    # one minute; writes no file
"""

from __future__ import annotations

import functools
from typing import Any

import models
import paired
import torch

TOKENS, HIDDEN, HEADS, CHANNELS, REPEATS = 8, 32, 4, 8, 50
# The layer's number in the model that `build` makes.
LAYERS = {
    "full, dense": 0,
    "sliding, dense": 1,
    "sliding, moe": 2,
    "sliding, moe, clamped": 3,
}


@functools.cache
def build(implementation: str) -> Any:
    models.prepare()
    sliding = {"attention_type": models.SLIDING, "num_attention_heads": HEADS, "head_dim": CHANNELS}
    config = models.small(
        layers=len(LAYERS),
        experts=8,
        hidden_size=HIDDEN,
        intermediate_size=HIDDEN,
        moe_intermediate_size=HIDDEN,
        share_expert_dim=HIDDEN,
        vocab_size=128,
        num_attention_heads=HEADS,
        head_dim=CHANNELS,
        attention_other_setting=sliding | {"num_attention_groups": 1, "true_head_dim": CHANNELS},
        moe_layers_enum="2,3",
        swiglu_limits=[0.0, 0.0, 0.0, 7.0],
    )
    if implementation == "step35_patch":
        return models.provider(config, use_cpu_initialization=True).provide()
    gate = implementation == "megatron_core_gate"
    return models.stock_gpt(config, use_cpu_initialization=True, attention_output_gate=gate)


def measure(implementation: str, case: paired.Case) -> paired.Result:
    model = build(implementation)
    layer = model.decoder.layers[LAYERS[case["layer"]]]
    # Ours makes its own.
    angles = None if implementation == "step35_patch" else model.rotary_pos_emb(TOKENS)
    hidden = torch.randn(TOKENS, 1, HIDDEN, requires_grad=True)
    grad = torch.randn(TOKENS, 1, HIDDEN)
    forward = total = 0.0
    for repeat in range(REPEATS + 1):
        start = paired.clock()
        out, _ = layer(hidden, attention_mask=None, rotary_pos_emb=angles)
        middle = paired.clock()
        out.backward(grad)
        if repeat:  # the first one makes the gradients
            forward += (middle - start) / REPEATS
            total += (paired.clock() - start) / REPEATS
    return {"forward_s": forward, "total_s": total}


BENCHMARK = paired.Benchmark(
    script=__file__,
    implementations=("megatron_core", "megatron_core_gate", "step35_patch"),
    measure=measure,
    cases=[{"layer": name} for name in LAYERS],
    quick=[{"layer": name} for name in LAYERS],
    warm_up=[{"layer": name} for name in LAYERS],
    rounds=15,
)

if __name__ == "__main__":
    paired.main(BENCHMARK)
