"""Parallel layouts of a model of `tiny_config`, as overrides of Step35ModelProvider."""

from __future__ import annotations

from typing import Any

TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
VPP, EP = "virtual_pipeline_model_parallel_size", "expert_model_parallel_size"
CP = "context_parallel_size"
# As pretrain_gpt.py's arguments set them; a virtual pipeline of two stages needs it.
OVERLAP = {"overlap_p2p_comm": True, "batch_p2p_comm": False}

# Name: (processes, provider's overrides, the layers that each rank must hold or None)
LAYOUTS: dict[str, tuple[int, dict[str, Any], list[list[int]] | None]] = {
    "tp2 with sequence parallelism": (2, {TP: 2, "sequence_parallel": True}, None),
    "expert parallel": (2, {EP: 2}, None),
    "context parallel": (2, {CP: 2}, None),
    "pipeline": (2, {PP: 2}, [[0, 1, 2], [3, 4, 5, 6, 7]]),
    "virtual pipeline": (2, {PP: 2, VPP: 3, **OVERLAP}, [[0, 2, 4], [1, 3, 5, 6, 7]]),
    "uneven pipeline": (
        2,
        {PP: 2, "num_layers_in_first_pipeline_stage": 5, "num_layers_in_last_pipeline_stage": 1},
        [[0, 1, 2, 3, 4], [5, 6, 7]],
    ),
    "no decoder layer on the last stage": (
        2,
        {PP: 2, "pipeline_model_parallel_layout": "Et*6|mmL"},
        [[0, 1, 2, 3, 4, 5], [6, 7]],
    ),
    "expanded gate, tp2": (
        2,
        {TP: 2, "sequence_parallel": True, "gate_layout": "expanded"},
        None,
    ),
    "tp2 and pp2": (4, {TP: 2, PP: 2, "sequence_parallel": True}, None),
    "tp2 and cp2": (4, {TP: 2, CP: 2, "sequence_parallel": True}, None),
}
