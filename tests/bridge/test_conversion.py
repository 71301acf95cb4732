"""AutoBridge on a folder in the published layout: the model, and the tensors back, by layout."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file
from support.bridge_processes import needs_bridge
from support.parity import LOGITS, relative
from support.reference import Reference, random_tokens, random_weights, tiny_config, write_hf_folder
from support.tokenizer import write_tokenizer

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
def published(tmp_path_factory):
    config = tiny_config(vocab_size=97, architectures=["Step3p5ForCausalLM"])
    weights = random_weights(config, 11)
    folder = write_hf_folder(tmp_path_factory.mktemp("published"), config, weights)
    write_tokenizer(folder, 97)
    tokens, _ = random_tokens(11, 2, 24)
    torch.save(tokens, folder / "tokens.pt")
    reference = Reference(config, weights)
    return folder, weights, reference.logits(reference.hidden_states(tokens)).detach()


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_tensor_comes_back(bridge_ranks, published, tmp_path, name):
    folder, weights, logits = published
    processes, gate_layout, fields = LAYOUTS[name]
    ended = bridge_ranks.run(
        "from support.bridge_worker import convert\nconvert(*arguments)",
        processes,
        *(folder, tmp_path, gate_layout, json.dumps(fields)),
    )
    assert not any(ended.statuses), ended.text[-6000:]
    if processes == 1:
        found = torch.load(tmp_path / "logits.pt")[..., : logits.shape[-1]]
        assert relative(found, logits) < LOGITS
    saved = load_file(tmp_path / "model.safetensors")
    assert saved.keys() == weights.keys()
    for tensor_name, tensor in weights.items():
        half = tensor if tensor_name.endswith("router_bias") else 0.5 * tensor
        assert torch.equal(saved[tensor_name], half), tensor_name
    # The config as it was published, not as Megatron-Bridge's class has it.
    assert Step35Config.from_pretrained(tmp_path) == Step35Config.from_pretrained(folder)
    assert os.path.getsize(tmp_path / "tokenizer.json")
