"""Routed experts of a process that has them all: tokens are neither permuted nor kept permuted.

Megatron-Core's token dispatchers bring each token to its experts: they copy it once for each, and
bring the results back. `SequentialMLP` then runs one expert after the other and keeps, of every
copy, the input, SwiGLU's parts and the weighted result. Where neither expert nor expert-tensor
parallelism moves tokens between processes, one function does it all here: an expert reads its
tokens where they are and adds its results where they belong, and of a copy `linear_fc1`'s output
alone is kept.

Parameters, their names and their checkpoints are Megatron-Core's. Whatever these steps don't know
(`_NEEDS_MEGATRONS_STEPS`, hooks on an expert's layers) goes through Megatron-Core's own.

Shapes: t = tokens, h = hidden size, E = experts, n = intermediate size of an expert, m = copies of
tokens, the router's top-k for each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.token_dispatcher import MoEAllGatherTokenDispatcher
from torch import Tensor
from torch.autograd.function import once_differentiable

from step35_patch.model.adapters import base_of, of_modelopt
from step35_patch.model.description import LayerConfig
from step35_patch.model.swiglu import weighted_swiglu, weighted_swiglu_gradients

# Options of TransformerConfig with which Megatron-Core's dispatcher, experts or linear layers do
# more than is done here, unless they are None, False or "none". Some releases lack some of them.
_NEEDS_MEGATRONS_STEPS = (
    "moe_apply_probs_on_input",
    "moe_expert_capacity_factor",
    "moe_latent_size",
    "moe_pad_expert_input_to_capacity",
    "moe_permute_fusion",
    "moe_shared_expert_overlap",
    "add_bias_linear",
    "enable_autocast",
    "gradient_accumulation_fusion",
    "delay_wgrad_compute",
    "overlap_moe_expert_parallel_comm",
    "overlap_dispatch_backward_with_experts_wgrad",
    "fine_grained_activation_offloading",
    "cuda_graph_impl",
    "fp8",
    "fp4",
)


class WholeTokenDispatcher(MoEAllGatherTokenDispatcher):
    """Hands `Step35SequentialMLP` the tokens as they are, with the routing map instead of counts.

    Of Megatron-Core's dispatcher for one process, which gathers nothing then, its two permutations
    are left out.
    """

    def __init__(self, experts: Step35SequentialMLP, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.experts = experts
        self._permutes = False

    def dispatch_postprocess(
        self, hidden_states: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What the experts get: tokens [t, h], the routing map bool [t, E], and its weights."""
        self._permutes = self.experts.is_watched()
        if self._permutes:
            permuted: tuple[Tensor, Tensor, Tensor] = super().dispatch_postprocess(
                hidden_states, probs
            )
            return permuted
        return hidden_states, self.routing_map, probs

    def combine_preprocess(self, hidden_states: Tensor) -> Tensor:
        """hidden_states: what the experts return, [t, h]."""
        if self._permutes:
            hidden_states = super().combine_preprocess(hidden_states)
        return hidden_states


class Step35SequentialMLP(SequentialMLP):
    """Megatron-Core's SequentialMLP, which also takes tokens that are not permuted."""

    config: LayerConfig

    def forward(
        self, tokens: Tensor, routing: Tensor, probs: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """The experts' output and no bias.

        Args:
            tokens: permuted as by Megatron-Core's dispatchers; or [t, h].
            routing: integer [E], the tokens of each expert; or bool [t, E], True where an expert
                is to see a token.
            probs: the weight of each permuted token; or [t, E].

        Returns:
            The weighted output of each permuted token; or [t, h], summed over a token's experts.
        """
        if routing.dtype != torch.bool:
            output: tuple[Tensor, Tensor | None] = super().forward(tokens, routing, probs)
            return output
        weights = [
            weight
            for expert in self.local_experts
            for weight in (expert.linear_fc1.weight, expert.linear_fc2.weight)
        ]
        limit = self.config.step35_layer.swiglu_limit
        return routed_experts(tokens, routing, probs, weights, limit), None

    def is_watched(self) -> bool:
        """Whether an expert's layers must be called, which `routed_experts` doesn't do.

        Hooks wait for it: Megatron's DistributedDataParallel has some where it gathers parameters
        as they are needed (--overlap-param-gather). Or there are adapters around the layers, which
        may have a dropout.
        """
        return any(
            base_of(layer) is not layer or of_modelopt(layer)
            for expert in self.local_experts
            for layer in (expert.linear_fc1, expert.linear_fc2)
        ) or any(
            hooks
            for module in self.local_experts.modules()
            for hooks in (
                module._forward_pre_hooks,
                module._forward_hooks,
                module._backward_pre_hooks,
                module._backward_hooks,
            )
        )


def leave_tokens_in_place(moe_layer: Any, groups: ProcessGroupCollection) -> None:
    """Let a MoELayer's experts read tokens where they are, if this process has them whole.

    Args:
        moe_layer: Megatron-Core's MoELayer.
        groups: its process groups, `ep` and `expt_tp` among them.
    """
    experts, config = moe_layer.experts, moe_layer.config
    if (
        not isinstance(experts, Step35SequentialMLP)
        or groups.ep.size() > 1
        or groups.expt_tp.size() > 1
        or config.moe_token_dispatcher_type not in ("allgather", "alltoall")
        or any(
            getattr(config, name, None) not in (None, False, "none")
            for name in _NEEDS_MEGATRONS_STEPS
        )
        or any(
            type(expert.linear_fc1) is not ColumnParallelLinear
            or type(expert.linear_fc2) is not RowParallelLinear
            for expert in experts.local_experts
        )
    ):
        return
    moe_layer.token_dispatcher = WholeTokenDispatcher(
        experts,
        moe_layer.num_local_experts,
        moe_layer.local_expert_indices,
        config=config,
        pg_collection=groups,
    )


def routed_experts(
    tokens: Tensor,
    routing: Tensor,
    probs: Tensor,
    weights: Sequence[Tensor],
    limit: float | None,
) -> Tensor:
    """The weighted sum, for each token, of its experts' outputs.

    An expert is fc2(silu(gate) * up) with gate and up from fc1, clamped as by
    `step35_patch.model.swiglu.ClampedSwiGLU` (`Step3p7Experts` in transformers).

    Args:
        tokens: [t, h], floating point.
        routing: bool [t, E].
        probs: [t, E], read where routing is True; the only gradients that aren't 0 are there.
        weights: of each expert fc1 [2 * n, h], gate before up, and fc2 [h, n], in tokens' dtype.
        limit: of the clamps, or None.

    Returns:
        [t, h] in tokens' dtype.
    """
    output: Tensor = _RoutedExperts.apply(tokens, routing, probs, limit, *weights)
    return output


class _RoutedExperts(torch.autograd.Function):
    """Kept for backward are the tokens, which the router keeps as well, and fc1's outputs."""

    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        routing: Tensor,
        probs: Tensor,
        limit: float | None,
        *weights: Tensor,
    ) -> Tensor:
        # By expert, and within one by token.
        expert_of, token_of = routing.t().nonzero(as_tuple=True)
        counts = routing.sum(0).tolist()
        share = probs[token_of, expert_of]
        projected = tokens.new_empty(token_of.numel(), weights[0].size(0))
        output = torch.zeros_like(tokens)
        for number, own in _slices(counts):
            fc1, fc2 = weights[2 * number : 2 * number + 2]
            where = token_of[own]
            torch.mm(tokens.index_select(0, where), fc1.t(), out=projected[own])
            weighted = weighted_swiglu(projected[own], limit, share[own, None])
            output.index_add_(0, where, weighted @ fc2.t())
        ctx.save_for_backward(tokens, projected, share, expert_of, token_of, *weights)
        ctx.counts, ctx.limit, ctx.shape = counts, limit, probs.shape
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tokens, projected, share, expert_of, token_of, *weights = ctx.saved_tensors
        grad_tokens = torch.zeros_like(tokens)
        grad_share = torch.empty_like(share)
        grad_weights: list[Tensor | None] = []
        for number, own in _slices(ctx.counts):
            fc1, fc2 = weights[2 * number : 2 * number + 2]
            needs_fc1, needs_fc2 = ctx.needs_input_grad[4 + 2 * number : 6 + 2 * number]
            where, swiglu = token_of[own], (projected[own], ctx.limit, share[own, None])
            grad_output = grad.index_select(0, where)
            grad_projected, by_share = weighted_swiglu_gradients(grad_output @ fc2, *swiglu)
            grad_share[own] = by_share[:, 0]
            grad_fc1 = grad_fc2 = None
            if needs_fc2:
                grad_fc2 = grad_output.t() @ weighted_swiglu(*swiglu)
            if needs_fc1:
                grad_fc1 = grad_projected.t() @ tokens.index_select(0, where)
            grad_weights += [grad_fc1, grad_fc2]
            grad_tokens.index_add_(0, where, grad_projected @ fc1)
        grad_probs = share.new_zeros(ctx.shape)
        grad_probs[token_of, expert_of] = grad_share
        return grad_tokens, None, grad_probs, None, *grad_weights


def _slices(counts: list[int]) -> Iterator[tuple[int, slice]]:
    """Each expert's number, and where its copies of tokens stand among all."""
    start = 0
    for number, count in enumerate(counts):
        yield number, slice(start, start + count)
        start += count
