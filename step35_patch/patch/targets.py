"""What this package stands on in Megatron-Core, and in which versions that was tested. Data only.

The functions that are wrapped with the parameters that the wrappers bind by name, the fields of
TransformerConfig that layers read, and the fields by which a Megatron-Core would do by itself what
is patched here. All of it is held against the Megatron-Core that is there when it is imported
(`step35_patch.patch.contract`), whatever version it says that it is.

Read at every interpreter's start, so that a target is a named tuple, which loads nothing.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

# Versions of Megatron-Core that this package's tests run with; any other one is refused unless
# STEP35_ALLOW_UNTESTED=1 (a PEP 440 specifier).
TESTED = ">=0.17,<0.20"


# What stands around a target: wrapt's (wrapped, instance, args, kwargs). It answers for `wrapped`,
# whose result is whatever Megatron's function returns.
Hook = Callable[[Callable[..., Any], Any, tuple[Any, ...], dict[str, Any]], Any]


class Target(NamedTuple):
    """A callable of Megatron's that is wrapped.

    Attributes:
        module: The module whose import brings it.
        attribute: Its name there; a method as "Class.method".
        wrapper: The function of `step35_patch.patch.hooks` (a `Hook`) that wraps it.
        required: Whether a Megatron-Core without it is refused; else it is reported as missing.
        parameters: Those of its parameters that the wrapper cannot do without.
        reports: Whether all that it decides is what Megatron prints.
    """

    module: str
    attribute: str
    wrapper: str
    required: bool = True
    parameters: tuple[str, ...] = ()
    reports: bool = False


_GPT_LAYER_SPECS = "megatron.core.models.gpt.gpt_layer_specs"
_GPT_MODEL = "megatron.core.models.gpt.gpt_model"

TARGETS = (
    # Whatever hands out layer specs for a config. The single-layer builders see none; what they
    # return is exchanged by the MTP builder and by GPTModel, the two places that it can go to.
    *(
        Target(_GPT_LAYER_SPECS, name, wrapper=name, parameters=("config", *more))
        for name, more in (
            ("get_gpt_decoder_block_spec", ()),
            ("get_gpt_decoder_layer_specs", ()),
            ("get_gpt_mtp_block_spec_for_backend", ("spec", "backend")),
        )
    ),
    # The built model: its check, and the MTP layers' own output matrices.
    Target(
        _GPT_MODEL,
        "GPTModel.__init__",
        wrapper="gpt_model_init",
        parameters=(
            *("config", "transformer_layer_spec", "position_embedding_type", "mtp_block_spec"),
            *("pre_process", "post_process", "vocab_size", "share_embeddings_and_output_weights"),
        ),
    ),
    Target(
        _GPT_MODEL,
        "process_mtp_loss",
        wrapper="process_mtp_loss",
        parameters=("output_layer", "config", "runtime_gather_output", "packed_seq_params"),
    ),
    # Which builds Step-3.5 of Megatron-Core's own layers, where it is given its config.
    Target(
        "megatron.core.models.hybrid.hybrid_model",
        "HybridModel.__init__",
        wrapper="hybrid_model_init",
        required=False,
        parameters=("config",),
    ),
    # Whether an MTP layer's projection is one for inference: 0.20 asks it of all, and without
    # Transformer Engine looks for classes that are none.
    Target(
        "megatron.core.tensor_parallel.inference_layers",
        "is_inference_column_parallel_linear",
        wrapper="is_inference_column_parallel_linear",
        required=False,
    ),
    # Checkpoints of the other implementation. `load` is copied to where it is called from.
    Target(_GPT_MODEL, "GPTModel.sharded_state_dict", wrapper="gpt_model_sharded_state_dict"),
    Target(
        "megatron.core.dist_checkpointing.serialization",
        "load",
        wrapper="load_sharded",
        parameters=("sharded_state_dict", "checkpoint_dir"),
    ),
    # Generation with what knows no layers of different kinds.
    Target(
        "megatron.core.inference.contexts.dynamic_context",
        "DynamicInferenceContext.__init__",
        wrapper="dynamic_context_init",
        parameters=("model_config",),
    ),
    # The optimizer: Muon, by published matrix. 0.17 makes it by a function of its own.
    Target(
        "megatron.core.optimizer",
        "get_megatron_optimizer",
        wrapper="get_megatron_optimizer",
        parameters=("config", "model_chunks"),
    ),
    Target(
        "megatron.core.optimizer.muon",
        "get_megatron_muon_optimizer",
        wrapper="get_megatron_muon_optimizer",
        required=False,
    ),
    # Weight decay, which --step35-decay-1d extends to what has one dimension.
    Target(
        "megatron.training.training",
        "get_megatron_optimizer_config",
        wrapper="get_megatron_optimizer_config",
        parameters=("args",),
    ),
    # 0.18 moved its definition to megatron.training.argument_utils; this name is in all versions.
    Target(
        "megatron.training.arguments",
        "core_transformer_config_from_args",
        wrapper="core_transformer_config_from_args",
    ),
    Target(
        "megatron.training.arguments",
        "parse_args",
        wrapper="parse_args",
        parameters=("extra_args_provider",),
    ),
    # Packed documents: what a data set makes of them, which ranks read it, and how a batch is dealt
    # out. 0.17 has a function of its own for packed ones, and tells not all tensor-parallel ranks
    # of the documents.
    Target(
        "megatron.training.datasets.sft_dataset", "SFTDataset.__getitem__", wrapper="sft_sample"
    ),
    Target(
        "megatron.core.tokenizers.text.libraries.sft_tokenizer",
        "SFTTokenizer.__init__",
        wrapper="sft_tokenizer_init",
    ),
    Target("megatron.core.datasets.gpt_dataset", "GPTDataset.__getitem__", wrapper="gpt_sample"),
    Target(
        "megatron.core.datasets.blended_megatron_dataset_builder",
        "BlendedMegatronDatasetBuilder.__init__",
        wrapper="dataset_builder_init",
        parameters=("config", "is_built_on_rank"),
    ),
    Target(
        "megatron.core.utils",
        "get_batch_on_this_cp_rank",
        wrapper="get_batch_on_this_cp_rank",
        parameters=("batch",),
    ),
    *(
        Target(module, name, wrapper=name, required=False)
        for module, name in (
            ("megatron.core.utils", "get_thd_batch_on_this_cp_rank"),
            ("megatron.training.utils", "get_batch_on_this_tp_rank"),
        )
    ),
    # What Megatron prints of operations and memory.
    Target(
        "megatron.training.training",
        "num_floating_point_operations",
        wrapper="num_floating_point_operations",
        parameters=("args", "batch_size"),
        reports=True,
    ),
    *(
        Target(
            "megatron.training.theoretical_memory_usage",
            name,
            wrapper=name,
            parameters=("args",),
            reports=True,
        )
        for name in (
            "compute_weight_and_optimizer_memory",
            "compute_activation_memory",
            "compute_activation_memory_without_sp",
        )
    ),
    # What it logs of the experts' balance: 0.17 by the function, later ones by the class, and the
    # function calls it.
    Target(
        "megatron.core.transformer.moe.moe_utils",
        "track_moe_metrics",
        wrapper="moe_metrics",
        reports=True,
    ),
    Target(
        "megatron.core.transformer.moe.moe_logging",
        "MoEMetricsTracker.report",
        wrapper="moe_metrics",
        required=False,
        reports=True,
    ),
    Target("megatron.training.initialize", "initialize_megatron", wrapper="initialize_megatron"),
    Target(
        "megatron.training.checkpointing",
        "_load_base_checkpoint",
        wrapper="load_base_checkpoint",
        parameters=("args",),
    ),
    # Megatron-Bridge's loop, which has functions of its own for these.
    Target(
        "megatron.bridge.training.initialize",
        "initialize_megatron",
        wrapper="bridge_initialize_megatron",
        required=False,
    ),
    Target(
        "megatron.bridge.training.checkpointing",
        "_load_base_checkpoint",
        wrapper="bridge_load_base_checkpoint",
        required=False,
    ),
    # Megatron-Bridge's folder of adapters, by names and in an order that PEFT does not read.
    Target(
        "megatron.bridge.models.conversion.auto_bridge",
        "AutoBridge.save_hf_adapter",
        wrapper="bridge_save_hf_adapter",
        required=False,
    ),
    # Megatron-Bridge's own Step-3.5, which a released Megatron-Core computes wrong.
    Target(
        "megatron.bridge.models.stepfun.step35_bridge",
        "Step35Bridge.provider_bridge",
        wrapper="bridges_own_provider",
        required=False,
    ),
)

# The module with targets by whose import the TransformerConfig is there.
SEES_CONFIG = _GPT_LAYER_SPECS
# Fields of TransformerConfig without which layers are not built, or not as they should be.
CONFIG_FIELDS = (
    *("apply_rope_fusion", "attention_dropout", "attention_output_gate", "context_parallel_size"),
    *("cp_comm_type", "expert_model_parallel_size", "expert_tensor_parallel_size", "hidden_size"),
    *("kv_channels", "layernorm_zero_centered_gamma", "moe_router_bias_update_rate"),
    *("moe_token_dispatcher_type", "mtp_num_layers", "normalization", "num_attention_heads"),
    *("num_layers", "num_query_groups", "params_dtype", "pipeline_model_parallel_layout"),
    *("pipeline_model_parallel_size", "sequence_parallel", "tensor_model_parallel_size"),
    *("transformer_impl", "use_te_activation_func", "virtual_pipeline_model_parallel_size"),
    *("window_attn_skip_freq", "window_size"),
)
# Fields by which a Megatron-Core has by itself what is patched here, and what that is.
NATIVE_FIELDS = {
    "rotary_base_per_layer": "RoPE bases by layer",
    "head_wise_attn_gate": "a head-wise attention gate",
}
