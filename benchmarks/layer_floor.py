"""The fewest bytes that a layer can read and write outside of matrix products and attention.

Counted by hand: each tensor that one product or attention hands to the next is written once and
read once, with everything between them in one kernel, bf16, statistics and probabilities in fp32.
Left out: the norms' weights, which do not grow with the tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from layers import SLIDING, Shape, Sizes

BF16, FP32 = 2, 4


@dataclass(frozen=True)
class Row:
    """Bytes a token."""

    what: str
    forward: int
    backward: int


def rows(shape: Shape, sizes: Sizes, gate: bool = True) -> list[Row]:
    """Of one layer; the numbers are tensors read and written, times their size."""
    heads = sizes.sliding_heads if shape.attention == SLIDING else sizes.heads
    hidden = BF16 * sizes.hidden
    queries, keys = (BF16 * n * sizes.channels for n in (heads, sizes.groups))
    angles = FP32 * int(sizes.channels * (1.0 if shape.attention == SLIDING else 0.5))
    logits = BF16 * heads
    found = [
        # x -> normed; dnormed, x, the gradient that goes around -> dx
        Row("norm before attention", 2 * hidden + FP32, 4 * hidden + FP32),
        # q, k -> q, k; dq, dk, q, k -> dq, dk
        Row(
            "norm and RoPE of q and k",
            2 * (queries + keys) + angles + FP32 * (heads + sizes.groups),
            3 * (queries + keys) + angles + FP32 * (heads + sizes.groups),
        ),
        # projected, residual -> sum, normed; its backward is that of the norm
        Row("residual, norm before the MLP", 4 * hidden + FP32, 4 * hidden + FP32),
        Row("residual", 3 * hidden, 0),
    ]
    if gate:
        # attended, logits -> gated; dgated, attended, logits -> dattended, dlogits
        found.append(Row("gate", 2 * queries + logits, 3 * queries + 2 * logits))
    if shape.mlp == "dense":
        inner = BF16 * sizes.dense
        return [*found, Row("SwiGLU", 3 * inner, 5 * inner)]
    inner, chosen = BF16 * sizes.expert, sizes.chosen
    scores, picked = FP32 * sizes.experts, (FP32 + 4) * chosen
    return [
        *found,
        # logits -> probabilities and experts of the chosen
        # scores again, dprobabilities -> dlogits
        Row("router", scores + picked, 2 * scores + picked + FP32 * chosen),
        Row("tokens to experts", (1 + chosen) * hidden + picked, (1 + chosen) * hidden + picked),
        Row(
            "SwiGLU of routed experts",
            chosen * (3 * inner + FP32),
            chosen * (5 * inner + 2 * FP32),
        ),
        Row("SwiGLU of the shared expert", 3 * inner, 5 * inner),
        # with the shared expert's output, which joins the residual
        Row("tokens from experts", (1 + chosen) * hidden + hidden, (1 + chosen) * hidden),
        # the norm's output has three uses, whose gradients meet
        Row("gradients of the MoE's input", 0, 2 * hidden),
    ]


def floor(shape: Shape, sizes: Sizes, tokens: int, gate: bool = True) -> tuple[int, int]:
    """Bytes, (forward, backward)."""
    found = rows(shape, sizes, gate)
    return tokens * sum(r.forward for r in found), tokens * sum(r.backward for r in found)
