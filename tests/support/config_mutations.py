"""Hypothesis's strategies of configs with something wrong: a known field, or whatever comes."""

from __future__ import annotations

import copy
import json
from typing import Any

from hypothesis import strategies as st

from support.config_strategies import FIXED, Document, legal, plain_documents
from support.reference import FULL


def _is_same(a: Any, b: Any) -> bool:
    """As JSON; an integer may stand for a number with a fraction."""
    return a == b and isinstance(a, bool) == isinstance(b, bool)


_JUNK = st.one_of(
    st.sampled_from(
        [None, True, False, -1, 0, 1, 2.5, 10**30, -(2**63), 2**63 - 1, 1e308, -0.0, 5e-324]
    ),
    st.sampled_from([float("nan"), float("inf"), -float("inf")]),
    st.sampled_from(["", "x,1", "0,0", "\ud800", "\0", "1e999", "0" * 5000, FULL, "llama3"]),
    st.sampled_from([[], [[]], {}, {"a": 1}, {"": None}, [None], [0, 1], [FULL] * 3, {"type": 1}]),
    st.recursive(st.integers(-3, 3), lambda inner: st.lists(inner, max_size=3), max_leaves=5),
)
_not_counts = st.sampled_from(
    [True, -1, 1.5, 2.0, "4", [4], {}, 2**63, -(2**63) - 1, float("nan"), float("inf")]
)
_not_sizes = st.one_of(_not_counts, st.sampled_from([0, None]))
_not_numbers = st.sampled_from([True, -1.0, "4", [[4]], {}, 2**64, float("nan"), -float("inf")])
_not_flags = st.sampled_from([0, 1, "true", None, [], {}, 1.0])
_not_lists = st.sampled_from([3, 0.5, True, "x", {}, {"0": 1}])
_lists = {
    "layer_types": st.sampled_from([None, "full", "Full_Attention", 1, [FULL], ""]),
    "rope_theta": st.one_of(_not_numbers, st.sampled_from([0, None, 0.0])),
    "partial_rotary_factors": st.one_of(_not_numbers, st.sampled_from([0, None, 1.0001, 1e-9])),
    "swiglu_limits": _not_numbers,
    "swiglu_limits_shared": _not_numbers,
}
_wrong = {
    "model_type": st.sampled_from([None, "llama", 3, ["step3p5"], "step3p5 "]),
    "torch_dtype": st.sampled_from([None, "int8", 32, "FLOAT32", ["float32"]]),
    **dict.fromkeys(
        (
            *("num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size"),
            *("max_position_embeddings", "num_attention_heads", "num_attention_groups", "head_dim"),
        ),
        _not_sizes,
    ),
    "num_nextn_predict_layers": _not_counts | st.sampled_from([None, 10000]),
    "rms_norm_eps": _not_numbers | st.sampled_from([0, None]),
    "attention_other_setting": _not_lists | st.just([]) | st.just({}),
    "sliding_window": _not_counts | st.just(0),
    "use_head_wise_attn_gate": _not_flags,
    "use_moe": _not_flags,
    "rope_scaling": st.sampled_from([3, "llama3", [], {}, {"rope_type": "yarn"}, True]),
    "moe_layers_enum": st.sampled_from([3, {}, [-1], ["0"], [0, 0], "0,0", [99], "x", [True]]),
    "moe_num_experts": _not_counts,
    "moe_top_k": _not_counts,
    "moe_intermediate_size": _not_counts,
    "share_expert_dim": _not_counts,
    "moe_router_scaling_factor": _not_numbers | st.just(0),
    **{
        name: st.sampled_from(
            [v for v in (None, 0, 1, True, False, 2.5, "x", [1], {}) if not _is_same(v, fixed)]
        )
        for name, fixed in FIXED.items()
        if name != "use_rope_layers"
    },
    "use_rope_layers": st.sampled_from([[1], 3, {}, "", [[]]]),
    "query_pre_attn_scalar": st.sampled_from([0, -1, 3.5, "8", True, [8]]),
    "bos_token_id": st.sampled_from(["x", 1.0, [1], True]),
    "eos_token_id": st.sampled_from(["x", 1.0, [None], [[1]], True]),
    "architectures": st.sampled_from(["x", [1], {}, [None]]),
}


@st.composite
def wrong(draw: st.DrawFn) -> tuple[Document, str]:
    """A config with one wrong field, and its name."""
    document = draw(plain_documents())
    required = [name for name in document if name in _REQUIRED]
    match draw(st.integers(0, 3)):
        case 0:
            name = draw(st.sampled_from(sorted(_wrong)))
            document[name] = draw(_wrong[name])
        case 1:
            name = draw(st.sampled_from(sorted(_lists)))
            position = draw(st.integers(0, len(document[name]) - 1))
            document[name][position] = draw(_lists[name])
        case 2:
            name = draw(st.sampled_from(sorted(_lists)))
            decoder, right = document["num_hidden_layers"], len(document[name])
            lengths = [n for n in range(right + 3) if n not in (decoder, right)]
            length = draw(st.sampled_from(lengths))
            document[name] = (document[name] * (length + 1))[:length]
        case _:
            name = draw(st.sampled_from(required))
            del document[name]
    return document, name


_REQUIRED = (
    *("model_type", "torch_dtype", "num_hidden_layers", "hidden_size", "intermediate_size"),
    *("vocab_size", "max_position_embeddings", "rms_norm_eps", "layer_types"),
    *("num_attention_heads", "num_attention_groups", "head_dim", "rope_theta"),
)


@st.composite
def mutated(draw: st.DrawFn) -> Document:
    """A legal config with some entries replaced, removed, doubled or renamed; legal or not."""
    document = copy.deepcopy(draw(legal()).document)
    for _ in range(draw(st.integers(1, 3))):
        target: Any = document
        while True:
            keys = list(target) if isinstance(target, dict) else list(range(len(target)))
            if not keys:
                break
            key = draw(st.sampled_from(keys))
            if not isinstance(target[key], dict | list) or draw(st.integers(0, 3)) == 0:
                draw(_changed(target, key))
                break
            target = target[key]
    return document


@st.composite
def _changed(draw: st.DrawFn, target: Any, key: Any) -> None:
    value = target[key]
    match draw(st.integers(0, 4)):
        case 0:
            del target[key]
        case 1 if isinstance(target, dict):
            others = [*_wrong, *_lists, f"{key}s", key[:-1], key.upper(), "\ud800", "", "_source"]
            target[draw(st.sampled_from(others))] = target.pop(key)
        case 1:
            target.insert(key, copy.deepcopy(value))
        case 2 if isinstance(value, int | float):
            others = [-value, value + 1, value * 2, float(value), value - 1]
            target[key] = draw(st.sampled_from(others))
        case _:
            target[key] = draw(_JUNK)


@st.composite
def mutated_text(draw: st.DrawFn) -> bytes:
    """The bytes of a config.json, some of which are others."""
    data = bytearray(json.dumps(draw(legal()).document).encode())
    pieces = st.sampled_from(
        [
            b"",
            b'"',
            b"{",
            b"[",
            b"]",
            b"}",
            b",",
            b":",
            b"\0",
            b"\xff",
            b"\\u",
            b"1e9",
            b"-",
            b"NaN",
        ]
    )
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, len(data) - 1))
        if draw(st.booleans()):
            data[at] ^= 1 << draw(st.integers(0, 7))
        else:
            data[at : at + draw(st.integers(0, 12))] = draw(pieces)
    return bytes(data)
