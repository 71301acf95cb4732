"""What a Step-3.5 config decides, under each name that it has: one table, read in both directions.

A row of `FIELDS` names the Hugging Face config's field, Megatron-Core's field and Megatron's
command-line option for one and the same thing. From it are made the TransformerConfig fields of a
config (`model_fields`), the options of a launch script (`step35_patch.arguments`), the fields of
`Step35ModelProvider`, and the config that such fields describe (`hf_fields`). No torch is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from step35_patch.config.model import Step35Config


@dataclass(frozen=True, kw_only=True, slots=True)
class Field:
    """One thing that a config decides.

    Attributes:
        hf: The Hugging Face config's field, or None for what all Step-3.5 models have in common.
        megatron: The field of TransformerConfig, or None without one.
        option: The option of Megatron's parser, or None without one, or where another implies it.
        value: What all Step-3.5 models have, for a row without `hf`.
        to_megatron: From the config to Megatron's value, where that is not the `hf` field as it
            stands. A value of None is Megatron's for "none of these": it has no option.
        to_hf: The inverse: from an object with Megatron's fields to the value of `hf`.
        of_moe: Only models with MoE layers have it.
        of_provider: `megatron` is a field that Step35ModelProvider adds to TransformerConfig's.
        is_default: A user may choose otherwise.
    """

    hf: str | None = None
    megatron: str | None = None
    option: str | None = None
    value: object = None
    to_megatron: Callable[[Step35Config], object] | None = None
    to_hf: Callable[[Any], object] | None = None
    of_moe: bool = False
    of_provider: bool = False
    is_default: bool = False

    def megatron_value(self, config: Step35Config) -> object:
        """Megatron's value for a config."""
        if self.to_megatron is not None:
            return self.to_megatron(config)
        return self.value if self.hf is None else getattr(config, self.hf)


def _moe_layer_freq(config: Step35Config) -> list[int]:
    return [int(plan.is_moe) for plan in config.layers if not plan.is_mtp]


def _num_experts(config: Step35Config) -> int | None:
    return config.moe_num_experts if any(_moe_layer_freq(config)) else None


def _moe_layers_enum(megatron: Any) -> list[int]:
    frequency = megatron.moe_layer_freq
    return [
        layer
        for layer in range(megatron.num_layers)
        if (layer % frequency == 0 if isinstance(frequency, int) else frequency[layer])
    ]


def _sliding_attention_setting(config: Step35Config) -> dict[str, int] | None:
    window = config.sliding_window
    return None if window is None else {"sliding_window": window}


def _silu(config: Step35Config) -> object:
    from torch.nn.functional import silu

    return silu


# In the order of the options.
FIELDS: tuple[Field, ...] = (
    Field(hf="num_hidden_layers", megatron="num_layers", option="--num-layers"),
    Field(hf="hidden_size", megatron="hidden_size", option="--hidden-size"),
    Field(hf="intermediate_size", megatron="ffn_hidden_size", option="--ffn-hidden-size"),
    Field(hf="num_attention_heads", megatron="num_attention_heads", option="--num-attention-heads"),
    Field(option="--group-query-attention", value=True),
    Field(hf="num_attention_groups", megatron="num_query_groups", option="--num-query-groups"),
    Field(hf="head_dim", megatron="kv_channels", option="--kv-channels"),
    Field(megatron="qk_layernorm", option="--qk-layernorm", value=True),
    Field(megatron="normalization", option="--normalization", value="RMSNorm"),
    Field(hf="rms_norm_eps", megatron="layernorm_epsilon", option="--norm-epsilon"),
    # Zero-centred: the weight is the offset from 1.
    Field(megatron="layernorm_zero_centered_gamma", option="--apply-layernorm-1p", value=True),
    Field(option="--position-embedding-type", value="rope"),
    Field(
        hf="max_position_embeddings",
        megatron="max_position_embeddings",
        option="--max-position-embeddings",
        of_provider=True,
        is_default=True,
    ),
    Field(megatron="gated_linear_unit", option="--swiglu", value=True),
    Field(megatron="activation_func", to_megatron=_silu),  # by --swiglu
    Field(megatron="add_bias_linear", option="--disable-bias-linear", value=False),
    Field(megatron="add_qkv_bias", value=False),
    # Megatron's default is 0.1, for attention too.
    Field(megatron="hidden_dropout", option="--hidden-dropout", value=0.0, is_default=True),
    Field(megatron="attention_dropout", option="--attention-dropout", value=0.0, is_default=True),
    Field(option="--untie-embeddings-and-output-weights", value=True),
    # For tokenizers that ask for it (NullTokenizer).
    Field(
        hf="vocab_size",
        megatron="vocab_size",
        option="--vocab-size",
        of_provider=True,
        is_default=True,
    ),
    Field(hf="vocab_size", option="--padded-vocab-size", is_default=True),
    Field(
        hf="moe_num_experts",
        megatron="num_moe_experts",
        option="--num-experts",
        to_megatron=_num_experts,
    ),
    Field(
        hf="moe_layers_enum",
        megatron="moe_layer_freq",
        option="--moe-layer-freq",
        to_megatron=_moe_layer_freq,
        to_hf=_moe_layers_enum,
        of_moe=True,
    ),
    Field(
        hf="moe_intermediate_size",
        megatron="moe_ffn_hidden_size",
        option="--moe-ffn-hidden-size",
        of_moe=True,
    ),
    Field(
        hf="share_expert_dim",
        megatron="moe_shared_expert_intermediate_size",
        option="--moe-shared-expert-intermediate-size",
        of_moe=True,
    ),
    Field(hf="moe_top_k", megatron="moe_router_topk", option="--moe-router-topk", of_moe=True),
    Field(
        megatron="moe_router_score_function",
        option="--moe-router-score-function",
        value="sigmoid",
        of_moe=True,
    ),
    Field(
        megatron="moe_router_enable_expert_bias",
        option="--moe-router-enable-expert-bias",
        value=True,
        of_moe=True,
    ),
    Field(
        hf="moe_router_scaling_factor",
        megatron="moe_router_topk_scaling_factor",
        option="--moe-router-topk-scaling-factor",
        of_moe=True,
    ),
    Field(megatron="moe_router_dtype", option="--moe-router-dtype", value="fp32", of_moe=True),
    Field(megatron="moe_shared_expert_gate", value=False, of_moe=True),
    # The bias balances the experts; Megatron's default is an auxiliary loss.
    Field(
        megatron="moe_router_load_balancing_type",
        option="--moe-router-load-balancing-type",
        value="none",
        of_moe=True,
        is_default=True,
    ),
    # The authors' (SteptronOss, playground/sft/step3); Megatron's default, 1e-3, would move the
    # published bias at each iteration, whatever the learning rate.
    Field(
        megatron="moe_router_bias_update_rate",
        option="--moe-router-bias-update-rate",
        value=0.0,
        of_moe=True,
        is_default=True,
    ),
    Field(
        hf="num_nextn_predict_layers",
        megatron="mtp_num_layers",
        option="--mtp-num-layers",
        to_megatron=lambda config: config.num_nextn_predict_layers or None,
        to_hf=lambda megatron: megatron.mtp_num_layers or 0,
    ),
    # What Megatron has one value or no name for: the provider's own fields.
    Field(hf="layer_types", megatron="layer_types", of_provider=True),
    Field(hf="attention_other_setting", megatron="attention_other_setting", of_provider=True),
    Field(
        hf="sliding_window",
        megatron="sliding_attention_setting",
        to_megatron=_sliding_attention_setting,
        to_hf=lambda megatron: (megatron.sliding_attention_setting or {}).get("sliding_window"),
        of_provider=True,
    ),
    Field(hf="rope_theta", megatron="rotary_base_per_layer", of_provider=True),
    Field(hf="partial_rotary_factors", megatron="partial_rotary_factors", of_provider=True),
    Field(hf="rope_scaling", megatron="rope_scaling", of_provider=True),
    Field(hf="yarn_only_types", megatron="yarn_only_types", of_provider=True),
    Field(hf="swiglu_limits", megatron="swiglu_limits", of_provider=True),
    Field(hf="swiglu_limits_shared", megatron="swiglu_limits_shared", of_provider=True),
    Field(hf="use_head_wise_attn_gate", megatron="head_wise_attn_gate", of_provider=True),
)

# TransformerConfig fields that have one value in all Step-3.5 models, and those values.
FIXED_VALUES: dict[str, object] = {
    row.megatron: row.value
    for row in FIELDS
    if row.megatron is not None
    and row.hf is None
    and row.to_megatron is None
    and not row.is_default
}


def decided_by(config: Step35Config) -> list[Field]:
    """The rows that apply to a config's model."""
    is_moe = any(_moe_layer_freq(config))
    return [row for row in FIELDS if is_moe or not row.of_moe]


def model_fields(config: Step35Config) -> dict[str, Any]:
    """The TransformerConfig fields that a Step-3.5 config decides, by Megatron-Core's names.

    Heads, groups, window, RoPE and clamps vary by layer and are set on each layer's own copy
    (`step35_patch.model.layer`); the values here are those of the full-attention layers, which is
    what Megatron-Core's own reports and checks see.
    """
    return {
        row.megatron: row.megatron_value(config)
        for row in decided_by(config)
        if row.megatron is not None and not row.of_provider and not row.is_default
    }


def provider_fields(config: Step35Config) -> dict[str, Any]:
    """The fields that `Step35ModelProvider` adds, with the values that the config's file has.

    None that is missing there, or null.
    """
    document = config.to_dict()
    values = {
        row.megatron: row.to_megatron(config) if row.to_megatron else document.get(row.hf)
        for row in FIELDS
        if row.of_provider and row.megatron is not None and row.hf is not None
    }
    return {name: value for name, value in values.items() if value is not None}


def hf_fields(megatron: Any) -> dict[str, object]:
    """The Hugging Face config's fields that those of a `Step35ModelProvider` describe.

    Returns:
        Each field's value, by the Hugging Face config's names; None where nothing is said.
    """
    is_moe = megatron.num_moe_experts is not None
    fields: dict[str, object] = {"use_moe": is_moe}
    for row in FIELDS:
        if row.hf is None or row.megatron is None or (row.of_moe and not is_moe):
            continue
        fields[row.hf] = row.to_hf(megatron) if row.to_hf else getattr(megatron, row.megatron)
    return fields
