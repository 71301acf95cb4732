"""SwiGLU clamped after the activation, with the limit of its layer and its place.

Megatron-Core's `activation_func_clamp_value` clamps before silu, has one value for all places, and
its fused path ignores it. But every one of its MLPs (dense, shared expert, each kind of routed
experts) hands the whole gate-and-up tensor to `MLPSubmodules.activation_func` when the config
says `use_te_activation_func`; so the clamp is such an activation module, in all places the same.

Forward and backward are functions that Megatron-Core's `jit_fuser` compiles into a kernel each on a
GPU, as its own SwiGLU's are. torch would make six kernels forward and fifteen backward of the
operations, for routed experts, and keep six times their output instead of two. In 16 bits, a
compiled kernel rounds nothing in between: what is within a rounding of the limit may be taken for
above it or not.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.jit import jit_fuser
from torch import Tensor

from step35_patch.model.description import LayerConfig


def _swiglu(gate_up: Tensor, limit: float | None) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    gate = torch.nn.functional.silu(gate)
    if limit is not None:
        gate = gate.clamp(max=limit)
        up = up.clamp(min=-limit, max=limit)
    return gate * up


def _weighted(gate_up: Tensor, limit: float | None, weights: Tensor) -> Tensor:
    return (_swiglu(gate_up, limit) * weights).to(gate_up.dtype)


def _gradient(grad: Tensor, gate_up: Tensor, limit: float | None) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    activated = torch.nn.functional.silu(gate)
    if limit is None:
        by_gate, by_up = grad * up, grad * activated
    else:
        # As torch's clamp has it, a value on the limit, which bf16 often meets, passes none on.
        by_gate = (grad * up.clamp(min=-limit, max=limit)).masked_fill(activated >= limit, 0)
        by_up = (grad * activated.clamp(max=limit)).masked_fill(up.abs() >= limit, 0)
    return torch.cat([torch.ops.aten.silu_backward(by_gate, gate), by_up], dim=-1)


def _weighted_gradients(
    grad: Tensor, gate_up: Tensor, limit: float | None, weights: Tensor
) -> tuple[Tensor, Tensor]:
    # In the dtype that the product with the weights has: fp32, if they are.
    wide = grad.to(torch.promote_types(gate_up.dtype, weights.dtype))
    by_weights = (wide * _swiglu(gate_up, limit)).sum(dim=-1, keepdim=True)
    by_swiglu = (wide * weights).to(gate_up.dtype)
    return _gradient(by_swiglu, gate_up, limit), by_weights.to(weights.dtype)


_compiled_swiglu, _compiled_weighted = jit_fuser(_swiglu), jit_fuser(_weighted)
_compiled_gradient = jit_fuser(_gradient)
_compiled_weighted_gradients = jit_fuser(_weighted_gradients)


def weighted_swiglu(gate_up: Tensor, limit: float | None, weights: Tensor) -> Tensor:
    """SwiGLU times weights, outside of autograd.

    Args:
        gate_up: [m, 2 * n], gate before up.
        limit: of the clamps, or None.
        weights: [m, 1], in gate_up's dtype or a wider one.

    Returns:
        [m, n] in gate_up's dtype.
    """
    weighted: Tensor = _compiled_weighted(gate_up, limit, weights)
    return weighted


def weighted_swiglu_gradients(
    grad: Tensor, gate_up: Tensor, limit: float | None, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of gate_up and of weights, given that of `weighted_swiglu`'s result."""
    gradients: tuple[Tensor, Tensor] = _compiled_weighted_gradients(grad, gate_up, limit, weights)
    return gradients


class _SwiGLU(torch.autograd.Function):
    """Keeps its input alone, as Megatron-Core's fused SwiGLU does."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, limit: float | None) -> Tensor:
        ctx.save_for_backward(gate_up)
        ctx.limit = limit
        out: Tensor = _compiled_swiglu(gate_up, limit)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _compiled_gradient(grad, *ctx.saved_tensors, ctx.limit), None


class _WeightedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, limit: float | None, weights: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up, weights)
        ctx.limit = limit
        return weighted_swiglu(gate_up, limit, weights)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, Tensor]:
        gate_up, weights = ctx.saved_tensors
        by_input, by_weights = weighted_swiglu_gradients(grad, gate_up, ctx.limit, weights)
        return by_input, None, by_weights


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
        out: Tensor = _SwiGLU.apply(gate_up, self.limit)
        return out

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


class _BeforeWeights:
    """What a routed expert's activation gives: its output, once it is multiplied by the weights.

    Megatron-Core's next step, in each of its experts, is that multiplication by the router's
    probabilities, in their dtype and back. Done here it is part of the same kernel, and the
    output without weights is neither written nor kept.
    """

    def __init__(self, gate_up: Tensor, limit: float | None):
        self._gate_up, self._limit = gate_up, limit
        self.dtype = gate_up.dtype

    def __mul__(self, weights: Tensor) -> Tensor:
        """weights: [..., 1]; returns [..., n] in the dtype of the activation's input."""
        out: Tensor = _WeightedSwiGLU.apply(self._gate_up, self._limit, weights)
        return out


class RoutedSwiGLU(ClampedSwiGLU):
    """ClampedSwiGLU of routed experts, which Megatron-Core multiplies by probabilities."""

    def forward(self, gate_up: Tensor) -> Any:
        """gate_up: [..., 2 * n]; the result is no tensor: multiply it by [..., 1] to get one."""
        return _BeforeWeights(gate_up, self.limit)


def routed_swiglu(*, config: LayerConfig) -> RoutedSwiGLU:
    """The activation of a layer's routed experts (`swiglu_limits`)."""
    return RoutedSwiGLU(config.step35_layer.swiglu_limit)


def shared_swiglu(*, config: LayerConfig) -> ClampedSwiGLU:
    """The activation of a layer's shared expert or dense MLP (`swiglu_limits_shared`)."""
    return ClampedSwiGLU(config.step35_layer.swiglu_limit_shared)
