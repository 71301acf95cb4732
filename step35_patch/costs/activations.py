"""What a rank keeps of a micro-batch's forward pass for its backward, in bytes.

In the manner of table 2 of Korthikanti et al. 2022 (arXiv 2205.05198) with each layer's own shapes,
by what the modules save: Transformer Engine's with fused attention, or those of the local
implementation on a CPU. Routed tokens are taken to be even over the ranks and experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

from step35_patch.config.layer_plan import LayerPlan
from step35_patch.config.model import Step35Config
from step35_patch.costs.launch import DTYPE_BYTES, Launch, Stage, layer_plans
from step35_patch.tensors.qkv_layout import QkvLayout

# Bytes of an index, of a number in fp32, and of a bool.
_INDEX, _FP32, _BOOL = 8, 4, 1

# What Megatron-Core's selective recomputation drops of a layer, by the name in recompute_modules.
# The names on the right are those of `layer_parts`.
_DROPPED_BY = {
    "core_attn": ("core_attention",),
    "layernorm": ("norm_outputs",),
    "mlp": ("mlp",),
    "moe": ("router", "shared_experts", "expert_inputs", "expert_gate_up", "expert_activations"),
    "shared_experts": ("shared_experts",),
    "moe_act": ("expert_activations",),
}

RECOMPUTED_MODULES = tuple(_DROPPED_BY)

_OF_PIPELINE: dict[str, Any] = {
    "world_size": 1,
    "global_batch_size": 1,
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "pipeline_model_parallel_layout": None,
}


class Kept(NamedTuple):
    """Bytes of one micro-batch on one stage.

    Attributes:
        forward: What is kept from the forward pass on.
        peak: The most that it has at a time, in its own forward or backward pass.
    """

    forward: float
    peak: float


class _Step(NamedTuple):
    """One layer, group of layers or loss, as backward meets it.

    Attributes:
        kept: Bytes from its forward pass on.
        again: Bytes of what backward computes once more.
        passing: Bytes that are there for a moment: gradients of activations, logits.
    """

    kept: float
    again: float = 0.0
    passing: float = 0.0


def layer_parts(config: Step35Config, plan: LayerPlan, launch: Launch) -> dict[str, float]:
    """Bytes that a rank keeps of one layer for a micro-batch, by part, without recomputation.

    Args:
        config: The model.
        plan: The layer; of an MTP layer, what stands around it is under "mtp".
        launch: The layout, the precision and the implementation.

    Returns:
        Of a dense layer "input", "norm_outputs", "attention", "core_attention", "mlp_input" and
        "mlp"; of a MoE layer "router", "shared_experts", "expert_inputs", "expert_gate_up" and
        "expert_activations" in place of the last.
    """
    sizes = _Sizes.of(config, launch)
    # A norm keeps its input, and a number in fp32 a token.
    parts = {"input": sizes.hidden + sizes.statistics, "mlp_input": sizes.hidden + sizes.statistics}
    # Transformer Engine has the norms in linear_qkv and in a dense linear_fc1.
    inside = 0.0 if sizes.local else sizes.hidden
    parts["norm_outputs"] = sizes.hidden * (2 if sizes.local else int(plan.is_moe))
    parts |= _attention(plan, launch, sizes)
    parts["attention"] += inside
    if plan.is_moe:
        parts |= _moe(config, plan, launch, sizes)
    else:
        widths = _widths(plan.swiglu_limit_shared, launch)
        parts["mlp"] = sizes.split * config.intermediate_size * widths + inside
    if plan.is_mtp:
        # Inputs of both norms, of eh_proj, which is twice as wide, and of the last norm.
        parts["mtp"] = 5 * sizes.hidden + 3 * sizes.statistics
    return parts


class _Sizes(NamedTuple):
    """Bytes of a micro-batch's tokens on a rank.

    Attributes:
        local: Whether the implementation is the local one.
        tokens: Tokens of the micro-batch on a context-parallel rank.
        hidden: Of the hidden states between the layers.
        statistics: Of a number in fp32 for each of them.
        split: Of one feature that tensor parallelism divides.
        routed: Tokens that a rank routes.
    """

    local: bool
    tokens: int
    hidden: float
    statistics: float
    split: float
    routed: float

    @classmethod
    def of(cls, config: Step35Config, launch: Launch) -> _Sizes:
        tokens, size = launch.tokens_of_microbatch, DTYPE_BYTES[launch.precision]
        tensor = launch.tensor_model_parallel_size
        routed = tokens / (tensor if launch.sequence_parallel else 1)
        return cls(
            local=launch.transformer_impl == "local",
            tokens=tokens,
            hidden=routed * config.hidden_size * size,
            statistics=routed * _FP32,
            split=tokens * size / tensor,
            routed=routed,
        )


def _attention(plan: LayerPlan, launch: Launch, sizes: _Sizes) -> dict[str, float]:
    heads, groups = plan.num_attention_heads, plan.num_query_groups
    queries, keys = heads * plan.kv_channels, groups * plan.kv_channels
    in_fp32 = sizes.tokens * _FP32 / launch.tensor_model_parallel_size
    # Inputs of the norms of q and k, rotated q and k, attention's output, and that times the gate.
    around = sizes.split * (4 * queries + 2 * keys) + in_fp32 * (heads + groups)
    around += sizes.split * heads  # the gate's logits
    inside = in_fp32 * heads  # of the softmax
    if sizes.local:
        # Views of linear_qkv's output, which stays whole: values, and keys before their norm.
        around += sizes.split * (_projected(plan, launch) - keys)
        if plan.window_size is not None and plan.window_size[0] + 1 < launch.seq_length:
            inside += sizes.split * 2 * queries  # queries in blocks, and their outputs
    else:
        around += sizes.split * keys
    return {"attention": around, "core_attention": inside}


def _projected(plan: LayerPlan, launch: Launch) -> int:
    """Rows of linear_qkv."""
    return QkvLayout.of(plan, launch.gate_layout).rows


def _widths(limit: float | None, launch: Launch) -> int:
    """How many times its width a SwiGLU MLP keeps: its two inputs and its output.

    Without a clamp SwiGLU is Megatron-Core's own, which keeps two results more if it is not fused:
    silu(gate), and up plus an offset.
    """
    return 3 if limit is not None or launch.bias_swiglu_fusion else 5


def _moe(config: Step35Config, plan: LayerPlan, launch: Launch, sizes: _Sizes) -> dict[str, float]:
    experts, chosen = config.moe_num_experts or 0, config.moe_top_k or 0
    copies, size = sizes.routed * chosen, DTYPE_BYTES[launch.precision]
    width = (config.moe_intermediate_size or 0) * size
    parts = {
        # Scores, indices and weights of the chosen, their sum; the map of tokens to experts.
        "router": sizes.routed * (experts * (2 * _FP32 + _BOOL) + _FP32)
        + copies * (2 * _INDEX + _FP32),
        "shared_experts": sizes.split
        * (config.share_expert_dim or 0)
        * _widths(plan.swiglu_limit_shared, launch),
        # gate and up, and the weight of each copy of a token.
        "expert_gate_up": copies * (2 * width + _FP32),
    }
    alone = launch.expert_model_parallel_size == launch.expert_tensor_parallel_size == 1
    if sizes.local and alone:
        # `step35_patch.model.experts` reads tokens in place.
        return parts | {"expert_inputs": copies * _INDEX, "expert_activations": 0.0}
    fused = plan.swiglu_limit is not None or launch.bias_swiglu_fusion
    # Each rank of an expert-tensor-parallel group gathers all tokens of the group.
    gathered = launch.expert_tensor_parallel_size * config.hidden_size * size
    return parts | {
        "expert_inputs": copies * gathered,
        # Megatron-Core's own, if it is not fused: silu(gate), up and their product besides.
        "expert_activations": copies * width * (1 if fused else 4),
    }


def stage_bytes(config: Step35Config, launch: Launch, stage: Stage) -> Kept:
    """What a rank keeps of one micro-batch on one stage, under the launch's recomputation."""
    forward = peak = 0.0
    for step in _steps(config, launch, stage):
        # What comes after it has been freed when backward meets it.
        forward += step.kept
        peak = max(peak, forward + step.again + step.passing)
    return Kept(forward, peak)


def _steps(config: Step35Config, launch: Launch, stage: Stage) -> Iterator[_Step]:
    """In the order of the forward pass."""
    # Without what a layer does not depend on, so that those that are known are found again.
    launch = replace(launch, **_OF_PIPELINE)
    sizes = _Sizes.of(config, launch)
    yield from _layers(config, launch, stage.decoder_layers)
    if launch.num_layers - 1 in stage.decoder_layers:
        yield _Step(sizes.hidden + sizes.statistics)  # the final norm's input
    if stage.mtp_layers:
        yield from _mtp_layers(config, launch, stage.mtp_layers)
    if stage.output:
        yield _loss(launch, sizes)


def _loss(launch: Launch, sizes: _Sizes) -> _Step:
    """The output matrices and what follows them."""
    logits = sizes.tokens * launch.padded_vocab_size / launch.tensor_model_parallel_size
    size = DTYPE_BYTES[launch.precision]
    # The matrices' inputs; of each loss its softmax in fp32. Logits, or their gradient, pass.
    of_loss, passing = logits * _FP32, logits * size
    if launch.cross_entropy_loss_fusion and launch.cross_entropy_fusion_impl == "te":
        # The logits are kept, and the gradient is written over them.
        of_loss, passing = logits * size, 0.0
    return _Step((1 + launch.mtp_num_layers) * (sizes.hidden + of_loss), passing=passing)


def _layers(config: Step35Config, launch: Launch, layers: tuple[int, ...]) -> Iterator[_Step]:
    """The decoder's."""
    steps = [_layer(config, launch, index) for index in layers]
    if launch.recompute_granularity != "full":
        yield from steps
        return
    hidden, group = _Sizes.of(config, launch).hidden, launch.recompute_num_layers or 1
    uniform = launch.recompute_method == "uniform"
    # Of each group of layers, its input; of "block", of each of a chunk's first layers.
    groups = [steps[i : i + group] for i in range(0, len(steps), group)] if uniform else []
    groups = groups or [[step] for step in steps[:group]]
    for members in groups:
        again = sum(step.kept for step in members) - hidden
        yield _Step(hidden, again, max(step.passing for step in members))
    if not uniform:
        yield from steps[group:]


def _mtp_layers(config: Step35Config, launch: Launch, layers: tuple[int, ...]) -> Iterator[_Step]:
    sizes = _Sizes.of(config, launch)
    for index in layers:
        step = _layer(config, launch, index)
        # "block" leaves MTP layers alone.
        if launch.recompute_granularity == "full" and launch.recompute_method == "uniform":
            # The states before it and the next tokens' embeddings; its last norm is outside.
            kept = 3 * sizes.hidden + sizes.statistics
            step = _Step(kept, step.kept - kept, step.passing)
        yield step


@lru_cache(maxsize=4096)
def _layer(config: Step35Config, launch: Launch, index: int) -> _Step:
    """A layer without full recomputation."""
    plan, sizes = layer_plans(config, launch.window)[index], _Sizes.of(config, launch)
    parts = layer_parts(config, plan, launch)
    again = sum(parts[name] for name in _dropped(launch, parts))
    kept = sum(parts.values()) - again + _kept_by_core_attn(plan, launch, sizes)
    # While the FFN runs backward: gradients of gate and up, and on a CPU, where SwiGLU is several
    # operations, their parts; or of the tokens' copies, as they come back from their experts.
    passing = sizes.hidden
    if not plan.is_moe:
        passing += (5 if sizes.local else 2) * sizes.split * config.intermediate_size
    else:
        passing += max(sizes.hidden, parts["expert_inputs"])
    return _Step(kept, again, passing)


def _kept_by_core_attn(plan: LayerPlan, launch: Launch, sizes: _Sizes) -> float:
    """What recomputation of core attention keeps more: values are a view of linear_qkv's output.

    Transformer Engine copies them, and lets go of the rest; the local implementation keeps it
    anyway.
    """
    if sizes.local or "core_attn" not in launch.recompute_modules:
        return 0.0
    return sizes.split * (_projected(plan, launch) - plan.num_query_groups * plan.kv_channels)


def _dropped(launch: Launch, parts: dict[str, float]) -> set[str]:
    """The parts of a layer that selective recomputation drops."""
    return {
        name for module in launch.recompute_modules for name in _DROPPED_BY[module] if name in parts
    }
