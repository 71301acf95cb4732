"""The package's experimental HybridModel in place of its GPTModel, for the tests' comparisons."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
from megatron.core.transformer.transformer_block import get_num_layers_to_build

from step35_patch import Step35ModelProvider
from step35_patch.checkpoint import load_hf_weights
from step35_patch.model.experimental_hybrid import Step35HybridModel, hybrid_pattern
from support.implementation import IMPLEMENTATION, ON_TRANSFORMER_ENGINE
from support.ours import initialize_megatron


def build(hf_dir: Path, **overrides: Any) -> Step35HybridModel:
    """As `support.ours.build`: in this process, with the weights of a folder."""
    initialize_megatron()
    MTPLossLoggingHelper.tracker.clear()
    options = {
        "transformer_impl": IMPLEMENTATION,
        "moe_grouped_gemm": ON_TRANSFORMER_ENGINE,
        "use_cpu_initialization": True,
    }
    provider = Step35ModelProvider.from_hf(hf_dir, **(options | overrides))
    (model,) = chunks_of(provider)
    load_hf_weights(model, hf_dir)
    return model


def chunks_of(provider: Step35ModelProvider) -> list[torch.nn.Module]:
    """As `support.distributed_worker.chunks_of`: this rank's chunks, the layers where it has them.

    The provider then says no more where layers are, which is the pattern's to say.
    """
    virtual = provider.virtual_pipeline_model_parallel_size
    chunks = range(virtual) if virtual else [None]
    ranks = range(provider.pipeline_model_parallel_size)
    if layout := provider.pipeline_model_parallel_layout:
        at = [layout.layout[rank][chunk or 0] for chunk in chunks for rank in ranks]
        stages = [held.count(LayerType.decoder) for held in at]
    else:
        stages = [get_num_layers_to_build(provider, chunk, r) for chunk in chunks for r in ranks]
    provider.num_layers_in_first_pipeline_stage = None
    provider.num_layers_in_last_pipeline_stage = None
    provider.pipeline_model_parallel_layout = None
    config, tensor = provider.step35.config, provider.tensor_model_parallel_size
    pattern = hybrid_pattern(config, provider.mtp_num_layers or 0, stages)
    built: list[torch.nn.Module] = []
    for stage in chunks:
        at = {"ignore_virtual": False, "vp_stage": stage}
        built.append(
            Step35HybridModel(
                provider,
                vocab_size=-(-provider.vocab_size // tensor) * tensor,
                max_sequence_length=provider.max_position_embeddings,
                hybrid_layer_pattern=pattern,
                pre_process=parallel_state.is_pipeline_first_stage(**at),
                post_process=parallel_state.is_pipeline_last_stage(**at),
                vp_stage=stage,
                parallel_output=provider.parallel_output,
            )
        )
        built[-1].model_type = built[0].model_type
    return built
