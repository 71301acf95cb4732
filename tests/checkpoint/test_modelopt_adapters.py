"""A model with ModelOpt's LoRA: nothing changes at the start, and its weights are saved merged.

ModelOpt is used where it is installed; a stand-in of the same shape shows the rest without it.
"""

from __future__ import annotations

import copy
import importlib.util

import pytest
import torch
from support.modelopt_lora import adapt, adapt_by_modelopt
from support.ours import build, run
from support.reference import random_tokens, random_weights, tiny_config, write_hf_folder

import step35_patch
from step35_patch.checkpoint import load_hf_weights, published_tensors_of, save_hf_weights
from step35_patch.model.adapters import check_adapters
from step35_patch.tensors.qkv import DriftedGateError, gate_rows

INSTALLED = importlib.util.find_spec("modelopt") is not None
PUT = [
    pytest.param(adapt, id="same shape"),
    pytest.param(
        adapt_by_modelopt,
        id="ModelOpt",
        marks=pytest.mark.skipif(not INSTALLED, reason="ModelOpt is not installed"),
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = tiny_config()
    return write_hf_folder(tmp_path_factory.mktemp("hf"), config, random_weights(config, 5))


@pytest.mark.parametrize("gate_layout", ["headwise", "expanded"])
@pytest.mark.parametrize("put", PUT)
def test_it_is_saved_merged_or_apart(folder, tmp_path, put, gate_layout):
    step35_patch.activate(folder)
    own = {"transformer_impl": "local", "moe_grouped_gemm": False, "gate_layout": gate_layout}
    tokens, _ = random_tokens(5, 2, 24)
    model = build(folder, **own)
    with torch.no_grad():
        plain, base = run(model, tokens), dict(published_tensors_of(model))
        base = {name: tensor.clone() for name, tensor in base.items()}
        model = put(model)
        assert torch.equal(run(model, tokens), plain)
        for name, parameter in model.named_parameters():
            if "lora_b_default" in name:
                parameter.normal_(std=0.3)
        adapted = run(model, tokens)
    # Of each layer, routed experts that would read tokens in place included.
    assert (adapted - plain).abs().max() > 1

    for call in (
        lambda: save_hf_weights(model, tmp_path / "no"),
        lambda: load_hf_weights(model, folder),
    ):
        with pytest.raises(ValueError, match=r"adapters: expected .*'apart'"):
            call()
    apart = dict(published_tensors_of(model, adapters="apart"))
    assert apart.keys() == base.keys()
    assert all(torch.equal(apart[name], tensor) for name, tensor in base.items())
    save_hf_weights(model, tmp_path / "merged", adapters="merged")
    merged = build(tmp_path / "merged", **own)
    with torch.no_grad():
        assert torch.allclose(run(merged, tokens), adapted, rtol=1e-5, atol=5e-5)

    if gate_layout == "expanded":  # as trained by Megatron-Core's own gate
        attention = model.decoder.layers[1].self_attention
        model.state_dict()  # saving makes the rows of a head equal
        attention.check_gate_rows()
        b = attention.linear_qkv.lora_b_default.weight
        gate_rows(b.data, attention.qkv)[:, :, 1:] += 0.1
        with pytest.raises(DriftedGateError, match=r"layer 1: linear_qkv's adapter"):
            attention.check_gate_rows()


def test_where_it_does_not_go_is_refused(folder):
    step35_patch.activate(folder)
    model = adapt(build(folder, transformer_impl="local", moe_grouped_gemm=False))
    check_adapters([model])
    expert = model.decoder.layers[2].mlp.experts.local_experts[0]
    for field, where in (
        ("expert_model_parallel_size", r"local_experts\.0\.linear_fc1"),
        ("sequence_parallel", r"local_experts\.0\.linear_fc1"),
    ):
        config = copy.copy(expert.linear_fc1.config)
        setattr(config, field, 2)
        expert.linear_fc1.config = config
        with pytest.raises(ValueError, match=f"{where}: .*{field}"):
            check_adapters([model])
