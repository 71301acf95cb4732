"""Options of Megatron-Core that a Step-3.5 model cannot be built with, and why: one table.

Each would compute something else than Step-3.5 does, skip the layer's own RoPE, window, gate or
clamp without a word, or do nothing. What a training run may change is in
`step35_patch.model.named_options`; docs/options.md has all options. Four places read the table:
the arguments (`step35_patch.patch.arguments`), the TransformerConfig of the provider and of each
layer (`step35_patch.model.layer`), the core attention on torch
(`step35_patch.model.core_attention`), and the optimizer (`step35_patch.model.muon`). No torch is
needed.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Flag, auto
from typing import Any

from step35_patch.config.problem import Problem


class Place(Flag):
    """Where an option is refused."""

    ARGUMENT = auto()  # on the command line
    CONFIG = auto()  # in the TransformerConfig of a layer
    TORCH_ATTENTION = auto()  # in that of `Step35DotProductAttention`, whatever layer it is in
    OPTIMIZER = auto()  # in the OptimizerConfig of the optimizer that trains the model


BOTH = Place.ARGUMENT | Place.CONFIG


@dataclass(frozen=True, slots=True)
class RefusedOption:
    """An option with its legal values.

    Attributes:
        name: The field of TransformerConfig or OptimizerConfig, which is also the attribute of the
            parsed arguments and, with dashes, the option. One that a Megatron-Core lacks cannot be
            set.
        legal: Its legal values, first the one to have.
        reason: Why others are refused, in a few words.
        places: Where it is refused: not on the command line if there is no such argument, not in
            the TransformerConfig if it is no field there, or one that other code answers for.
    """

    name: str
    legal: tuple[object, ...]
    reason: str
    places: Place = BOTH

    @property
    def option(self) -> str:
        """On the command line."""
        return f"--{self.name.replace('_', '-')}"

    def allows(self, found: object) -> bool:
        """Whether a value is legal; a list is if it has entries and all of them are."""
        if isinstance(found, list):
            return bool(found) and all(entry in self.legal for entry in found)
        return found in self.legal


_BY_LAYER = "layers of Step-3.5 differ and take this from the config"
_OWN_ROPE = "it would bypass the layers' own RoPE"
_OWN_LAYERS = "it would build other layers than Step-3.5's"
_CUDA_GRAPHS = "the layers are not tested with CUDA graphs"
_OWN_CLAMPS = "each layer has its own clamps, after the activation"
_LARGEST_SCORE = "Step-3.5 layers do not record the largest score"
_INPUT_DTYPE = "attention runs in the dtype of its inputs"
_ALL_EXPERTS = "Step-3.5 chooses among all of its experts"
_SWIGLU = "Step-3.5's activation is SwiGLU"
_ONE_WEIGHT = "the published layout has no name for the experts' one weight"

_ARGUMENT, _CONFIG, _TORCH = Place.ARGUMENT, Place.CONFIG, Place.TORCH_ATTENTION
_OPTIMIZER = Place.ARGUMENT | Place.OPTIMIZER

REFUSED_OPTIONS: tuple[RefusedOption, ...] = (
    RefusedOption("use_rope_scaling", (False,), _BY_LAYER, _ARGUMENT),
    RefusedOption("rotary_seq_len_interpolation_factor", (None,), _BY_LAYER, _ARGUMENT),
    RefusedOption("rotary_interleaved", (False,), "Step-3.5 rotates halves, not pairs"),
    RefusedOption("no_rope_freq", (None,), "every layer has RoPE"),
    RefusedOption("window_size", (None,), _BY_LAYER),
    RefusedOption("window_attn_skip_freq", (None,), _BY_LAYER),
    # The layer sets the field itself.
    RefusedOption("attention_output_gate", (False,), _BY_LAYER, _ARGUMENT),
    RefusedOption("softmax_scale", (None,), "scores are scaled by 1 / sqrt(head_dim)", _CONFIG),
    RefusedOption("softmax_type", ("vanilla",), "Step-3.5 has no attention sink", BOTH | _TORCH),
    RefusedOption("qk_l2_norm", (False,), "q and k have RMSNorm's weights"),
    RefusedOption("qk_clip", (False,), _LARGEST_SCORE, BOTH | _TORCH),
    RefusedOption("activation_func_clamp_value", (None,), _OWN_CLAMPS),
    RefusedOption("glu_linear_offset", (0.0,), "Step-3.5's SwiGLU has none"),
    RefusedOption("openai_gelu", (False,), _SWIGLU, _ARGUMENT),
    RefusedOption("quick_geglu", (False,), _SWIGLU, _ARGUMENT),
    RefusedOption("squared_relu", (False,), _SWIGLU, _ARGUMENT),
    RefusedOption("multi_latent_attention", (False,), _OWN_LAYERS),
    RefusedOption("experimental_attention_variant", (None,), _OWN_LAYERS),
    RefusedOption("heterogeneous_layers_config_path", (None,), _OWN_LAYERS, _ARGUMENT),
    RefusedOption("heterogeneous_layers_config_encoded_json", (None,), _OWN_LAYERS, _ARGUMENT),
    # What the two arguments before it set.
    RefusedOption("heterogeneous_block_specs", (False,), _OWN_LAYERS, _CONFIG),
    RefusedOption("spec", (None,), _OWN_LAYERS, _ARGUMENT),
    RefusedOption("use_legacy_models", (False,), _OWN_LAYERS, _ARGUMENT),
    RefusedOption("is_hybrid_model", (False,), _OWN_LAYERS),
    RefusedOption("hybrid_layer_pattern", (None,), _OWN_LAYERS, _ARGUMENT),
    RefusedOption("hybrid_override_pattern", (None,), _OWN_LAYERS, _ARGUMENT),
    RefusedOption("mtp_hybrid_override_pattern", (None,), _OWN_LAYERS),
    RefusedOption("use_inference_optimized_layers", (False,), _OWN_LAYERS, _CONFIG),
    RefusedOption("inference_fuse_tp_communication", (False,), _OWN_LAYERS),
    RefusedOption("moe_use_upcycling", (False,), _OWN_LAYERS, _ARGUMENT),
    RefusedOption(
        "freeze_all_layers",
        (False,),
        "Megatron-Core's model builder ignores it and every weight would be trained",
        _ARGUMENT,
    ),
    RefusedOption("flash_decode", (False,), _OWN_ROPE),
    RefusedOption(
        "inference_dynamic_batching",
        (False,),
        "Step-3.5 generates with Megatron-Core's static context only",
        _ARGUMENT,
    ),
    RefusedOption(
        "perform_rl_step",
        (False,),
        "its rollouts generate with a dynamic context, which Step-3.5's layers do not know "
        "(docs/frameworks.md has trainers whose rollouts are made elsewhere)",
        _ARGUMENT,
    ),
    RefusedOption("cuda_graph_impl", ("none", None), _CUDA_GRAPHS),
    RefusedOption("external_cuda_graph", (False,), _CUDA_GRAPHS),
    RefusedOption("enable_cuda_graph", (False,), _CUDA_GRAPHS),
    RefusedOption("moe_pad_experts_for_cuda_graph_inference", (False,), _CUDA_GRAPHS),
    RefusedOption("use_kitchen", (False,), _OWN_LAYERS, _CONFIG),
    RefusedOption(
        "use_transformer_engine_op_fuser", (False,), "it would bypass the layers' own clamps"
    ),
    RefusedOption("fused_single_qkv_rope", (False,), "it does not know the gate", _CONFIG),
    RefusedOption("mtp_use_repeated_layer", (False,), "each MTP layer has its own weights"),
    # In the TransformerConfig it is one of `megatron_fields.FIELDS`.
    RefusedOption("moe_shared_expert_gate", (False,), "Step-3.5 has no such gate", _ARGUMENT),
    RefusedOption("moe_router_num_groups", (None,), _ALL_EXPERTS),
    RefusedOption("moe_router_group_topk", (None,), _ALL_EXPERTS),
    RefusedOption("moe_router_topk_limited_devices", (None,), _ALL_EXPERTS, _CONFIG),
    RefusedOption("moe_router_pre_softmax", (False,), "Step-3.5's router takes sigmoids"),
    # The auxiliary losses are a choice (`step35_patch.model.named_options`).
    RefusedOption(
        "moe_router_load_balancing_type",
        ("none", "aux_loss", "seq_aux_loss", "global_aux_loss"),
        "it would choose the experts in another way",
    ),
    RefusedOption("moe_single_grouped_weight", (False,), _ONE_WEIGHT),
    RefusedOption("moe_single_grouped_bias", (False,), _ONE_WEIGHT),
    RefusedOption(
        "use_grouped_gemm_for_dense_mlp", (False,), "it would leave out the dense layers' clamp"
    ),
    RefusedOption("moe_latent_size", (None,), "Step-3.5's experts have the hidden size"),
    RefusedOption(
        "moe_apply_probs_on_input", (False,), "Step-3.5 weights what comes out of its experts"
    ),
    RefusedOption("moe_mlp_glu_interleave_size", (None,), "gate and up are not interleaved"),
    RefusedOption(
        "moe_shared_expert_glu_interleave_size", (None,), "gate and up are not interleaved"
    ),
    RefusedOption(
        "use_grouped_gemm_for_shared_expert",
        (False,),
        "it would leave out the shared expert's clamp",
    ),
    RefusedOption(
        "mtp_detach_heads",
        (False,),
        "it hands the MTP losses the model's one output matrix, and Step-3.5 has one for each",
    ),
    RefusedOption("fp32_residual_connection", (False,), "Step-3.5 adds in the layers' dtype"),
    RefusedOption(
        "apply_residual_connection_post_layernorm",
        (False,),
        "the residual is taken before the norm",
    ),
    RefusedOption(
        "cross_entropy_fusion_impl",
        ("native", "te"),
        "another one may not see the logits, and so neither their padded columns nor the MTP "
        "layers' own matrices",
    ),
    RefusedOption("use_mup", (False,), "it scales layers by their width, and Step-3.5 does not"),
    RefusedOption(
        "optimizer",
        ("adam", "sgd", "lion", "muon", "dist_muon"),
        "another one goes by Megatron-Core's merged weights as if each were one matrix",
        _OPTIMIZER,
    ),
    # On the command line it is --muon-no-split-qkv.
    RefusedOption(
        "muon_split_qkv",
        (True,),
        "q, k, v and g are published apart, and each has an update of its own",
        _OPTIMIZER,
    ),
    # It changes no result, but would have no effect.
    RefusedOption(
        "apply_query_key_layer_scaling",
        (False,),
        "scores are scaled and summed in fp32 here",
        _TORCH,
    ),
    RefusedOption("log_max_attention_logit", (False,), _LARGEST_SCORE, _TORCH),
    RefusedOption("fp8_dot_product_attention", (False,), _INPUT_DTYPE, _TORCH),
    RefusedOption("fp8_multi_head_attention", (False,), _INPUT_DTYPE, _TORCH),
)


def missing_for(optimizer: str) -> Problem | None:
    """What a kind of optimizer needs and is not installed, with how to get it; or None.

    Args:
        optimizer: `OptimizerConfig.optimizer`, or --optimizer.
    """
    if "muon" not in optimizer or importlib.util.find_spec("emerging_optimizers") is not None:
        return None
    return Problem(
        "optimizer",
        f"the package emerging-optimizers with {optimizer}, which needs it",
        "it is not installed",
        "pip install 'step35-patch[muon]' (or pip install emerging-optimizers)",
    )


def without_effect(settings: Any) -> Iterator[tuple[str, str, object]]:
    """Each option that is set, and would do nothing because of another one.

    Args:
        settings: A TransformerConfig, or the parsed arguments.

    Yields:
        The option's name, what it needs, and its value.
    """
    balancing = settings.moe_router_load_balancing_type
    coefficient = settings.moe_aux_loss_coeff
    if coefficient not in (0, [0.0]) and balancing in ("none", ["none"]):
        yield (
            "moe_aux_loss_coeff",
            "0 with moe_router_load_balancing_type none, which it needs to be aux_loss, "
            "seq_aux_loss or global_aux_loss",
            coefficient,
        )
    if settings.transformer_impl == "local":
        for name in ("fp8", "fp4"):
            if (found := getattr(settings, name)) is not None:
                yield (
                    name,
                    "None with transformer_impl local, which computes in params_dtype",
                    found,
                )


def refused(settings: Any, place: Place) -> Iterator[tuple[RefusedOption, object]]:
    """Each option that is set to another value than a legal one, and that value.

    Args:
        settings: A TransformerConfig, or for `Place.ARGUMENT` the parsed arguments.
        place: Which of the two, and for which of their readers.
    """
    for row in REFUSED_OPTIONS:
        if place in row.places:
            found = getattr(settings, row.name, row.legal[0])
            if not row.allows(found):
                yield row, found
