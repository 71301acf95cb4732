"""A layer of full width on a GPU: ours beside stock Megatron-Core's, on Transformer Engine.

- `ours`: this package's layer of each kind.
- `stock`: Megatron-Core's of the same sizes, without gate and clamps.
- `stock_gate`: the same with its own output gate.

bf16, forward and backward; CUDA events around each run, a round runs all three one after the other.
A line of JSON for each kind: milliseconds at the 20th, 50th and 80th percentile, and the ratios
within a round. `./run verify-gpu` keeps them in benchmarks/results/gpu.csv.

    python tools/gpu_layers.py            # needs a GPU and Transformer Engine
    python tools/gpu_layers.py --tiny     # small sizes on whatever is there: does it run?
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import layers

KINDS = (
    layers.Shape(layers.FULL, "dense"),
    layers.Shape(layers.SLIDING, "dense"),
    layers.Shape(layers.SLIDING, "moe"),
    layers.Shape(layers.FULL, "moe", clamped=True),
)
TINY = layers.Sizes(
    **{"hidden": 32, "dense": 48, "expert": 16, "heads": 4, "sliding_heads": 6, "groups": 2},
    **{"channels": 16, "window": 8, "experts": 4, "chosen": 2},
)


def run(layer: torch.nn.Module, hidden: torch.Tensor, angles: torch.Tensor | None) -> float:
    """Milliseconds of one forward and backward."""
    if hidden.is_cuda:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
    else:
        began = time.perf_counter()
    out, _ = layer(hidden, attention_mask=None, rotary_pos_emb=angles)
    out.backward(torch.ones_like(out))
    if not hidden.is_cuda:
        return 1e3 * (time.perf_counter() - began)
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def measured(shape: layers.Shape, sizes: layers.Sizes, tokens: int, rounds: int) -> dict:
    """Times and ratios of one kind."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    built = {
        "ours": layers.ours(shape, sizes),
        "stock": layers.stock(shape, sizes, gate=False),
        "stock_gate": layers.stock(shape, sizes, gate=True),
    }
    hidden = torch.randn(tokens, 1, sizes.hidden, dtype=torch.bfloat16, device=device)
    angles = layers.rotary_table(shape, sizes, tokens).to(device)
    times: dict[str, list[float]] = {name: [] for name in built}
    for number in range(rounds + 2):
        for name, layer in built.items():
            layer.to(device)
            own = None if name == "ours" else angles
            taken = run(layer, hidden.clone().requires_grad_(), own)
            if number >= 2:  # before that kernels are chosen and memory is found
                times[name].append(taken)
    found: dict = {"kind": shape.name, "tokens": tokens, "rounds": rounds}
    for name, taken in times.items():
        found[f"{name}_ms"] = spread(taken)
        over = [own / other for own, other in zip(times["ours"], taken, strict=True)]
        if name != "ours":
            found[f"over_{name}"] = spread(over)
    return found


def spread(values: list[float]) -> list[float]:
    """20th percentile, median, 80th percentile."""
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return [round(cuts[1], 3), round(statistics.median(values), 3), round(cuts[7], 3)]


def main() -> None:
    parser = argparse.ArgumentParser(description="Time layers of full width on a GPU.")
    parser.add_argument("--tiny", action="store_true", help="small sizes, on whatever is there")
    parser.add_argument("--tokens", type=int, default=8192, help="of one sequence (8192)")
    parser.add_argument("--rounds", type=int, default=20, help="20")
    arguments = parser.parse_args()
    if torch.cuda.is_available():
        layers.activate()
    elif arguments.tiny:
        layers.prepare()
    else:
        sys.exit("gpu_layers: expected a GPU, found none; --tiny runs anywhere, and shows nothing")
    sizes, tokens = (TINY, 64) if arguments.tiny else (layers.Sizes(), arguments.tokens)
    for shape in KINDS:
        print(json.dumps(measured(shape, sizes, tokens, arguments.rounds)), flush=True)


if __name__ == "__main__":
    main()
