"""Megatron-Bridge's LoRA, DoRA and CanonicalLoRA with the gate, by parallel layout.

At the start nothing changes, gradients are a merged model's, and what is exported merged or apart
is the adapted model: PEFT's logits of it differ from Megatron's as the two implementations' do
without adapters, which is what `support.parity.LOGITS` allows.
"""

from __future__ import annotations

import json

import pytest
import torch
from support.bridge_processes import needs_bridge
from support.figures import record
from support.parity import LOGITS, relative
from support.peft_folder import adapted_logits

pytestmark = [pytest.mark.slow, needs_bridge]

LOCAL = {"transformer_impl": "local", "moe_grouped_gemm": False}
TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
GROUPED = {"moe_grouped_gemm": True}
# What DoRA can be on, and what it can't.
DENSE = [
    *("linear_qkv", "linear_proj", "eh_proj", "*.mlp.linear_fc1", "*.mlp.linear_fc2"),
    *("*.shared_experts.linear_fc1", "*.shared_experts.linear_fc2"),
]
NOT_DENSE = ["moe.", "lm_head", "shared_head.output"]
# What can have no adapters with sequence parallelism, and with expert-tensor parallelism.
TARGETS = ["linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "eh_proj", "output_layer"]
DENSE_TP = [*DENSE[:2], *DENSE[3:], "*mtp_output_heads.*"]
NOT_DENSE_TP = ["moe.", "eh_proj", "lm_head"]
# Without it Transformer Engine drops gradients.
REGATHER = {"sequence_parallel_input_regather": True}
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
        REGATHER | {"target_modules": DENSE_TP},
        NOT_DENSE_TP,
    ),
    "canonical, expanded": (1, "expanded", {}, {"kind": "canonical"}, []),
    "canonical, tp2": (
        2,
        "headwise",
        TP2,
        {"kind": "canonical", "target_modules": DENSE_TP},
        NOT_DENSE_TP,
    ),
    "dora": (1, "headwise", {}, {"kind": "dora", "target_modules": DENSE}, NOT_DENSE),
    "dora, pp2, expanded": (
        2,
        "expanded",
        {"pipeline_model_parallel_size": 2},
        {"kind": "dora", "target_modules": DENSE},
        NOT_DENSE,
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
        REGATHER | {"share_expert_adapters": False, "target_modules": TARGETS},
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
    if processes > 1:
        return
    # And by PEFT itself, onto transformers' model.
    tokens = torch.load(published / "tokens.pt")
    found = adapted_logits(published, tmp_path / "adapters", tokens)
    expected = torch.load(tmp_path / "logits.pt")[..., : found.shape[-1]]
    assert record("logits", relative(found, expected)) < LOGITS


def test_what_does_not_go_is_refused(bridge_ranks, published):
    run(bridge_ranks, 1, "refuse", published, "headwise")


def test_where_adapters_do_not_go_is_refused(bridge_ranks, published):
    run(bridge_ranks, 2, "refuse_places", published)


def test_expanded_gate_is_trained_saved_and_resumed(bridge_ranks, published, tmp_path):
    run(bridge_ranks, 1, "resume", published, tmp_path, json.dumps(DENSE))


def test_dropout_is_applied_to_experts_in_place(bridge_ranks, published):
    run(bridge_ranks, 1, "drop", published)
