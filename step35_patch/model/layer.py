"""Step35DecoderLayer: Megatron-Core's TransformerLayer with the numbers of its own layer.

The layer finds its absolute index, takes that index's LayerPlan, and gives everything that it
builds a copy of the model's config with the plan's values in it. The model's config is never
changed, and no two layers share a copy.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, Self

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from megatron.core.utils import get_pg_rank
from torch import Tensor

from step35_patch.config.layer_plan import LayerPlan
from step35_patch.model.communication import cp_comm_types
from step35_patch.model.description import LayerConfig, Step35Runtime, runtime_for
from step35_patch.model.experts import leave_tokens_in_place
from step35_patch.model.low_precision import low_precision_problems
from step35_patch.model.mtp import embedding_chunk_problems
from step35_patch.model.refused_options import Place, refused, without_effect

# Buffers that Megatron-Core's router makes in fp32: the bias, and the counts of tokens that move it
# (--moe-router-bias-update-rate), of which bf16 holds no more than the first 256 exactly.
_ROUTER_FP32 = ("expert_bias", "local_tokens_per_expert")


def check_options(config: TransformerConfig, runtime: Step35Runtime) -> None:
    """Raise ValueError listing every option that does not go with a Step-3.5 layer.

    Options that this Megatron-Core does not have cannot be set and are passed over.

    Args:
        config: of the model.
        runtime: what it describes.
    """
    lines = [
        f"{row.name}: expected {row.legal[0]!r}, found {found!r}; {row.reason}"
        for row, found in refused(config, Place.CONFIG)
    ]
    lines += [
        f"{name}: expected {expected}, found {found!r}"
        for name, expected, found in without_effect(config)
    ]
    if (
        config.virtual_pipeline_model_parallel_size is not None
        and config.pipeline_model_parallel_size == 2
        and not config.overlap_p2p_comm
    ):
        lines.append(
            "overlap_p2p_comm: expected True (and batch_p2p_comm=False) with a virtual pipeline of "
            "2 stages, found False; a batch of sends and receives between the same 2 ranks mixes "
            "them up. pretrain_gpt.py's arguments set both"
        )
    lines += embedding_chunk_problems(config)
    lines += map(str, low_precision_problems(config, runtime.config, runtime.gate_layout))
    groups = config.num_query_groups
    if groups % config.tensor_model_parallel_size:
        lines.append(
            f"tensor_model_parallel_size: expected a divisor of num_query_groups={groups}, "
            f"found {config.tensor_model_parallel_size}"
        )
    if lines:
        raise ValueError(
            "options that a Step-3.5 model cannot be built with (layer-dependent values come from "
            "the Step-3.5 config):\n  " + "\n  ".join(lines)
        )


def layer_config(config: TransformerConfig, runtime: Step35Runtime, plan: LayerPlan) -> LayerConfig:
    """A copy of the model's config for the layer of `plan`; `config` itself stays as it is.

    It is a shallow TransformerConfig: callables and process-wide objects in it are the model's own.
    """
    own: LayerConfig = copy.copy(config)
    own.step35 = runtime
    own.step35_layer = plan
    own.num_attention_heads = plan.num_attention_heads
    own.num_query_groups = plan.num_query_groups
    own.kv_channels = plan.kv_channels
    own.window_size = plan.window_size
    own.attention_output_gate = runtime.config.use_head_wise_attn_gate
    # Hands gate and up to `swiglu.ClampedSwiGLU`; without a limit the fused SwiGLU stays in use.
    limits = (plan.swiglu_limit if plan.is_moe else None, plan.swiglu_limit_shared)
    own.use_te_activation_func = any(limit is not None for limit in limits)
    if isinstance(config.cp_comm_type, list):
        own.cp_comm_type = cp_comm_types(config.cp_comm_type, runtime.config)[plan.index]
    return own


class Step35DecoderLayer(TransformerLayer):
    """One decoder or MTP layer of Step-3.5, built from its LayerPlan.

    Args:
        config: the model's TransformerConfig. It is a Step-3.5 config if it comes from
            `Step35ModelProvider` or if the active config (`step35_patch.activate`) has its shape.
        submodules: the spec's submodules, as `step35_patch.model.specs` makes them.
        layer_number: 1-based; within the pipeline stage for decoder layers, within the MTP
            layers for MTP layers, absolute with `add_layer_offset=False`.
        hidden_dropout, pg_collection, vp_stage, is_mtp_layer, add_layer_offset, pp_layer_offset,
            name: as in Megatron-Core's TransformerLayer.

    Attributes:
        plan: the layer's LayerPlan; `plan.index` is the absolute 0-based index, MTP layers
            counted after the decoder's whatever the pipeline size.

    Raises:
        ValueError: the config is no Step-3.5 config, or has options that don't go with it.
        IndexError: the layer's index is outside the config's layers.
    """

    config: LayerConfig

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules,
        layer_number: int = 1,
        hidden_dropout: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        vp_stage: int | None = None,
        is_mtp_layer: bool = False,
        add_layer_offset: bool = True,
        pp_layer_offset: int | None = None,
        name: str | None = None,
    ):
        runtime = runtime_for(config)
        if runtime is None:
            raise ValueError(
                "Step35DecoderLayer: the TransformerConfig is no Step-3.5 model; make it with "
                "Step35ModelProvider, or activate a config of its shape (step35_patch.activate, "
                "STEP35_CONFIG)"
            )
        check_options(config, runtime)
        if pg_collection is None:
            pg_collection = ProcessGroupCollection.use_mpu_process_groups()
        if is_mtp_layer:
            # Megatron-Core numbers MTP layers from 1 on whichever stage they are.
            index = runtime.config.num_hidden_layers + layer_number - 1
        elif not add_layer_offset:
            index = layer_number - 1
        else:
            stage = get_pg_rank(pg_collection.pp)
            index = layer_number - 1 + get_transformer_layer_offset(config, vp_stage, stage)
        self.plan = runtime.layer(index, is_mtp=is_mtp_layer)
        # Absent in releases whose TransformerLayer does not name its modules.
        named = {} if name is None else {"name": name}
        super().__init__(
            layer_config(config, runtime, self.plan),
            submodules,
            layer_number=layer_number,
            hidden_dropout=hidden_dropout,
            pg_collection=pg_collection,
            vp_stage=vp_stage,
            is_mtp_layer=is_mtp_layer,
            add_layer_offset=add_layer_offset,
            pp_layer_offset=pp_layer_offset,
            **named,
        )
        if not is_mtp_layer and self.layer_number != index + 1:
            raise RuntimeError(
                f"layer {index}: Megatron-Core numbers it {self.layer_number}, expected {index + 1}"
            )
        self._prepare_mlp(config, pg_collection)

    def _prepare_mlp(
        self, config: TransformerConfig, pg_collection: ProcessGroupCollection
    ) -> None:
        """Check that the MLP is of the plan's kind, and set what Megatron-Core leaves of experts'.

        Args:
            config: of the model.
            pg_collection: of the layer.

        Raises:
            ValueError: it is of the other kind.
        """
        if self.plan.is_moe != hasattr(self.mlp, "experts"):
            raise ValueError(
                f"layer {self.plan.index}: the config has "
                f"{'MoE' if self.plan.is_moe else 'a dense MLP'} there, the spec builds "
                f"{type(self.mlp).__name__}; check moe_layer_freq against moe_layers_enum"
            )
        if not self.plan.is_moe:
            return
        if config.expert_tensor_parallel_size > 1:
            # Megatron-Core before 0.19 does not say so of Transformer Engine's experts, and leaves
            # the other tensor-parallel ranks' out of the gradients' norm.
            for weight in self.mlp.experts.parameters():
                weight.tensor_model_parallel = True
        leave_tokens_in_place(self.mlp, pg_collection)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As torch's (of `bfloat16`, `to`, ...), but what the router has in fp32 stays in fp32.

        Megatron's Float16Module turns it to 16 bits with the rest. Its router turns the bias back
        in the first forward pass, when loaded values are rounded, and the counts never.
        """
        router: Any = getattr(self.mlp, "router", None)
        buffers = [(name, getattr(router, name, None)) for name in _ROUTER_FP32]
        super()._apply(fn, recurse)
        for name, buffer in buffers:
            if buffer is None:
                continue
            converted: Tensor = getattr(router, name)
            if converted.dtype in (torch.bfloat16, torch.float16):
                setattr(router, name, buffer.to(converted.device))
        return self
