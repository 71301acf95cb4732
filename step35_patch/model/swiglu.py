"""SwiGLU clamped after the activation, with the limit of its layer and its place.

Megatron-Core's `activation_func_clamp_value` clamps before silu, has one value for all places, and
its fused path ignores it. But every one of its MLPs (dense, shared expert, each kind of routed
experts) hands the whole gate-and-up tensor to `MLPSubmodules.activation_func` when the config
says `use_te_activation_func`; so the clamp is such an activation module, in all places the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from step35_patch.model.description import LayerConfig


class ClampedSwiGLU(torch.nn.Module):
    """silu(gate).clamp(max=L) * up.clamp(-L, L); without a limit, silu(gate) * up.

    The formula is that of `Step3p7MLP` and `Step3p7Experts` in transformers.

    Args:
        limit: L, or None for no clamp.
    """

    def __init__(self, limit: float | None):
        super().__init__()
        self.limit = limit

    def forward(self, gate_up: Tensor) -> Tensor:
        """gate_up: [..., 2 * n], gate before up; returns [..., n] in the same dtype."""
        gate, up = gate_up.chunk(2, dim=-1)
        gate = torch.nn.functional.silu(gate)
        if self.limit is not None:
            gate = gate.clamp(max=self.limit)
            up = up.clamp(min=-self.limit, max=self.limit)
        return gate * up

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Nothing to save; Megatron-Core 0.17 asks every module of an MLP for it."""
        return {}

    def extra_repr(self) -> str:
        """What torch prints between the module's brackets."""
        return f"limit={self.limit}"


def routed_swiglu(*, config: LayerConfig) -> ClampedSwiGLU:
    """The activation of a layer's routed experts (`swiglu_limits`)."""
    return ClampedSwiGLU(config.step35_layer.swiglu_limit)


def shared_swiglu(*, config: LayerConfig) -> ClampedSwiGLU:
    """The activation of a layer's shared expert or dense MLP (`swiglu_limits_shared`)."""
    return ClampedSwiGLU(config.step35_layer.swiglu_limit_shared)
