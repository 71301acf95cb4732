"""The two layouts of the gate: one row a head in `linear_qkv`, or `kv_channels` rows (`expanded`).

- `projection`: from the hidden states to query, key, value and the gated output of one attention
  of the published width, forward and backward, 128 tokens. The expanded `linear_qkv` has 1.79 times
  the rows in a full layer, 1.84 times in a sliding one.
- `step`: forward and backward of the small model of models.py (8 layers, of hidden size 512).

Both have the same published weights, and must agree in the norms of output and gradients, or in
the loss. Peak memory is the largest resident size beyond that before the run, gradients included.

Not covered: GPUs, Transformer Engine, optimizers (an expanded gate's states are larger too).

    python benchmarks/headwise.py            # some 5 minutes
    python benchmarks/headwise.py --quick    # the step of 4 layers, two minutes; writes no file
"""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import models
import paired
import torch


@functools.cache
def build(gate_layout: str, part: str, layers: int) -> torch.nn.Module:
    models.prepare()
    from support import ours
    from support.reference import random_weights, write_hf_folder

    if part == "step":
        config = models.small(layers=layers)
    else:
        config = models.with_layers(models.published(), layers, dense=layers) | {
            "torch_dtype": "float32",
            "intermediate_size": 128,
            "vocab_size": 128,
        }
    with tempfile.TemporaryDirectory() as folder:
        weights = random_weights(config, seed=0)
        hf_folder = write_hf_folder(Path(folder, "hf"), config, weights)
        return ours.build(hf_folder, gate_layout=gate_layout)


def measure(gate_layout: str, case: paired.Case) -> paired.Result:
    model = build(gate_layout, case["part"], case["layers"])
    if case["part"] == "step":
        return models.step(model, case["seq_len"])
    layer = 0 if case["attention"] == models.FULL else 1
    attention = model.decoder.layers[layer].self_attention
    config = attention.config
    generator = torch.Generator().manual_seed(0)
    hidden, context = (
        torch.randn(case["seq_len"], 1, size, generator=generator).requires_grad_()
        for size in (config.hidden_size, config.num_attention_heads * config.kv_channels)
    )
    model.zero_grad(set_to_none=True)
    with paired.PeakMemory() as peak:
        start = paired.clock()
        query, key, value, gate = attention.get_query_key_value_tensors(hidden, output_gate=True)
        out = attention._apply_output_gate(context, gate)
        forward = paired.clock() - start
        torch.autograd.backward([query, key, value, out], [query, key, value, out])
        total = paired.clock() - start
    return {
        "forward_s": forward,
        "total_s": total,
        "peak_mib": peak.mib(),
        "check": [
            x.double().square().sum().item() for x in (query, out, hidden.grad, context.grad)
        ],
    }


def case(part: str, attention: str, layers: int, tokens: int) -> paired.Case:
    return {
        "dtype": "float32",
        "part": part,
        "attention": attention,
        "layers": layers,
        "seq_len": tokens,
    }


BENCHMARK = paired.Benchmark(
    script=__file__,
    implementations=("headwise", "expanded"),
    measure=measure,
    cases=[
        case("projection", models.FULL, 2, 128),
        case("projection", models.SLIDING, 2, 128),
        case("step", "all", 8, 1024),
    ],
    quick=[case("step", "all", 4, 256)],
    rounds=9,
)

if __name__ == "__main__":
    paired.main(BENCHMARK)
