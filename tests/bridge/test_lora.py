"""LoRA by Megatron-Bridge: at the start, exported merged and apart, by parallel layout."""

from __future__ import annotations

import json

import pytest
from support.bridge_processes import needs_bridge

pytestmark = [pytest.mark.slow, needs_bridge]

LOCAL = {"transformer_impl": "local", "moe_grouped_gemm": False}
TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
GROUPED = {"moe_grouped_gemm": True}
# What can have no adapters with sequence parallelism, and with expert-tensor parallelism.
TARGETS = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "eh_proj", "output_layer"]
DENSE_FC2 = ["linear_qkv", "linear_proj", "linear_fc1", "*.mlp.linear_fc2", "*mtp_output_heads.*"]
# Processes, gate layout, fields of the provider, options of LoRA, what has no adapters.
LAYOUTS = {
    "one process": (1, "headwise", {}, {}, []),
    "grouped experts, one adapter": (1, "headwise", GROUPED, {}, []),
    "expanded, grouped experts, each its own": (
        1,
        "expanded",
        GROUPED,
        {"share_expert_adapters": False, "normalize_moe_lora": True},
        [],
    ),
    "local": (1, "headwise", LOCAL, {}, []),
    "tp2 etp2, expanded": (
        2,
        "expanded",
        TP2 | {"expert_tensor_parallel_size": 2},
        {"target_modules": DENSE_FC2},
        ["moe.gate.", "moe.down_proj", "share_expert.down_proj", "eh_proj", "lm_head"],
    ),
    "pp2 tp2 ep2": (
        4,
        "headwise",
        TP2
        | GROUPED
        | {
            "expert_model_parallel_size": 2,
            "expert_tensor_parallel_size": 1,
            "pipeline_model_parallel_size": 2,
        },
        {"share_expert_adapters": False, "target_modules": TARGETS},
        ["moe.gate.", "shared_head.output"],
    ),
}


def run(bridge_ranks, processes: int, code: str, *arguments: object) -> None:
    code = f"from support import lora_worker\nlora_worker.{code}(*arguments)"
    ended = bridge_ranks.run(code, processes, *arguments)
    assert not any(ended.statuses), ended.text[-6000:]


@pytest.mark.parametrize("name", LAYOUTS)
def test_merged_and_apart(bridge_ranks, published, tmp_path, name):
    processes, gate_layout, *options = LAYOUTS[name]
    run(
        *(bridge_ranks, processes, "adapt", published, tmp_path, gate_layout),
        *map(json.dumps, options),
    )


def test_what_does_not_go_is_refused(bridge_ranks, published):
    run(bridge_ranks, 1, "refuse", published, "headwise")


def test_where_adapters_do_not_go_is_refused(bridge_ranks, published):
    run(bridge_ranks, 2, "refuse_places", published)


def test_expanded_gate_is_trained_saved_and_resumed(bridge_ranks, published, tmp_path):
    run(bridge_ranks, 1, "resume", published, tmp_path)


def test_dropout_is_applied_to_experts_in_place(bridge_ranks, published):
    run(bridge_ranks, 1, "drop", published)
