"""`megatron_to_hf`: one gathered weight after the other, against what was loaded."""

from __future__ import annotations

import re

import pytest
import torch
from support.ours import build
from support.reference import random_weights, tiny_config, write_hf_folder

from step35_patch import Step35Config
from step35_patch.checkpoint import published_tensors_of
from step35_patch.frameworks import WholeTensors, megatron_to_hf
from step35_patch.settings import GATE_LAYOUTS
from step35_patch.tensors.megatron import megatron_tensors
from step35_patch.tensors.qkv import DriftedGateError

pytestmark = [pytest.mark.megatron, pytest.mark.transformer_engine]

EXPERT = re.compile(r"\.moe\.experts\.(\d+)\.")
DOWN = torch.ones(32, 24)
QKV = "decoder.layers.1.self_attention.linear_qkv.weight"


def named_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The parameters and router biases of a model on one rank, whose names are global."""
    buffers = {name: b for name, b in model.named_buffers() if name.endswith("expert_bias")}
    return dict(model.named_parameters()) | buffers


def folder_of(tmp_path, seed=61, **changes):
    config = tiny_config(**changes)
    weights = random_weights(config, seed)
    return config, weights, write_hf_folder(tmp_path / "hf", config, weights)


def together(pairs: list[tuple[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Published tensors by name, single experts put together in the order of their numbers."""
    found: dict[str, torch.Tensor] = {}
    experts: dict[str, dict[int, torch.Tensor]] = {}
    for name, tensor in pairs:
        if match := EXPERT.search(name):
            experts.setdefault(EXPERT.sub(".moe.", name), {})[int(match[1])] = tensor
        else:
            assert name not in found
            found[name] = tensor
    stacked = {name: torch.stack([of[i] for i in sorted(of)]) for name, of in experts.items()}
    return found | stacked


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("gate_layout", GATE_LAYOUTS)
@pytest.mark.parametrize("plain", [False, True], ids=["model's config", "Step35Config"])
def test_every_weight_of_a_model_becomes_the_published_ones(tmp_path, gate_layout, plain):
    """Bit for bit what was loaded, in names of `named_parameters`, wrapped and not."""
    config, weights, folder = folder_of(tmp_path)
    model = build(folder, gate_layout=gate_layout)
    described = Step35Config.from_dict(config) if plain else model.config
    pairs = []
    for number, (name, tensor) in enumerate(named_weights(model).items()):
        pairs += megatron_to_hf(number % 3 * "module." + name, tensor, described)
    assert_same(together(pairs), weights)
    assert not any(tensor.requires_grad for _, tensor in pairs)


@pytest.mark.parametrize("backwards", [False, True])
def test_experts_together_are_the_published_tensors(tmp_path, backwards):
    """Each once, also the second time; what is held back is a copy."""
    _, weights, folder = folder_of(tmp_path, seed=62)
    model = build(folder)
    whole = WholeTensors(model.config)
    names = named_weights(model)
    for factor in (1, 2):
        found = []
        for name in sorted(names, reverse=backwards):
            sent = names[name].detach() * factor
            found += [(one, tensor.clone()) for one, tensor in whole(name, sent)]
            sent.zero_()
        assert len(found) == len(dict(found))
        assert_same(dict(found), {name: tensor * factor for name, tensor in weights.items()})
    assert_same(dict(published_tensors_of(model)), weights)


def test_expert_that_comes_again_before_the_others_is_refused():
    whole = WholeTensors(Step35Config.from_dict(tiny_config()))
    for expert in (0, 2):
        assert whole(f"decoder.layers.3.mlp.experts.linear_fc2.weight{expert}", DOWN) == []
    with pytest.raises(ValueError, match=r"weight2: expected the other experts .* found this one"):
        whole("decoder.layers.3.mlp.experts.linear_fc2.weight2", DOWN)


@pytest.mark.parametrize("gate_layout", GATE_LAYOUTS)
def test_checkpoint_s_keys_are_names_too(gate_layout):
    """Of a checkpoint's tensors, all experts of a layer in one, with padded vocabularies."""
    described = Step35Config.from_dict(tiny_config())
    for tensor in megatron_tensors(described, gate_layout):
        shape = list(tensor.shape)
        shape[0] += 32 * tensor.is_vocabulary
        values = torch.zeros(shape)
        shapes = {name: tuple(t.shape) for name, t in megatron_to_hf(tensor.key, values, described)}
        assert shapes == {one.name: one.shape for one in tensor.row.published}


def test_sequential_and_grouped_names_are_one_expert():
    described = Step35Config.from_dict(tiny_config())
    weight = torch.randn(48, 32)
    prefix = "module.module.decoder.layers.3.mlp.experts."
    found = [
        megatron_to_hf(prefix + name, weight, described)
        for name in ("linear_fc1.weight2", "local_experts.2.linear_fc1.weight")
    ]
    names = [f"model.layers.3.moe.experts.2.{part}_proj.weight" for part in ("gate", "up")]
    for pairs in found:
        assert [name for name, _ in pairs] == names
        assert torch.equal(torch.cat([tensor for _, tensor in pairs]), weight)


def test_trained_gate_of_the_expanded_layout_is_its_first_row(tmp_path):
    """An optimizer moves the first row alone; the others follow when the model is saved."""
    _, weights, folder = folder_of(tmp_path, seed=63)
    model = build(folder, gate_layout="expanded")
    parameter = dict(model.named_parameters())[QKV]
    attention = model.decoder.layers[1].self_attention
    with torch.no_grad():
        attention.tied_gate_rows(parameter)[:, :, 0] += 0.5
    sent = dict(megatron_to_hf(QKV, parameter, model.config))
    name = "model.layers.1.self_attn.g_proj.weight"
    assert torch.equal(sent[name], weights[name] + 0.5)
    with pytest.raises(DriftedGateError, match=r"linear_qkv.* differ by up to 0\.5"):
        megatron_to_hf(QKV, parameter, Step35Config.from_dict(tiny_config()))
    assert torch.equal(sent[name], dict(published_tensors_of(model))[name])


@pytest.mark.parametrize(
    "name",
    [
        "decoder.layers.6.self_attention.linear_proj.weight",
        "decoder.layers.1.mlp.router.weight",
        "decoder.layers.3.mlp.experts.linear_fc1.weight4",
        "mtp.layers.2.eh_proj.weight",
        "decoder.layers.1.self_attention.linear_qkv.bias",
        "vp_stages.0.output_layer.weight",
    ],
)
def test_unknown_name_is_refused(name):
    described = Step35Config.from_dict(tiny_config())
    with pytest.raises(ValueError, match=rf"^{re.escape(name)}: .*has no such weight"):
        megatron_to_hf(name, torch.zeros(4, 4), described)


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        (QKV, (100, 32), r"\[166, 32\] or \[256, 32\]"),
        ("output_layer.weight", (95, 32), r"\[96, 32\] or more rows"),
        ("output_layer.weight", (1, 32), r"\[96, 32\] or more rows"),
        ("embedding.word_embeddings.weight", (96, 16), r"\[96, 32\] or more rows"),
        ("decoder.layers.3.mlp.experts.linear_fc1.weight0", (24, 32), r"\[48, 32\]"),
        ("decoder.layers.0.mlp.linear_fc2.weight", (32, 24), r"\[32, 48\]"),
        ("decoder.final_layernorm.weight", (), r"\[32\]"),
    ],
)
def test_part_of_a_weight_is_refused(name, shape, expected):
    described = Step35Config.from_dict(tiny_config())
    message = rf"^{re.escape(name)}: expected the whole weight, {expected}, found \["
    with pytest.raises(ValueError, match=message):
        megatron_to_hf(name, torch.zeros(shape), described)


def test_other_model_s_config_is_refused():
    from megatron.core.transformer.transformer_config import TransformerConfig

    other = TransformerConfig(num_layers=1, hidden_size=8, num_attention_heads=2)
    for config in (other, {"hidden_size": 32}):
        with pytest.raises(ValueError, match=r"^config: expected a Step35Config or"):
            megatron_to_hf("output_layer.weight", torch.zeros(96, 32), config)
