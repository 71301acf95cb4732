"""What a Step-3.5 model carries besides Megatron-Core's TransformerConfig.

A `Step35Runtime` is the validated Hugging Face config together with the two choices that the
config does not make (gate layout and window convention). `runtime_for` answers the one question
that every hook asks: is this TransformerConfig a Step-3.5 model's, and which one's?
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from step35_patch import settings as process
from step35_patch.config.layer_plan import LayerPlan
from step35_patch.config.model import Step35Config

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

    from step35_patch.settings import Settings

# TransformerConfig fields that any Step-3.5 config fixes. The first two decide whether a
# TransformerConfig is meant to be this model at all; the others must then agree.
IDENTITY_FIELDS = ("num_layers", "hidden_size")


@dataclass(frozen=True)
class Step35Runtime:
    """A Step-3.5 model: its config and the choices that go with it. Immutable and shared.

    Args:
        config: the validated Hugging Face config.
        gate_layout: "headwise" or "expanded" (see `step35_patch.model.attention`).
        window: "hf" (a sliding layer's query sees W keys) or "steptron" (W + 1 keys).
        source: where the config came from, for messages.
    """

    config: Step35Config
    gate_layout: str = "headwise"
    window: str = "hf"
    source: str = field(default="<object>", compare=False)
    layers: tuple[LayerPlan, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.gate_layout not in ("headwise", "expanded"):
            raise ValueError(
                f"gate_layout: expected 'headwise' or 'expanded', found {self.gate_layout!r}"
            )
        if self.config.use_moe and self.config.moe_top_k == 1:
            raise ValueError(
                "moe_top_k: expected at least 2, found 1: Megatron-Core does not normalise the "
                "weight of a single expert, as norm_expert_weight asks for"
            )
        object.__setattr__(self, "layers", self.config.resolve(self.window))

    def __deepcopy__(self, memo: dict) -> Step35Runtime:
        # Megatron-Core deep-copies TransformerConfigs for each expert layer; this is immutable.
        return self

    def layer(self, index: int, *, is_mtp: bool) -> LayerPlan:
        """The plan of the 0-based absolute layer `index`.

        Raises:
            IndexError: there is no such layer, or it is one of the other kind.
        """
        first, last = (
            (self.config.num_hidden_layers, len(self.layers) - 1)
            if is_mtp
            else (0, self.config.num_hidden_layers - 1)
        )
        if not first <= index <= last:
            kind = "MTP" if is_mtp else "decoder"
            raise IndexError(
                f"layer index {index}: expected {first} to {last} for a {kind} layer of a config "
                f"with num_hidden_layers={self.config.num_hidden_layers} and "
                f"num_nextn_predict_layers={self.config.num_nextn_predict_layers}; "
                "check --num-layers, --mtp-num-layers and the pipeline layout"
            )
        return self.layers[index]


def model_fields(config: Step35Config) -> dict[str, Any]:
    """The TransformerConfig fields that a Step-3.5 config decides, by Megatron-Core's names.

    Heads, groups, window, RoPE and clamps vary by layer and are set on each layer's own copy
    (`step35_patch.model.layer`); the values here are those of the full-attention layers, which is what
    Megatron-Core's own reports and checks see.
    """
    fields: dict[str, Any] = {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_query_groups": config.num_attention_groups,
        "kv_channels": config.head_dim,
        "ffn_hidden_size": config.intermediate_size,
        "normalization": "RMSNorm",
        "layernorm_epsilon": config.rms_norm_eps,
        "layernorm_zero_centered_gamma": True,
        "qk_layernorm": True,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "mtp_num_layers": config.num_nextn_predict_layers or None,
    }
    moe_layers = [plan.is_moe for plan in config.layers[: config.num_hidden_layers]]
    if any(moe_layers):
        fields |= {
            "num_moe_experts": config.moe_num_experts,
            "moe_layer_freq": [int(moe) for moe in moe_layers],
            "moe_ffn_hidden_size": config.moe_intermediate_size,
            "moe_shared_expert_intermediate_size": config.share_expert_dim,
            "moe_router_topk": config.moe_top_k,
            "moe_router_score_function": "sigmoid",
            "moe_router_enable_expert_bias": True,
            "moe_router_dtype": "fp32",
            "moe_router_topk_scaling_factor": config.moe_router_scaling_factor,
            "moe_shared_expert_gate": False,
        }
    else:
        fields["num_moe_experts"] = None
    return fields


def conflicts(config: TransformerConfig, step35: Step35Config) -> list[str]:
    """Every field of a TransformerConfig that contradicts the Step-3.5 config, a line each."""
    lines = []
    for name, expected in model_fields(step35).items():
        found = getattr(config, name)
        if name == "moe_layer_freq" and isinstance(found, int):
            found = [int(i % found == 0) for i in range(config.num_layers)]
        if name == "mtp_num_layers" and (found or 0) <= (expected or 0):
            continue  # fewer are built, and the others left alone
        if found != expected:
            lines.append(
                f"{name}: the config needs {expected!r}, the TransformerConfig has {found!r}"
            )
    return lines


def check(config: TransformerConfig, step35: Step35Config, source: str) -> None:
    """Raise ValueError with all conflicts at once if `config` cannot be the model of `step35`."""
    if lines := conflicts(config, step35):
        raise ValueError(
            f"the TransformerConfig contradicts the Step-3.5 config ({source}):\n  "
            + "\n  ".join(lines)
            + "\nChange the arguments, or the config that is given to step35_patch."
        )


def runtime_for(config: TransformerConfig) -> Step35Runtime | None:
    """The Step-3.5 model that a TransformerConfig describes, or None for any other model.

    A config made by `Step35ModelProvider`, or from Megatron's arguments, says so itself. Any
    other one is this model if a config was activated and it has that config's number of layers
    and hidden size.

    Raises:
        ValueError: layers and hidden size are those of the active config but other fields
            contradict it; all of them are listed.
    """
    if (runtime := getattr(config, "step35", None)) is not None:
        return runtime
    settings = process.active()
    if settings is None:
        return None
    wanted = model_fields(settings.config)
    if any(getattr(config, name) != wanted[name] for name in IDENTITY_FIELDS):
        return None
    check(config, settings.config, settings.source)
    return from_settings(settings)


@lru_cache(maxsize=4)  # asked for at every step, by Megatron's count of operations
def from_settings(settings: Settings) -> Step35Runtime:
    """The model that the process-wide activation asks for."""
    return Step35Runtime(settings.config, settings.gate_layout, settings.window, settings.source)
