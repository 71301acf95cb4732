"""Zero-centred RMSNorm for Megatron-Core's local path.

Megatron-Core's own local norm refuses a zero-centred gamma and sequence parallelism. With
Transformer Engine, TENorm does both and this module is not used.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


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
        gamma = 1.0 + self.weight.float()
        return torch.nn.functional.rms_norm(x.float(), gamma.shape, gamma, self.eps).to(x.dtype)

    def extra_repr(self) -> str:
        """What torch prints between the module's brackets."""
        return f"{tuple(self.weight.shape)}, eps={self.eps}"
