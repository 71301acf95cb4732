"""Hypothesis's strategies of small legal configs, in every spelling that is read."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st
from transformers.models.step3p7.configuration_step3p7 import Step3p7TextConfig

from step35_patch.config.layer_plan import LayerPlan, RopeScaling
from support.reference import FULL, SLIDING

Document = dict[str, Any]


@dataclass(frozen=True)
class Legal:
    """A legal config.

    Attributes:
        document: one way to write it.
        plain: another: the published names, and an entry for each layer in every list.
        plans: of its layers, as they were drawn.
    """

    document: Document
    plain: Document
    plans: tuple[LayerPlan, ...]


# --- Legal ones ---------------------------------------------------------------------------------

_limits = st.sampled_from([None, 0, 0.0, 0.0, 0.05, 0.3, 1, 7.0])
_thetas = st.sampled_from([1, 3.0, 10.0, 50, 500.0, 1e4, 5e6])


@st.composite
def _shared_by_type(draw: st.DrawFn, types: list[str], values: st.SearchStrategy) -> list:
    """One value for each layer: of its type's, or its own."""
    if draw(st.booleans()):
        by_type = {kind: draw(values) for kind in (FULL, SLIDING)}
        return [by_type[kind] for kind in types]
    return [draw(values) for _ in types]


@st.composite
def plain_documents(draw: st.DrawFn) -> Document:
    decoder, mtp = draw(st.integers(1, 4)), draw(st.integers(0, 3))
    layers = decoder + mtp
    types = draw(st.lists(st.sampled_from([FULL, SLIDING]), min_size=layers, max_size=layers))
    groups, head_dim = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([2, 4, 5, 6, 8, 16]))
    shares = [r / head_dim for r in range(2, head_dim + 1, 2) if int(r / head_dim * head_dim) == r]
    scaling = draw(st.booleans())
    low = draw(st.sampled_from([0.5, 1, 2.0]))
    experts = draw(st.integers(1, 5))
    moe = sorted(draw(st.sets(st.integers(0, decoder - 1)))) if draw(st.booleans()) else []
    sizes = st.sampled_from([1, 4, 6, 10, 24])
    heads = {kind: groups * draw(st.integers(1, 3)) for kind in (FULL, SLIDING)}
    return {
        "model_type": "step3p5",
        "torch_dtype": "float32",
        "num_hidden_layers": decoder,
        "num_nextn_predict_layers": mtp,
        "hidden_size": draw(st.sampled_from([4, 10, 16, 24])),
        "intermediate_size": draw(sizes),
        "vocab_size": draw(st.integers(8, 70)),
        "max_position_embeddings": draw(st.integers(1, 300)),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5, 0.01, 1])),
        "layer_types": types,
        "num_attention_heads": heads[FULL],
        "num_attention_groups": groups,
        "head_dim": head_dim,
        "attention_other_setting": {
            "attention_type": SLIDING,
            "num_attention_heads": heads[SLIDING],
        },
        "sliding_window": draw(st.integers(1, 12)),
        "use_head_wise_attn_gate": draw(st.booleans()),
        "rope_theta": draw(_shared_by_type(types, _thetas)),
        "partial_rotary_factors": draw(_shared_by_type(types, st.sampled_from(shares))),
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": draw(st.sampled_from([1, 2.0, 7.5])),
            "low_freq_factor": low,
            "high_freq_factor": low + draw(st.sampled_from([0.25, 3])),
            "original_max_position_embeddings": draw(st.sampled_from([4, 16, 64, 4096])),
        }
        if scaling
        else None,
        "yarn_only_types": draw(
            st.lists(st.sampled_from([FULL, SLIDING]), unique=True, min_size=1)
        ),
        "swiglu_limits": [draw(_limits) for _ in types],
        "swiglu_limits_shared": [draw(_limits) for _ in types],
        "use_moe": bool(moe),
        "moe_layers_enum": moe,
        "moe_num_experts": experts,
        "moe_top_k": draw(st.integers(1, experts)),
        "moe_intermediate_size": draw(sizes),
        "share_expert_dim": draw(sizes),
        "moe_router_scaling_factor": draw(st.sampled_from([1, 0.5, 3.0])),
    }


def _plans(plain: Document) -> tuple[LayerPlan, ...]:
    scaling = plain["rope_scaling"] and RopeScaling(**plain["rope_scaling"])
    heads = {
        FULL: plain["num_attention_heads"],
        SLIDING: plain["attention_other_setting"]["num_attention_heads"],
    }
    return tuple(
        LayerPlan(
            index=index,
            is_mtp=index >= plain["num_hidden_layers"],
            is_moe=index in plain["moe_layers_enum"],
            attention_type=kind,
            num_attention_heads=heads[kind],
            num_query_groups=plain["num_attention_groups"],
            kv_channels=plain["head_dim"],
            window_size=None if kind == FULL else (plain["sliding_window"] - 1, 0),
            rotary_base=plain["rope_theta"][index],
            rotary_percent=plain["partial_rotary_factors"][index],
            rope_scaling=scaling if kind in plain["yarn_only_types"] else None,
            swiglu_limit=plain["swiglu_limits"][index] or None,
            swiglu_limit_shared=plain["swiglu_limits_shared"][index] or None,
        )
        for index, kind in enumerate(plain["layer_types"])
    )


# Published name: other names for it.
_ALIASES = {
    "num_attention_groups": ("num_key_value_heads",),
    "moe_num_experts": ("n_routed_experts", "num_local_experts"),
    "moe_top_k": ("num_experts_per_tok",),
    "share_expert_dim": ("share_expert_dims",),
    "num_nextn_predict_layers": ("num_mtp_layers",),
    "torch_dtype": ("dtype",),
}
# What the reference computes in one way only, and what nobody reads.
FIXED = {
    "att_impl_type": "GQA",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "mlp_bias": False,
    "moe_every_n_layer": 1,
    "moe_layer_offset": 0,
    "moe_router_activation": "sigmoid",
    "need_fp32_gate": True,
    "norm_expert_weight": True,
    "sink": False,
    "tie_word_embeddings": False,
    "use_bidirectional_attention": False,
    "use_moe_router_bias": True,
    "use_qk_norm": True,
    "use_rope_layers": [],
    "zero_centered": True,
}
_OTHERS = st.dictionaries(
    st.one_of(
        st.sampled_from(["layers", "_source", "self", "data", "model_config", "__class__", ""]),
        st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    ),
    st.one_of(st.none(), st.booleans(), st.integers(-5, 5), st.text(max_size=3), st.just([{}])),
    max_size=2,
)


@st.composite
def legal(draw: st.DrawFn) -> Legal:
    """Legal configs of at most four decoder and three MTP layers."""
    plain = draw(plain_documents())
    plans = _plans(plain)
    if draw(st.integers(0, 4)) == 0 and _is_what_transformers_has(plain):
        document = _as_transformers_saves(plain)
    else:
        document = draw(_spelled(plain, plans))
    document |= {
        name: value for name, value in draw(_OTHERS).items() if name not in document | plain
    }
    if draw(st.integers(0, 5)) == 0:
        dtype = document.pop("torch_dtype", None)
        document = {"model_type": "step3p7", "text_config": document, "vision_config": {}}
        if dtype:
            document["torch_dtype"] = dtype
    return Legal(document, plain, plans)


@st.composite
def _spelled(draw: st.DrawFn, plain: Document, plans: tuple[LayerPlan, ...]) -> Document:
    """The same model as a person or a program might write it."""
    document = copy.deepcopy(plain)
    chance = st.booleans()
    decoder = plain["num_hidden_layers"]
    mtp = plans[decoder:]

    def left_out(name: str, *instead: Any) -> None:
        if (value := draw(st.sampled_from([..., *instead]))) is ...:
            document.pop(name, None)
        else:
            document[name] = value

    if all(plan.attention_type == SLIDING for plan in mtp) and draw(chance):
        document["layer_types"] = document["layer_types"][:decoder]
    for name in ("rope_theta", "partial_rotary_factors"):
        values = document[name]
        if _agree_by_type(plans, values, decoder) and draw(chance):
            document[name] = values[:decoder]
    for name in ("swiglu_limits", "swiglu_limits_shared"):
        if not any(document[name]) and draw(chance):
            left_out(name, None)
        elif not any(document[name][decoder:]) and draw(chance):
            document[name] = document[name][:decoder]
    if len(set(plain["rope_theta"])) == 1 and draw(chance):
        document["rope_theta"] = plain["rope_theta"][0]
    if (
        plain["head_dim"] % 2 == 0
        and set(plain["partial_rotary_factors"]) == {1.0}
        and draw(chance)
    ):
        left_out("partial_rotary_factors", None)
    draw(_spelled_scaling(document))
    if all(plan.attention_type == FULL for plan in plans) and draw(chance):
        left_out("attention_other_setting", None)
        left_out("sliding_window", None)
    elif draw(chance):
        document["attention_other_setting"] |= {
            "num_attention_groups": plain["num_attention_groups"],
            "true_head_dim": plain["head_dim"],
            "head_dim": plain["head_dim"],
        }
    draw(_spelled_experts(document))
    for name in ("use_head_wise_attn_gate", "use_moe"):
        if document[name] and draw(chance):
            del document[name]
    if not mtp and draw(chance):
        left_out("num_nextn_predict_layers")
    for name, others in _ALIASES.items():
        if name in document and draw(chance):
            document[draw(st.sampled_from(others))] = document.pop(name)
    fixed = FIXED | {"query_pre_attn_scalar": plain["head_dim"], "max_seq_len": 9}
    document |= {name: fixed[name] for name in draw(st.sets(st.sampled_from(sorted(fixed))))}
    names = draw(st.permutations(sorted(document)))
    return {name: document[name] for name in names}


@st.composite
def _spelled_scaling(draw: st.DrawFn, document: Document) -> None:
    scaling = document["rope_scaling"]
    if scaling is None:
        if draw(st.booleans()):
            document["rope_scaling"] = {"rope_type": "default"}
        elif draw(st.booleans()):
            del document["rope_scaling"], document["yarn_only_types"]
        return
    if draw(st.booleans()):
        scaling["type"] = scaling["rope_type"]
        if draw(st.booleans()):
            del scaling["rope_type"]


@st.composite
def _spelled_experts(draw: st.DrawFn, document: Document) -> None:
    moe = draw(st.permutations(document["moe_layers_enum"]))
    document["moe_layers_enum"] = draw(st.sampled_from([moe, ",".join(map(str, moe))]))
    if moe:
        return
    names = (
        *("moe_num_experts", "moe_top_k", "moe_intermediate_size", "share_expert_dim"),
        "moe_router_scaling_factor",
    )
    for name in draw(st.sets(st.sampled_from(names))):
        if draw(st.booleans()):
            del document[name]
        else:
            document[name] = None
    if draw(st.booleans()):
        document["use_moe"] = draw(st.booleans())
    elif draw(st.booleans()):
        document["moe_layers_enum"] = None


def _agree_by_type(plans: tuple[LayerPlan, ...], values: list, decoder: int) -> bool:
    """Whether each MTP layer has the one number that the decoder's layers of its type have."""
    of_type: dict[str, set] = {}
    for plan, value in zip(plans[:decoder], values, strict=False):
        of_type.setdefault(plan.attention_type, set()).add(value)
    return all(
        of_type.get(plan.attention_type) == {value}
        for plan, value in zip(plans[decoder:], values[decoder:], strict=True)
    )


# --- As transformers has them -------------------------------------------------------------------


def _is_what_transformers_has(plain: Document) -> bool:
    """Whether all of it outlives being saved: one RoPE for each type, one scaled type."""
    decoder, types = plain["num_hidden_layers"], plain["layer_types"]
    ropes = set(zip(types, plain["rope_theta"], plain["partial_rotary_factors"], strict=True))
    return (
        len(ropes) == len(set(types[:decoder])) == len(set(types))
        and not any(plain["swiglu_limits"][decoder:] + plain["swiglu_limits_shared"][decoder:])
        and (
            plain["rope_scaling"] is None
            or (plain["yarn_only_types"] == [FULL] and FULL in types[:decoder])
        )
    )


def read_by_transformers(document: Document) -> Step3p7TextConfig:
    """A config as transformers reads it: with no whole number for a fraction, no null for what is
    not there, and no name that it would itself read as something else.
    """
    fields = {n: value for n, value in document.items() if n != "model_type" and value is not None}
    for alias, name in (
        ("num_mtp_layers", "num_nextn_predict_layers"),
        ("num_local_experts", "n_routed_experts"),
    ):
        if alias in fields:
            fields[name] = fields.pop(alias)
    for name in ("rms_norm_eps", "moe_router_scaling_factor"):
        if type(fields.get(name)) is int:
            fields[name] = float(fields[name])
    return Step3p7TextConfig(**fields)


def _as_transformers_saves(plain: Document) -> Document:
    """The config that transformers writes once it has read this one."""
    fields = dict(plain)
    if plain["rope_scaling"] is None:
        del fields["yarn_only_types"]
    saved: Document = json.loads(read_by_transformers(fields).to_json_string(use_diff=False))
    return saved
