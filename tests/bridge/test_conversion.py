"""AutoBridge on a folder in the published layout: the model, and the tensors back, by layout."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.bridge_processes import needs_bridge
from support.figures import record
from support.parity import LOGITS, relative
from support.reference import Reference

from step35_patch import Step35Config

pytestmark = needs_bridge

LOCAL = {"transformer_impl": "local", "moe_grouped_gemm": False}
# The vocabulary has 97 tokens, which no layout divides.
LAYOUTS = {
    "one process": (1, "headwise", {}),
    "one process, expanded": (1, "expanded", {}),
    "one process, local": (1, "headwise", LOCAL),
    "tp2": (2, "headwise", {"tensor_model_parallel_size": 2, "sequence_parallel": True}),
    "pp2 with virtual stages, expanded": (
        2,
        "expanded",
        {
            "pipeline_model_parallel_size": 2,
            "pipeline_model_parallel_layout": "Ett|tt|tt|mmL",
            "overlap_p2p_comm": True,
            "batch_p2p_comm": False,
        },
    ),
    "ep2 tp2": (
        4,
        "headwise",
        {
            "expert_model_parallel_size": 2,
            "expert_tensor_parallel_size": 1,
            "tensor_model_parallel_size": 2,
            "sequence_parallel": True,
            "pipeline_model_parallel_size": 2,
        },
    ),
    "ep2 etp2, local, expanded": (
        4,
        "expanded",
        {
            "expert_model_parallel_size": 2,
            "expert_tensor_parallel_size": 2,
            "tensor_model_parallel_size": 2,
            "sequence_parallel": True,
            **LOCAL,
        },
    ),
}


@pytest.fixture(scope="module")
def logits(published):
    """transformers' of the folder's tokens."""
    config = json.loads((published / "config.json").read_text())
    reference = Reference(config, load_file(published / "model.safetensors"))
    tokens = torch.load(published / "tokens.pt")
    return reference.logits(reference.hidden_states(tokens)).detach()


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_tensor_comes_back(bridge_ranks, published, logits, tmp_path, name):
    weights = load_file(published / "model.safetensors")
    processes, gate_layout, fields = LAYOUTS[name]
    ended = bridge_ranks.run(
        "from support.bridge_worker import convert\nconvert(*arguments)",
        processes,
        *(published, tmp_path, gate_layout, json.dumps(fields)),
    )
    assert not any(ended.statuses), ended.text[-6000:]
    if processes == 1:
        found = torch.load(tmp_path / "logits.pt")[..., : logits.shape[-1]]
        assert record("logits", relative(found, logits)) < LOGITS
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == weights.keys()
    for tensor_name, tensor in weights.items():
        half = tensor if tensor_name.endswith("router_bias") else 0.5 * tensor
        assert torch.equal(saved[tensor_name], half), tensor_name
    record("identical tensors", len(weights))
    # The config as it was published, not as Megatron-Bridge's class has it.
    assert Step35Config.from_pretrained(tmp_path) == Step35Config.from_pretrained(published)
    assert os.path.getsize(tmp_path / "tokenizer.json")


def test_a_folder_that_lacks_a_tensor_is_refused(bridge_ranks, published, tmp_path):
    folder = shutil.copytree(published, tmp_path / "hf")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.7.transformer.shared_head.output.weight"]
    save_file(weights, folder / "model.safetensors")
    ended = bridge_ranks.run(
        "from support.bridge_worker import convert\nconvert(*arguments)",
        1,
        *(folder, tmp_path / "out", "headwise", "{}"),
    )
    assert ended.statuses == [1] and "published tensors that the folder lacks" in ended.text
    assert "model.layers.7.transformer.shared_head.output.weight" in ended.text
