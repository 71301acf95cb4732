"""Every legal split of a small model over two processes."""

from __future__ import annotations

import itertools
from typing import Any

from support.config_strategies import Document
from support.provider_layouts import CP, EP, OVERLAP, PP, TP, VPP
from support.reference import SLIDING

ETP, CUT = "expert_tensor_parallel_size", "pipeline_model_parallel_layout"
FIRST, LAST = "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"
_EVEN = ("intermediate_size", "moe_intermediate_size", "share_expert_dim", "moe_num_experts")

type Layout = dict[str, Any]


def halvable(plain: Document) -> Document:
    """A config like it that each kind of parallelism can halve."""
    groups = 2 * plain["num_attention_groups"]
    sliding = 2 * plain["attention_other_setting"]["num_attention_heads"]
    return plain | {
        **{name: 2 * plain[name] for name in _EVEN},
        "num_attention_groups": groups,
        "num_attention_heads": 2 * plain["num_attention_heads"],
        "attention_other_setting": {"attention_type": SLIDING, "num_attention_heads": sliding},
        "vocab_size": 4 * plain["vocab_size"],
        # Megatron-Core does not normalise the weight of a single expert.
        "moe_top_k": max(2, plain["moe_top_k"]),
        # On whose edge a gradient is there or not by rounding.
        "swiglu_limits": [limit and 7.0 for limit in plain["swiglu_limits"]],
        "swiglu_limits_shared": [limit and 7.0 for limit in plain["swiglu_limits_shared"]],
    }


def layouts(plain: Document) -> list[Layout]:
    """Of a halvable config, as overrides of Step35ModelProvider."""
    experts = bool(plain["moe_layers_enum"])
    return [
        {},
        {CP: 2},
        {TP: 2, "sequence_parallel": True},
        *([] if experts else [{TP: 2}]),
        *(_of_experts() if experts else []),
        *_pipelines(plain["num_hidden_layers"], plain["num_nextn_predict_layers"]),
    ]


def _of_experts() -> list[Layout]:
    tensor = {TP: 2, "sequence_parallel": True, ETP: 1}
    return [{EP: 2}, {EP: 2, CP: 2}, tensor, tensor | {EP: 2}]


def _pipelines(decoder: int, mtp: int) -> list[Layout]:
    found: list[Layout] = []
    if decoder % 2 == 0:
        found.append({PP: 2})
    found += [{PP: 2, FIRST: n, LAST: decoder - n} for n in range(1, decoder)]
    if decoder == 4:
        found.append({PP: 2, VPP: 2, **OVERLAP})
    tail = "m" * mtp + "L"
    found += [{PP: 2, CUT: f"E{'t' * n}|{'t' * (decoder - n)}{tail}"} for n in range(decoder + 1)]
    for cuts in itertools.combinations_with_replacement(range(decoder + 1), 3):
        ends = (0, *cuts, decoder)
        parts = ["t" * (end - start) for start, end in itertools.pairwise(ends)]
        found.append({PP: 2, VPP: 2, CUT: "E" + "|".join(parts) + tail, **OVERLAP})
    return found
