"""Megatron-Core's static engine under parallel layouts: real processes, gloo."""

from __future__ import annotations

import json

import pytest
import torch
from support.generation import assert_chosen_by
from support.provider_layouts import EP, PP, TP
from support.reference import (
    WINDOW,
    Reference,
    random_tokens,
    random_weights,
    tiny_config,
    write_hf_folder,
)

pytestmark = pytest.mark.slow

NEW = 2 * WINDOW
LAYOUTS = {
    "tp2 and pp2": (4, {TP: 2, PP: 2}),
    # Megatron-Core takes the MoE layers alone for sequence-parallel then.
    "tp2 and ep2": (
        2,
        {TP: 2, EP: 2, "expert_tensor_parallel_size": 1, "sequence_parallel": True},
    ),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("tp2 and pp2", marks=[pytest.mark.megatron, pytest.mark.transformer_engine]),
        "tp2 and ep2",
    ],
)
def test_layout(ranks, tmp_path, name):
    processes, layout = LAYOUTS[name]
    config = tiny_config()
    weights = random_weights(config, 9)
    folder = write_hf_folder(tmp_path / "hf", config, weights)
    prompts, _ = random_tokens(9, 2, WINDOW + 3)
    torch.save([prompts[0, :WINDOW], prompts[1]], tmp_path / "prompts.pt")
    arguments = folder, tmp_path / "prompts.pt", NEW, tmp_path / "out.pt", json.dumps(layout)
    code = "from support import generation_worker; generation_worker.main(*arguments)"
    ended = ranks.run(code, processes, *arguments)
    assert ended.statuses == [0] * processes, ended.text[-8000:]
    for tokens in torch.load(tmp_path / "out.pt"):
        assert_chosen_by(Reference(config, weights), tokens[None], NEW)
