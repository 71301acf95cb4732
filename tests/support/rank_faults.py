"""Faults that only some ranks of a layout have, for tests that must see them.

Each is put into all ranks before they build their models. In one process it would change nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

from step35_patch.config.layer_plan import LayerPlan
from step35_patch.model import layer
from step35_patch.model.attention import Step35SelfAttention
from step35_patch.model.swiglu import RoutedSwiGLU


def put_in(name: str) -> None:
    """Break this process by one of `FAULTS`."""
    FAULTS[name]()


def _plans(rank: Callable[[], int], wrong: Callable[[LayerPlan], dict[str, Any]]) -> None:
    """Other plans for the layers of the second rank of a group."""
    right = layer.layer_config

    def layer_config(config, runtime, plan):
        changes = wrong(plan) if rank() == 1 else {}
        return right(config, runtime, dataclasses.replace(plan, **changes))

    layer.layer_config = layer_config


def _wider_window() -> None:
    _plans(
        parallel_state.get_pipeline_model_parallel_rank,
        lambda plan: {"window_size": plan.window_size and (plan.window_size[0] + 1, 0)},
    )


def _no_clamp() -> None:
    right = RoutedSwiGLU.forward

    def wrong(self: RoutedSwiGLU, gate_up: torch.Tensor) -> Any:
        # The limit of one layer's experts.
        if self.limit == 0.2 and parallel_state.get_expert_model_parallel_rank() == 1:
            self = RoutedSwiGLU(None)
        return right(self, gate_up)

    RoutedSwiGLU.forward = wrong


def _unscaled_rope() -> None:
    _plans(
        parallel_state.get_context_parallel_rank,
        lambda plan: {"rope_scaling": None} if plan.index == 4 else {},
    )


def _gate_of_the_other_rank() -> None:
    right = Step35SelfAttention._apply_output_gate

    def wrong(self: Step35SelfAttention, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        if self.layer_number == 4:
            both = gather_from_tensor_model_parallel_region(gate).chunk(2, dim=-1)
            gate = both[1 - parallel_state.get_tensor_model_parallel_rank()]
        return right(self, x, gate)

    Step35SelfAttention._apply_output_gate = wrong


def _norm_of_its_own_tokens() -> None:
    """Its weight's gradient is not summed over the parts of a sequence (Transformer Engine)."""
    right = Step35SelfAttention.__init__

    def wrong(self, *args, **kwargs):
        right(self, *args, **kwargs)
        if self.layer_number == 4:
            self.linear_qkv.layer_norm_weight.sequence_parallel = False

    Step35SelfAttention.__init__ = wrong


FAULTS: dict[str, Callable[[], None]] = {
    "a window wider by one key on the second stage": _wider_window,
    "no clamp of the second rank's experts in one layer": _no_clamp,
    "no RoPE scaling on the second rank in one layer": _unscaled_rope,
    "the other rank's gate in one layer": _gate_of_the_other_rank,
    "an input norm of the rank's own tokens in one layer": _norm_of_its_own_tokens,
}
