"""Configs for the tests: the published one, and a tiny one with the same features."""

import copy
import json

import pytest

from step35_patch.config import Step35Config, Step35ConfigError, packaged_config_path

FULL, SLIDING = "full_attention", "sliding_attention"
PER_LAYER = (
    "layer_types",
    "rope_theta",
    "partial_rotary_factors",
    "swiglu_limits",
    "swiglu_limits_shared",
)


def published():
    return json.loads(packaged_config_path().read_text())


def tiny(**changes):
    """Six layers and two MTP layers with every feature, in the longer form."""
    types = [FULL, SLIDING, SLIDING, FULL, SLIDING, SLIDING, SLIDING, SLIDING]
    data = {
        "model_type": "step3p5",
        "torch_dtype": "float32",
        "num_hidden_layers": 6,
        "num_nextn_predict_layers": 2,
        "hidden_size": 24,
        "intermediate_size": 40,
        "vocab_size": 64,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "layer_types": types,
        "num_attention_heads": 4,
        "num_attention_groups": 2,
        "head_dim": 8,
        "attention_other_setting": {"attention_type": SLIDING, "num_attention_heads": 6},
        "sliding_window": 8,
        "rope_theta": [5e4 if kind == FULL else 1e4 for kind in types],
        "partial_rotary_factors": [0.5 if kind == FULL else 1.0 for kind in types],
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 2.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 32.0,
            "original_max_position_embeddings": 64,
        },
        "yarn_only_types": [FULL],
        "swiglu_limits": [0.0, 0.0, None, 0.5, 0.0, 0.0, 0.0, 0.0],
        "swiglu_limits_shared": [0.25, 0.0, 0.0, 0.75, 0.0, 0.0, 0.0, 0.0],
        "moe_layers_enum": [2, 3, 4, 5],
        "moe_num_experts": 4,
        "moe_top_k": 2,
        "moe_intermediate_size": 12,
        "share_expert_dim": 20,
        "moe_router_scaling_factor": 3.0,
    }
    return data | changes


def resaved():
    """The tiny config as transformers saves it; its MTP layers are full ones."""
    data = tiny()
    for name in ("rope_theta", "partial_rotary_factors", "moe_layers_enum"):
        del data[name]
    del data["attention_other_setting"]
    scaling = data.pop("rope_scaling")
    sliding = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0}
    return data | {
        "layer_types": data["layer_types"][:6],
        "mtp_layer_types": [FULL] * 2,
        "swiglu_limits": data["swiglu_limits"][:6],
        "swiglu_limits_shared": data["swiglu_limits_shared"][:6],
        "mlp_layer_types": ["dense"] * 2 + ["sparse"] * 4,
        "mtp_mlp_layer_types": ["dense"] * 2,
        "num_sliding_attention_heads": 6,
        "per_layer_config": {f"0{index}": {"num_attention_heads": 6} for index in (1, 2, 4, 5)},
        "rope_parameters": {
            FULL: {**scaling, "rope_theta": 5e4, "partial_rotary_factor": 0.5},
            SLIDING: sliding,
        },
    }


def edited(data, path, value):
    """`data` with the entry at `path` ("a.b", "a.3") replaced, or removed if `value` is ..."""
    data = copy.deepcopy(data)
    *parents, last = (int(part) if part.isdecimal() else part for part in path.split("."))
    target = data
    for part in parents:
        target = target[part]
    if value is ...:
        del target[last]
    else:
        target[last] = value
    return data


def problems_of(data):
    with pytest.raises(Step35ConfigError) as caught:
        Step35Config.from_dict(data)
    return caught.value.problems
