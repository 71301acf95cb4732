"""Zero-centred RMSNorm for Megatron-Core's local path.

Megatron-Core's own local norm refuses a zero-centred gamma and sequence parallelism. With
Transformer Engine, TENorm does both and this module is not used.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.autograd.function import once_differentiable


class Step35RMSNorm(torch.nn.Module):
    """y = x / sqrt(mean(x**2) + eps) * (1 + w), computed in fp32 and returned in x's dtype.

    The formula is that of `Step3p7RMSNorm` in transformers; it is used for the input and
    post-attention norms, q and k norms, the final norm and the three norms of an MTP layer.

    Args:
        config: the model's or the layer's config; `layernorm_zero_centered_gamma` must be set.
        hidden_size: size of the last dimension of x.
        eps: epsilon under the root.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5):
        super().__init__()
        if config.normalization != "RMSNorm" or not config.layernorm_zero_centered_gamma:
            raise ValueError(
                "Step-3.5 norms: expected normalization='RMSNorm' and "
                "layernorm_zero_centered_gamma=True, found "
                f"{config.normalization!r} and {config.layernorm_zero_centered_gamma}; "
                "pass --normalization RMSNorm --apply-layernorm-1p"
            )
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.zeros(hidden_size, dtype=config.params_dtype))
        # Megatron-Core sums the gradients of so marked parameters over the tensor-parallel ranks,
        # each of which sees its own part of the sequence.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., hidden_size], any floating dtype; returns the same shape and dtype."""
        if x.is_cpu:
            normed: Tensor = _RMSNorm.apply(x, self.weight, self.eps)
            return normed
        gamma = 1.0 + self.weight.float()
        return torch.nn.functional.rms_norm(x.float(), gamma.shape, gamma, self.eps).to(x.dtype)

    def extra_repr(self) -> str:
        """What torch prints between the module's brackets."""
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


class _RMSNorm(torch.autograd.Function):
    """The norm on a CPU, where torch's is made of operations that each keep what they need.

    Kept for backward are x, which is there anyway, and one number a row. On CUDA torch has a kernel
    that does the same.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        scale = norm.square_().div_(x.size(-1)).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        normed: Tensor = (wide * scale).mul_(1.0 + weight.float()).to(x.dtype)
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        # With n = x * scale the normed row and d = gamma * grad its gradient, x has the gradient
        # scale * (d - n * mean(d * n)). Products of grad and x serve both mean and weight.
        x, weight, scale = ctx.saved_tensors
        gamma = 1.0 + weight.float()
        wide_x, wide = x.float(), grad.float()
        products = (wide * wide_x).reshape(-1, x.size(-1))
        mean = (products @ gamma).view_as(scale).mul_(scale.pow(3)).div_(-x.size(-1))
        grad_x = (wide * gamma).mul_(scale).addcmul_(wide_x, mean)
        grad_weight = scale.reshape(1, -1) @ products
        return grad_x.to(x.dtype), grad_weight.view_as(weight).to(weight.dtype), None
