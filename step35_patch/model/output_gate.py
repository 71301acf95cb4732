"""The head-wise output gate: each head of attention's output times the sigmoid of its logit.

On a GPU, where Megatron-Core's `jit_fuser` compiles the two functions below, it is one kernel in
each direction and a copy of the logits; nothing is kept for backward but what the gate is given.
torch would make eleven kernels of their operations, most of them over whole heads in fp32.

Shapes: s sequence, b batch, g query groups, r heads a group, d channels a head.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.jit import jit_fuser
from torch import Tensor


def _gated(heads: Tensor, logits: Tensor) -> Tensor:
    return (heads * torch.sigmoid(logits.float()).unsqueeze(-1)).to(heads.dtype)


def _gradients(grad: Tensor, heads: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    gate = torch.sigmoid(logits.float())
    wide = grad.float()
    by_gate = (wide * heads).sum(dim=-1)
    return (
        (wide * gate.unsqueeze(-1)).to(heads.dtype),
        (by_gate * gate * (1 - gate)).to(logits.dtype),
    )


_compiled_gated = jit_fuser(_gated)
_compiled_gradients = jit_fuser(_gradients)


class _HeadwiseGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, heads: Tensor, logits: Tensor) -> Tensor:
        ctx.save_for_backward(heads, logits)
        gated: Tensor = _compiled_gated(heads, logits)
        return gated

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gradients: tuple[Tensor, Tensor] = _compiled_gradients(grad, *ctx.saved_tensors)
        return gradients


def headwise_gate(attended: Tensor, logits: Tensor) -> Tensor:
    """Multiply each head by the sigmoid of its logit, computed in fp32.

    The formula is that of `Step3p7Attention` in transformers.

    Args:
        attended: [s, b, g * r * d], heads by group.
        logits: [s, b, g, r] or [s, b, g * r], of any strides.

    Returns:
        As `attended`, in its shape and dtype.
    """
    heads = attended.view(*logits.shape, -1)
    # A copy, and a small one: with a view, what it is a part of would be kept for backward.
    gated: Tensor = _HeadwiseGate.apply(heads, logits.contiguous())
    return gated.view(attended.shape)
