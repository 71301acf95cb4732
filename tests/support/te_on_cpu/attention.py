"""What attention's own torch backend calls: softmax, and packed sequences to padded and back.

Shapes: t packed tokens; b sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch

from support.te_on_cpu.extension import kernel, refuse


def _softmax_kernel(name: str, mask_of: Callable[..., torch.Tensor | None]) -> None:
    """name_forward(input, [mask,] scale) and name_backward(grad, result, scale), fp16 or bf16."""

    def forward(input, *args):
        *mask, scale = args
        refuse(f"{name}_forward of {input.dtype}", input.dtype in (torch.float16, torch.bfloat16))
        scores = input.float() * scale
        masked = mask_of(input, *mask)
        if masked is not None:  # a row without any key gets zeros
            scores = scores.masked_fill(masked, float("-inf"))
            return scores.softmax(-1).masked_fill(masked.all(-1, keepdim=True), 0).to(input.dtype)
        return scores.softmax(-1).to(input.dtype)

    def backward(grad, result, scale):
        p = result.float()
        product = grad.float() * p
        return ((product - p * product.sum(-1, keepdim=True)) * scale).to(grad.dtype)

    forward.__name__, backward.__name__ = f"{name}_forward", f"{name}_backward"
    kernel(forward)
    kernel(backward)


def _causal(x: torch.Tensor, bottom_right: bool = False) -> torch.Tensor:
    shift = x.shape[-1] - x.shape[-2] if bottom_right else 0
    return torch.ones(x.shape[-2:], dtype=torch.bool).triu(1 + shift)


_softmax_kernel("scaled_softmax", lambda x: None)
_softmax_kernel("scaled_masked_softmax", lambda x, mask: mask.bool())
_softmax_kernel("scaled_upper_triang_masked_softmax", _causal)
_softmax_kernel("scaled_aligned_causal_masked_softmax", lambda x: _causal(x, bottom_right=True))


@kernel
def convert_thd_to_bshd(tensor, cu_seqlens, b, max_seq_len):
    out = tensor.new_zeros(b, max_seq_len, *tensor.shape[1:])
    bounds = cu_seqlens.tolist()
    for i, (start, end) in enumerate(pairwise(bounds)):
        out[i, : end - start] = tensor[start:end]
    return out


@kernel
def convert_bshd_to_thd(tensor, cu_seqlens, t):
    out = tensor.new_zeros(t, *tensor.shape[2:])
    bounds = cu_seqlens.tolist()
    for i, (start, end) in enumerate(pairwise(bounds)):
        out[start:end] = tensor[i, : end - start]
    return out
