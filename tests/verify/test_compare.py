"""The comparison with the reference: models that agree, and where those that do not differ."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import save_file
from support.comparison import (
    HEADS,
    LENGTH,
    PARTS,
    Source,
    assert_agrees,
    change,
    change_one_expert,
    differing,
)
from support.parity import FEATURES
from support.reference import (
    SLIDING,
    WINDOW,
    Reference,
    random_weights,
    tiny_config,
    write_hf_folder,
)

from step35_patch import Step35Config
from step35_patch.storage.hf_folder import INDEX
from step35_patch.tensors.published import layer_tensors, published_tensors
from step35_patch.verify.api import compare

# With each Megatron-Core; the others run with the newest only.
every_version = pytest.mark.megatron


@every_version
def test_a_good_folder_agrees(case):
    seen = []
    report = compare(case[2], on_part=seen.append)
    assert_agrees(report)
    assert [part.name for part in report.parts] == PARTS
    assert tuple(seen) == report.parts
    assert {part.positions for part in report.parts} == {WINDOW + 64}
    kinds = [part.kind for part in report.parts if part.name.startswith("layer")]
    assert kinds[:3] == ["full, dense", "sliding, dense", "sliding, MoE"]
    assert kinds[4:7] == ["full, MoE", "sliding, MoE", "sliding, dense, MTP"]
    assert [logits.name for logits in report.logits] == HEADS
    # The hidden states that are carried differ by rounding, so the two sides are not one.
    assert report.parts[-1].end_to_end > 0


def test_a_sharded_folder_agrees(case, tmp_path):
    config, weights, _ = case
    names = sorted(weights)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        save_file({name: weights[name] for name in part}, tmp_path / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_agrees(compare(tmp_path, length=LENGTH))


@pytest.mark.parametrize("name", FEATURES)
def test_each_feature_agrees(tmp_path, name):
    config = tiny_config(**FEATURES[name])
    report = compare(write_hf_folder(tmp_path, config, random_weights(config, 52)), batch=2)
    assert_agrees(report)
    mtp = config.get("num_nextn_predict_layers", 0)
    assert len(report.parts) == 8 + 2 * mtp and len(report.logits) == 1 + mtp


def test_a_config_that_transformers_saved_agrees(case, tmp_path):
    from transformers.models.step3p7.configuration_step3p7 import Step3p7TextConfig

    # On saving, the MTP layers' clamps are lost.
    config = tiny_config(swiglu_limits=None, swiglu_limits_shared=None)
    write_hf_folder(tmp_path, config, case[1])
    Step3p7TextConfig.from_dict(config).save_pretrained(tmp_path)
    assert "per_layer_config" in json.loads((tmp_path / "config.json").read_text())
    assert_agrees(compare(tmp_path, length=LENGTH))


def test_experts_that_are_all_chosen_agree(tmp_path):
    config = tiny_config(moe_top_k=4)
    report = compare(write_hf_folder(tmp_path, config, random_weights(config, 53)), length=LENGTH)
    assert_agrees(report)
    assert not any(part.near_ties for part in report.parts)


def test_the_mtp_layers_can_be_left_out(case):
    report = compare(case[2], length=LENGTH, mtp=False)
    assert_agrees(report)
    assert [part.name for part in report.parts] == PARTS[:8]


# What our side's source has instead: tensor, change, and the only part that differs then.
FAULTS = [
    ("model.embed_tokens.weight", change, "embedding"),
    ("model.layers.1.self_attn.q_norm.weight", change, "layer 1"),
    ("model.layers.3.self_attn.g_proj.weight", change, "layer 3"),
    ("model.layers.3.moe.down_proj.weight", change_one_expert, "layer 3"),
    ("model.layers.4.moe.router_bias", change, "layer 4"),
    ("model.layers.5.share_expert.up_proj.weight", change, "layer 5"),
    ("model.norm.weight", change, HEADS[0]),
    ("lm_head.weight", change, HEADS[0]),
    ("model.layers.6.enorm.weight", change, "layer 6"),
    ("model.layers.7.transformer.shared_head.norm.weight", change, "layer 7"),
    (HEADS[2], change, HEADS[2]),
]


@pytest.mark.parametrize(("tensor", "change", "part"), FAULTS, ids=[fault[0] for fault in FAULTS])
def test_a_wrong_tensor_of_ours_is_found(case, tensor, change, part):
    _, weights, folder = case
    source = Source(weights | {tensor: change(weights[tensor])})
    report = compare(folder, source=source, length=LENGTH)
    assert not report.agrees
    assert report.first_difference.name == part
    # Given the reference's input, no other part differs; the embedding is read by MTP layers too.
    assert differing(report) == ([part, "layer 6", "layer 7"] if part == "embedding" else [part])
    assert report.suspects == (tensor,)
    # Carried on, everything behind it does.
    behind = report.parts[PARTS.index(part) :]
    if part not in HEADS:
        assert min(p.end_to_end for p in behind) > 1e-4
    assert any(logits.relative > 1e-4 for logits in report.logits)


def test_an_mtp_layer_is_told_from_its_output_matrix(case):
    _, weights, folder = case
    names = ["model.layers.6.eh_proj.weight", HEADS[1]]
    source = Source(weights | {name: change(weights[name]) for name in names})
    report = compare(folder, source=source, length=LENGTH)
    assert differing(report) == ["layer 6", HEADS[1]]
    assert report.suspects == (names[0],)


def test_a_tensor_of_one_wrong_number_is_found(case):
    _, weights, folder = case
    name = "model.layers.2.self_attn.v_proj.weight"
    wrong = weights[name].clone()
    wrong[3, 4] = math.nan
    report = compare(folder, source=Source(weights | {name: wrong}), length=LENGTH)
    assert report.first_difference.name == "layer 2"
    assert report.suspects == (name,)


@every_version
def test_wrong_code_of_ours_is_found(case, monkeypatch):
    from step35_patch import Step35ModelProvider

    from_hf = Step35ModelProvider.from_hf
    wider = lambda path, **options: from_hf(path, window="steptron", **options)  # noqa: E731
    monkeypatch.setattr(Step35ModelProvider, "from_hf", wider)
    report = compare(case[2], length=LENGTH, batch=2)
    sliding = [i for i, kind in enumerate(tiny_config()["layer_types"]) if kind == SLIDING]
    assert differing(report) == [f"layer {index}" for index in sliding]
    # One key more is to be seen where there is one.
    assert {p.differing for p in report.parts if p.differing} == {2 * (LENGTH - WINDOW)}
    assert report.suspects == ()


def test_what_a_layer_adds_to_is_not_what_its_difference_is_measured_by(case, tmp_path):
    """A feature as large as trained models have some hides no difference, and is none."""
    config, weights, _ = case
    weights = dict(weights)
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"].clone()
    weights["model.embed_tokens.weight"][:, 5] = 3e4
    folder = write_hf_folder(tmp_path, config, weights)
    report = compare(folder, length=LENGTH)
    assert report.agrees
    name = "model.layers.1.self_attn.g_proj.weight"
    source = Source(weights | {name: 1.01 * weights[name]})
    report = compare(folder, source=source, length=LENGTH)
    assert report.first_difference.name == "layer 1"
    assert report.parts[2].end_to_end < 1e-4


def test_near_ties_of_experts_are_told_from_differences(case, tmp_path):
    """Two experts that score alike: which one is chosen is rounding's choice, and counted."""
    config, weights, _ = case
    router, bias = "model.layers.2.moe.gate.weight", "model.layers.2.moe.router_bias"
    weights = weights | {router: weights[router].clone()}
    weights[router][1] = weights[router][0]
    weights[bias] = torch.tensor([0.0, 1e-7, 0.0, 0.0])
    folder = write_hf_folder(tmp_path, config, weights)
    source = Source(weights | {bias: torch.tensor([1e-7, 0.0, 0.0, 0.0])})
    report = compare(folder, source=source, length=LENGTH)
    part = report.parts[PARTS.index("layer 2")]
    assert 0 < part.near_ties < part.positions
    assert part.difference > 1e-2 and part.differing == 0
    assert report.agrees
    # One expert of the two preferred by far is no tie any more.
    source = Source(weights | {bias: torch.tensor([0.2, 0.0, 0.0, 0.0])})
    assert compare(folder, source=source, length=LENGTH).first_difference.name == "layer 2"


def test_the_logits_are_those_of_the_whole_models(case, monkeypatch):
    """All numbers of the logits, from transformers' whole model with the weights of either side."""
    from step35_patch.verify import pieces
    from step35_patch.verify.by_layer import _random_tokens

    # Several blocks of the vocabulary, the last one shorter.
    monkeypatch.setattr(pieces, "VOCABULARY_ROWS", 36)
    config, weights, folder = case
    name = "model.layers.1.self_attn.o_proj.weight"
    changed = weights | {name: change(weights[name])}
    report = compare(folder, source=Source(changed), length=LENGTH, batch=2, seed=7)
    tokens = _random_tokens(Step35Config.from_dict(config), (2, LENGTH), 7)
    both = []
    for side in (weights, changed):
        reference = Reference(config, side)
        with torch.no_grad():
            hidden = reference.hidden_states(tokens)
            both.append([reference.logits(hidden), *reference.mtp_logits(tokens, hidden)])
    for found, wanted, ours in zip(report.logits, *both, strict=True):
        cosine = torch.nn.functional.cosine_similarity(wanted.double(), ours.double(), dim=-1)
        assert found.cosine_min == pytest.approx(cosine.min().item(), abs=1e-6)
        assert found.cosine_mean == pytest.approx(cosine.mean().item(), abs=1e-6)
        largest = (wanted - ours).abs().max().item()
        assert found.largest == pytest.approx(largest, rel=1e-4)
        assert found.relative == pytest.approx(largest / wanted.abs().max().item(), rel=1e-4)
        top1 = (wanted.argmax(-1) == ours.argmax(-1)).double().mean().item()
        assert found.top1 == pytest.approx(top1) and 0.2 < top1 < 1


def test_bfloat16_agrees_coarsely(tmp_path):
    config = tiny_config(torch_dtype="bfloat16")
    weights = {
        name: tensor if name.endswith("router_bias") else tensor.bfloat16()
        for name, tensor in random_weights(config, 54).items()
    }
    folder = write_hf_folder(tmp_path, config, weights)
    assert_agrees(compare(folder, length=LENGTH))  # in float32
    report = compare(folder, length=LENGTH, dtype=torch.bfloat16)
    assert report.agrees and report.tolerance == 5e-2
    assert max(part.difference for part in report.parts) > 1e-3
    name = "model.layers.3.self_attn.g_proj.weight"
    source = Source(weights | {name: change(weights[name])})
    report = compare(folder, source=source, length=LENGTH, dtype=torch.bfloat16)
    assert differing(report) == ["layer 3"]


def test_the_tensors_of_the_parts_are_all(case):
    """Every published tensor is some part's: a wrong one cannot be missed for being in none."""
    config = Step35Config.from_dict(case[0])
    of_layers = {info.name for plan in config.layers for info in layer_tensors(config, plan)}
    others = {info.name for info in published_tensors(config)} - of_layers
    assert others == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
