"""Interchange with Megatron-Bridge: an `expanded` checkpoint has the names and shapes of its own.

The table is of facts about Megatron-Bridge's mapping for released Megatron-Core (its
`models/stepfun/step35_bridge.py` of August 2026): names of parameters of a model on Transformer
Engine's spec, and what each is made of. Megatron-Bridge has no place for the MTP layers' output
matrices; everything else must be equal.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from step35_patch import Step35Config
from step35_patch.config import packaged_config_path
from step35_patch.tensors.megatron import megatron_tensors


def bridge_parameters() -> dict[str, tuple[int, ...]]:
    """Every parameter that Megatron-Bridge maps for the published config, with its shape."""
    config = json.loads(Path(packaged_config_path()).read_text("utf-8"))
    hidden, channels = config["hidden_size"], config["head_dim"]
    vocabulary, inner = config["vocab_size"], config["intermediate_size"]
    experts, expert = config["moe_num_experts"], config["moe_intermediate_size"]
    shared, groups = config["share_expert_dim"], config["num_attention_groups"]
    moe_layers = {int(i) for i in config["moe_layers_enum"].split(",")}
    found = {
        "embedding.word_embeddings.weight": (vocabulary, hidden),
        "decoder.final_layernorm.weight": (hidden,),
        "output_layer.weight": (vocabulary, hidden),
    }
    for layer in range(config["num_hidden_layers"] + config["num_nextn_predict_layers"]):
        prefix, depth = f"decoder.layers.{layer}.", layer - config["num_hidden_layers"]
        if depth >= 0:
            prefix = f"mtp.layers.{depth}."
            found |= {f"{prefix}{n}.weight": (hidden,) for n in ("enorm", "hnorm")}
            found[f"{prefix}final_layernorm.weight"] = (hidden,)
            found[f"{prefix}eh_proj.weight"] = (hidden, 2 * hidden)
            prefix += "mtp_model_layer."
        heads = config["num_attention_heads"]
        if config["layer_types"][layer] == "sliding_attention":
            heads = config["attention_other_setting"]["num_attention_heads"]
        attention = f"{prefix}self_attention."
        found |= {
            f"{attention}linear_qkv.layer_norm_weight": (hidden,),
            # [q | gate | k | v] by group, the gate as wide as q.
            f"{attention}linear_qkv.weight": ((2 * heads + 2 * groups) * channels, hidden),
            f"{attention}q_layernorm.weight": (channels,),
            f"{attention}k_layernorm.weight": (channels,),
            f"{attention}linear_proj.weight": (hidden, heads * channels),
        }
        mlp = f"{prefix}mlp."
        if layer not in moe_layers:
            found[f"{mlp}linear_fc1.layer_norm_weight"] = (hidden,)
            found[f"{mlp}linear_fc1.weight"] = (2 * inner, hidden)
            found[f"{mlp}linear_fc2.weight"] = (hidden, inner)
            continue
        found[f"{prefix}pre_mlp_layernorm.weight"] = (hidden,)
        found[f"{mlp}router.weight"] = (experts, hidden)
        found[f"{mlp}router.expert_bias"] = (experts,)
        found[f"{mlp}shared_experts.linear_fc1.weight"] = (2 * shared, hidden)
        found[f"{mlp}shared_experts.linear_fc2.weight"] = (hidden, shared)
        for index in range(experts):
            found[f"{mlp}experts.linear_fc1.weight{index}"] = (2 * expert, hidden)
            found[f"{mlp}experts.linear_fc2.weight{index}"] = (hidden, expert)
    return found


def checkpoint_entries(parameters: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """What Megatron-Core saves parameters as: experts stacked, the MTP layer under another name."""
    entries: dict[str, tuple[int, ...]] = {}
    for name, shape in parameters.items():
        name = name.replace(".mtp_model_layer.", ".transformer_layer.")
        if match := re.fullmatch(r"(.*\.mlp\.experts)(\.linear_fc[12]\.weight)\d+", name):
            name = f"{match[1]}.experts{match[2]}"
            shape = (entries.get(name, (0,))[0] + 1, *shape)
        entries[name] = shape
    return entries


def test_expanded_checkpoint_has_megatron_bridges_names_and_shapes():
    config = Step35Config.from_pretrained(packaged_config_path())
    ours = {tensor.key: tensor.shape for tensor in megatron_tensors(config, "expanded")}
    outputs = {
        f"mtp_output_layers.{depth}.weight": (config.vocab_size, config.hidden_size)
        for depth in range(3)
    }
    assert ours == checkpoint_entries(bridge_parameters()) | outputs
