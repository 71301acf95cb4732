"""The tensors of a published Step-3.5 checkpoint: names, shapes and dtypes, from a config alone.

A layer's shapes come from its `LayerPlan`. Nothing but the standard library is used, so that the
list can be had where there is no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from step35_patch.config.layer_plan import LayerPlan

if TYPE_CHECKING:
    from step35_patch.config.model import Step35Config

# safetensors' names of the dtypes, and the bytes of one element.
SAFETENSORS_DTYPES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_ELEMENT_BYTES = {"BF16": 2, "F16": 2, "F32": 4}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a checkpoint.

    Attributes:
        name: Its name in the published checkpoint.
        shape: Its sizes; a weight of a linear layer is [out, in].
        dtype: safetensors' name of its dtype: `"BF16"`, `"F16"` or `"F32"`.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def num_elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """How many bytes its numbers take in a file, without the header."""
        return self.num_elements * _ELEMENT_BYTES[self.dtype]


def published_tensors(
    config: Step35Config, torch_dtype: str | None = None
) -> tuple[TensorInfo, ...]:
    """Every tensor of the published checkpoint of `config`: embedding, layers, norm and head.

    All have one dtype but the router's bias, which is fp32.

    Args:
        config: The model.
        torch_dtype: Of the tensors, as in `SAFETENSORS_DTYPES`; the config's own if None.
    """
    torch_dtype = torch_dtype or config.torch_dtype
    dtype = SAFETENSORS_DTYPES[torch_dtype]
    hidden, vocabulary = config.hidden_size, config.vocab_size
    return (
        TensorInfo("model.embed_tokens.weight", (vocabulary, hidden), dtype),
        *(tensor for plan in config.layers for tensor in layer_tensors(config, plan, torch_dtype)),
        TensorInfo("model.norm.weight", (hidden,), dtype),
        TensorInfo("lm_head.weight", (vocabulary, hidden), dtype),
    )


def layer_tensors(
    config: Step35Config, plan: LayerPlan, torch_dtype: str | None = None
) -> Iterator[TensorInfo]:
    """The tensors of one layer; those of an MTP layer include the MTP module around it."""
    prefix = f"model.layers.{plan.index}."
    published = SAFETENSORS_DTYPES[torch_dtype or config.torch_dtype]
    shapes = _attention_shapes(config, plan)
    shapes |= _moe_shapes(config) if plan.is_moe else _mlp_shapes(config, "mlp")
    if plan.is_mtp:
        shapes |= _mtp_shapes(config)
    for name, shape in shapes.items():
        dtype = "F32" if name == "moe.router_bias" else published
        yield TensorInfo(prefix + name, shape, dtype)


def _attention_shapes(config: Step35Config, plan: LayerPlan) -> dict[str, tuple[int, ...]]:
    hidden = config.hidden_size
    queries = plan.num_attention_heads * plan.kv_channels
    keys = plan.num_query_groups * plan.kv_channels
    shapes = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
    }
    if config.use_head_wise_attn_gate:
        shapes["self_attn.g_proj.weight"] = (plan.num_attention_heads, hidden)
    return shapes | {
        "self_attn.q_norm.weight": (plan.kv_channels,),
        "self_attn.k_norm.weight": (plan.kv_channels,),
        "post_attention_layernorm.weight": (hidden,),
    }


def _mlp_shapes(config: Step35Config, name: str) -> dict[str, tuple[int, ...]]:
    hidden = config.hidden_size
    inner = config.share_expert_dim if name == "share_expert" else config.intermediate_size
    return {
        f"{name}.gate_proj.weight": (inner, hidden),
        f"{name}.up_proj.weight": (inner, hidden),
        f"{name}.down_proj.weight": (hidden, inner),
    }


def _moe_shapes(config: Step35Config) -> dict[str, tuple[int, ...]]:
    experts, hidden = config.moe_num_experts, config.hidden_size
    inner = config.moe_intermediate_size
    return {
        "moe.gate.weight": (experts, hidden),
        "moe.router_bias": (experts,),
        "moe.gate_proj.weight": (experts, inner, hidden),
        "moe.up_proj.weight": (experts, inner, hidden),
        "moe.down_proj.weight": (experts, hidden, inner),
        **_mlp_shapes(config, "share_expert"),
    }


def _mtp_shapes(config: Step35Config) -> dict[str, tuple[int, ...]]:
    hidden = config.hidden_size
    return {
        "enorm.weight": (hidden,),
        "hnorm.weight": (hidden,),
        "eh_proj.weight": (hidden, 2 * hidden),
        "transformer.shared_head.norm.weight": (hidden,),
        "transformer.shared_head.output.weight": (config.vocab_size, hidden),
    }
