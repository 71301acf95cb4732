"""What a layer costs on a GPU besides its matrix products and attention, counted on the CPU.

One layer, forward and backward, on Transformer Engine's own Python in bf16 without a GPU:
`counting.py` says what counts, `layers.py` what is built. Compared:

- ours: a Step-3.5 layer, with the head-wise gate, and with clamps where the name says so
- stock: Megatron-Core's layer of the same shape, without a gate; and with its own output gate
  (`attention_output_gate`), which has a row of QKV for each channel. Neither clamps.
- floor: each tensor that products and attention hand to each other once, by hand (`layer_floor.py`)

For the published shape bytes are counted at its own widths with few tokens and experts (products
give zeros there, as numbers do not matter), in which they are linear: the count of a third number
of tokens and experts must come out exactly. Kernels do not depend on either.

Not counted: --moe-permute-fusion, whose kernels are Triton's and do not run under the counter.

The times are predicted, not measured: bytes and operations over the stated shares of an H100's
3.35 TB/s and 989 TFLOP/s, one after the other. Nothing is said of launches, communication,
optimizers or the first and last layers.

    python benchmarks/count.py --quick             # seconds: small layers, prints a table
    python benchmarks/count.py --quick --list      # and each kernel
    python benchmarks/count.py                     # minutes, 6 GiB: writes results/count.csv
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import platform
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import counting
import layers
import torch
from layers import FULL, SLIDING, Shape, Sizes

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "count.csv"

SMALL = Sizes(64, 96, 32, 8, 12, 2, 16, 16, experts=4, chosen=2)
PUBLISHED = Sizes()
TOKENS = (8192, 131072)
SHAPES = [
    Shape(SLIDING, "dense"),
    Shape(SLIDING, "dense", clamped=True),
    Shape(SLIDING, "moe"),
    Shape(SLIDING, "moe", clamped=True),
    Shape(FULL, "dense"),
    Shape(FULL, "moe"),
    Shape(FULL, "moe", clamped=True),
]
# What stands behind "ours" or "stock": the gate with a row for each channel; --moe-router-fusion.
EXPANDED, GATE, FUSED = ", expanded gate", " + gate", ", fused router"
# What an H100 does in a second, and the share of it that is taken to be reached.
BANDWIDTH, OPERATIONS = 0.8 * 3.35e12, 0.6 * 989e12


@dataclass
class Count:
    """One layer, one step."""

    layer: str
    implementation: str
    tokens: int
    experts: int
    forward_kernels: int = 0
    backward_kernels: int = 0
    forward_bytes: int = 0
    backward_bytes: int = 0
    gemm_flops: int = 0
    attention_flops: int = 0
    kept_tensors: int = 0
    kept_bytes: int = 0


# Those that are linear in the tokens and the experts; attention's operations are not.
LINEAR = ("forward_bytes", "backward_bytes", "gemm_flops", "kept_bytes")
CONSTANT = ("forward_kernels", "backward_kernels", "kept_tensors")


def attention_flops(shape: Shape, sizes: Sizes, tokens: int) -> int:
    """Of scores and values that are visible: two products forward, five backward."""
    heads, window = sizes.heads, tokens
    if shape.attention == SLIDING:
        heads, window = sizes.sliding_heads, min(sizes.window, tokens)
    pairs = window * (window + 1) // 2 + (tokens - window) * window
    return 7 * 2 * pairs * heads * sizes.channels


def build(shape: Shape, sizes: Sizes, implementation: str) -> torch.nn.Module:
    torch.manual_seed(0)
    fused = layers.FUSED_ROUTER if implementation.endswith(FUSED) else {}
    if implementation.startswith("ours"):
        layout = "expanded" if implementation.endswith(EXPANDED) else "headwise"
        return layers.ours(shape, sizes, gate_layout=layout, **fused)
    return layers.stock(shape, sizes, gate=implementation.endswith(GATE), **fused)


def count(
    layer: torch.nn.Module,
    shape: Shape,
    sizes: Sizes,
    implementation: str,
    tokens: int,
    listed: bool = False,
) -> Count:
    """Count a step of one layer; the second step, after what is made once."""
    table = None
    if not implementation.startswith("ours"):
        table = (layers.rotary_table(shape, sizes, tokens),) * 2
    x = torch.randn(tokens, 1, sizes.hidden, dtype=torch.bfloat16, requires_grad=True)
    parameters = [p for p in layer.parameters() if p.requires_grad]

    def step(counter: counting.Counter | None) -> list[tuple[int, list[int]]]:
        with contextlib.ExitStack() as stack:
            if counter is not None:
                stack.enter_context(counter.counting("forward"))
                stack.enter_context(counter.keeping())
            out = layer(hidden_states=x, attention_mask=None, rotary_pos_emb=table)[0]
        tensors = {} if counter is None else counter.kept(but=[x, *parameters])
        # Transformer Engine frees some of them in its backward.
        kept = [(one.untyped_storage().nbytes(), [*one.shape]) for one in tensors.values()]
        del tensors
        grad = torch.ones_like(out)
        with contextlib.nullcontext() if counter is None else counter.counting("backward"):
            torch.autograd.grad(out, [x, *parameters], grad, allow_unused=True)
        return kept

    step(None)
    counter = counting.Counter()
    kept = step(counter)
    forward, backward = counter.totals["forward"], counter.totals["backward"]
    if listed:
        print(f"\n{shape.name}, {implementation}")
        for row in counter.launches:
            print(
                f"  {row.phase:8} {row.name:36} {row.kernels} {row.read + row.written:>9}", end=""
            )
            print(f"  {row.shapes}")
        for size, dimensions in kept:
            print(f"  kept     {size:>9}  {dimensions}")
    return Count(
        layer=shape.name,
        implementation=implementation,
        tokens=tokens,
        experts=sizes.experts if shape.mlp == "moe" else 0,
        forward_kernels=forward.kernels,
        backward_kernels=backward.kernels,
        forward_bytes=forward.read + forward.written,
        backward_bytes=backward.read + backward.written,
        gemm_flops=forward.gemm_flops + backward.gemm_flops,
        attention_flops=attention_flops(shape, sizes, tokens),
        kept_tensors=len(kept),
        kept_bytes=sum(size for size, _ in kept),
    )


def at_full_size(
    shape: Shape, sizes: Sizes, implementation: str, tokens: tuple[int, ...]
) -> list[Count]:
    """The counts with `tokens` and all experts, from those with few."""
    s, e = (64, 96), (sizes.chosen, sizes.chosen + 2)
    few: dict[tuple[int, int], Count] = {}
    for n in e if shape.mlp == "moe" else e[:1]:
        fewer = replace(sizes, experts=n)
        layer = build(shape, fewer, implementation)
        few |= {(t, n): count(layer, shape, fewer, implementation, t) for t in s}

    def line(name: str, t: int, n: int) -> int:
        def over_tokens(experts: int) -> int:
            first, second = (getattr(few[x, experts], name) for x in s)
            step, rest = divmod(second - first, s[1] - s[0])
            if rest:
                raise ValueError(f"{shape.name}, {implementation}: {name} is not linear in tokens")
            return first + step * (t - s[0])

        if shape.mlp != "moe":
            return over_tokens(e[0])
        first, second = map(over_tokens, e)
        step, rest = divmod(second - first, e[1] - e[0])
        if rest:
            raise ValueError(f"{shape.name}, {implementation}: {name} is not linear in experts")
        return first + step * (n - e[0])

    fewer = replace(sizes, experts=e[1] + 2)
    probe = count(build(shape, fewer, implementation), shape, fewer, implementation, 160)
    for name in LINEAR:
        expected = line(name, 160, e[1] + 2)
        if getattr(probe, name) != expected:
            raise ValueError(
                f"{shape.name}, {implementation}: {name} of 160 tokens: expected {expected} by "
                f"those of {s}, found {getattr(probe, name)}"
            )
    for name in CONSTANT:
        values = {getattr(found, name) for found in few.values()}
        if len(values) > 1:
            raise ValueError(f"{shape.name}, {implementation}: {name} varies: {values}")
    return [
        replace(
            probe,
            tokens=t,
            experts=sizes.experts if shape.mlp == "moe" else 0,
            attention_flops=attention_flops(shape, sizes, t),
            **{name: line(name, t, sizes.experts) for name in LINEAR},
        )
        for t in tokens
    ]


def floor_count(like: Count, shape: Shape, sizes: Sizes) -> Count:
    from layer_floor import floor

    forward, backward = floor(shape, sizes, like.tokens)
    return replace(
        like,
        implementation="floor",
        forward_kernels=0,
        backward_kernels=0,
        forward_bytes=forward,
        backward_bytes=backward,
        kept_tensors=0,
        kept_bytes=0,
    )


def implementations(shape: Shape) -> tuple[str, ...]:
    if shape.clamped:
        return ("ours",)
    gated = ("ours", f"ours{EXPANDED}", "stock", f"stock{GATE}")
    return (*gated, f"ours{FUSED}", f"stock{FUSED}") if shape.mlp == "moe" else gated


def seconds(found: Count) -> tuple[float, float]:
    """(of what is neither product nor attention, of all), predicted for an H100."""
    other = (found.forward_bytes + found.backward_bytes) / BANDWIDTH
    return other, other + (found.gemm_flops + found.attention_flops) / OPERATIONS


def row(found: Count) -> dict[str, Any]:
    import megatron.core
    import transformer_engine

    other, all_of_it = seconds(found)
    return vars(found) | {
        "predicted_ms": round(1e3 * all_of_it, 4),
        "predicted_share": round(other / all_of_it, 4),
        "torch": torch.__version__.split("+")[0],
        "megatron_core": megatron.core.__version__.split("+")[0],
        "transformer_engine": transformer_engine.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


def show(found: list[Count]) -> None:
    head = "layer, implementation, tokens: kernels, MB (forward + backward); kept: tensors, MB; "
    print(f"{head}predicted ms and share of it")
    for one in found:
        other, all_of_it = seconds(one)
        print(
            f"{one.layer:22} {one.implementation:20} {one.tokens:6}: "
            f"{one.forward_kernels:3} + {one.backward_kernels:3}, "
            f"{one.forward_bytes / 1e6:9.3f} + {one.backward_bytes / 1e6:9.3f}; "
            f"{one.kept_tensors:3}, {one.kept_bytes / 1e6:9.3f}; "
            f"{1e3 * all_of_it:8.3f}, {other / all_of_it:.3f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small layers of 32 tokens")
    parser.add_argument("--list", action="store_true", help="with --quick: print each kernel")
    parser.add_argument("--output", type=Path, help="write the rows to this file")
    options = parser.parse_args()
    layers.prepare()
    found: list[Count] = []
    if not options.quick:
        layers.without_products()
    for shape in SHAPES:
        for name in implementations(shape):
            if options.quick:
                layer = build(shape, SMALL, name)
                found.append(count(layer, shape, SMALL, name, 32, options.list))
            else:
                found += at_full_size(shape, PUBLISHED, name, TOKENS)
        sizes = SMALL if options.quick else PUBLISHED
        ours = [one for one in found if one.layer == shape.name and one.implementation == "ours"]
        found += [floor_count(one, shape, sizes) for one in ours]
    show(found)
    output = options.output or (None if options.quick else RESULTS)
    if output is not None:
        rows = [row(one) for one in found]
        with output.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
