"""A model in a size for a CPU, with layers of the same kinds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from step35_patch.config.aliases import canonical
from step35_patch.config.model import Step35Config

_LENGTH = 48
# Lists with an entry for each layer, the MTP layers' last.
_BY_LAYER = (
    *("layer_types", "rope_theta", "partial_rotary_factors"),
    *("swiglu_limits", "swiglu_limits_shared"),
)


def length_for(*, tensor: int, context: int) -> int:
    """Tokens of a sample, beyond a shrunk model's window, that a layout can cut."""
    part = math.lcm(2 * context, tensor)
    return -(-_LENGTH // part) * part


def with_layers(config: Step35Config, decoder: Sequence[int], mtp: int) -> Step35Config:
    """A model of some of another's layers, in their order.

    Args:
        config: The other model.
        decoder: Absolute indices of its decoder layers; none may be left out that is the only one
            of its kind and needed by the others, which is the caller's to choose.
        mtp: How many of its MTP layers, the first ones.
    """
    document, _, _ = canonical(config.to_dict())
    first_mtp = config.num_hidden_layers
    kept = [*decoder, *range(first_mtp, first_mtp + mtp)]
    for name in _BY_LAYER:
        if isinstance(values := document.get(name), list) and len(values) == len(config.layers):
            document[name] = [values[index] for index in kept]
    experts = [new for new, old in enumerate(decoder) if config.layers[old].is_moe]
    if config.use_moe:
        document["moe_layers_enum"] = ",".join(map(str, experts))
        document["use_moe"] = bool(experts)
    document |= {"num_hidden_layers": len(decoder), "num_nextn_predict_layers": mtp}
    return Step35Config.from_dict(document)


def shrunk(config: Step35Config, *, tensor: int, expert: int, length: int) -> dict[str, Any]:
    """A config.json with the layers of another in a size for a CPU, which a layout can divide.

    Kinds of layers, their relations (heads, rotated part of a head, RoPE bases), clamped layers and
    MTP layers stay; clamps, window and the length from which RoPE is scaled get so small that they
    matter.

    Args:
        config: The model.
        tensor: The layout's tensor-parallel size.
        expert: Its expert-parallel size.
        length: Tokens of a sample.
    """
    document, _, _ = canonical(config.to_dict())
    document.pop("quantization_config", None)

    def up(size: int, to: int) -> int:
        return -(-size // to) * to

    groups = up(2, tensor)
    sliding = dict(document.get("attention_other_setting") or {})
    heads = {"num_attention_heads": 2 * groups, "num_attention_groups": groups, "head_dim": 16}
    changes: dict[str, Any] = heads | {
        "torch_dtype": "float32",
        "hidden_size": up(64, tensor),
        "intermediate_size": up(96, tensor),
        "vocab_size": 256,  # a byte
        "max_position_embeddings": length,
        "max_seq_len": length,
        "sliding_window": 12,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }
    if sliding:
        sliding |= heads | {"num_attention_heads": 3 * groups}
        changes["attention_other_setting"] = {
            name: 16 if name == "true_head_dim" else value for name, value in sliding.items()
        }
    if document.get("rope_scaling"):
        changes["rope_scaling"] = document["rope_scaling"] | {
            "original_max_position_embeddings": length // 2
        }
    if config.moe_num_experts:
        changes |= {
            "moe_num_experts": up(8, expert),
            "moe_top_k": 2,
            "moe_intermediate_size": up(32, tensor),
            "share_expert_dim": up(32, tensor),
        }
    for name in ("swiglu_limits", "swiglu_limits_shared"):
        if document.get(name):
            changes[name] = [0.5 if limit else 0.0 for limit in document[name]]
    known = document.keys() | {"torch_dtype"}
    return {name: value for name, value in (document | changes).items() if name in known}
