"""A GPTModel of a Step-3.5 TransformerConfig, built with Megatron-Core's own builders."""

from __future__ import annotations

from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from step35_patch import settings as process


def build_gpt_model(
    config: TransformerConfig,
    *,
    vocab_size: int,
    max_sequence_length: int,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    parallel_output: bool = True,
    fp16_lm_cross_entropy: bool = False,
) -> GPTModel:
    """This process's part of the model, with Megatron-Core's initialised groups.

    Args:
        config: of a Step-3.5 model.
        vocab_size: rows of the embedding and the output matrices, with what pads them.
        max_sequence_length: as in the Hugging Face config.
        pre_process: with the embedding (first pipeline stage).
        post_process: with the output layer (last pipeline stage).
        vp_stage: the model chunk under virtual pipeline parallelism.
        parallel_output: leave the logits split by vocabulary over the tensor-parallel ranks.
        fp16_lm_cross_entropy: compute the loss in fp16.

    Raises:
        RuntimeError: step35_patch was deactivated.
    """
    if not process.enabled():
        raise RuntimeError(
            "step35_patch is not active: without its hooks the MTP layers would share one "
            "output matrix; call step35_patch.activate() first"
        )
    use_te = config.transformer_impl == "transformer_engine"
    # By the module, whose functions the hooks are around.
    spec = gpt_layer_specs.get_gpt_decoder_block_spec(
        config, use_transformer_engine=use_te, normalization="RMSNorm", vp_stage=vp_stage
    )
    mtp_spec = None
    if config.mtp_num_layers:
        mtp_spec = gpt_layer_specs.get_gpt_mtp_block_spec(
            config, spec, use_transformer_engine=use_te, vp_stage=vp_stage
        )
    return GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=vocab_size,
        max_sequence_length=max_sequence_length,
        pre_process=pre_process,
        post_process=post_process,
        fp16_lm_cross_entropy=fp16_lm_cross_entropy,
        parallel_output=parallel_output,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        mtp_block_spec=mtp_spec,
        vp_stage=vp_stage,
    )
