"""Weights of the published layout into a live model and back, and all that can be wrong there."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.ours import build
from support.reference import random_weights, tiny_config, write_hf_folder

from step35_patch import Step35Config
from step35_patch.checkpoint import load_hf_weights, save_hf_weights
from step35_patch.storage.errors import CheckpointError
from step35_patch.storage.hf_folder import INDEX
from step35_patch.tensors.qkv import DriftedGateError, pack_qkv, unpack_qkv

pytestmark = pytest.mark.megatron


@pytest.fixture
def case(tmp_path):
    config = tiny_config(architectures=["Step3p5ForCausalLM"], a_field_of_the_future=[1, {"b": 2}])
    weights = random_weights(config, 41)
    return config, weights, write_hf_folder(tmp_path / "hf", config, weights)


def read(folder) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def assert_same(found, wanted):
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("gate_layout", ["headwise", "expanded"])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 30_000])
def test_round_trip_is_bit_for_bit(case, tmp_path, gate_layout, max_shard_bytes):
    config, weights, folder = case
    model = build(folder, gate_layout=gate_layout)
    save_hf_weights(model, tmp_path / "out", max_shard_bytes=max_shard_bytes)
    assert_same(read(tmp_path / "out"), weights)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert set(index["weight_map"]) == set(weights)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in weights.values())
    for file in set(index["weight_map"].values()):
        with safe_open(tmp_path / "out" / file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
    # What was written is read again like the published checkpoint.
    load_hf_weights(model, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "out"]


def test_bf16_checkpoint_keeps_the_router_bias_in_fp32(tmp_path):
    config = tiny_config(torch_dtype="bfloat16")
    weights = {
        name: tensor if name.endswith("router_bias") else tensor.to(torch.bfloat16)
        for name, tensor in random_weights(config, 42).items()
    }
    folder = write_hf_folder(tmp_path / "hf", config, weights)
    model = build(folder, bf16=True, params_dtype=torch.bfloat16)
    save_hf_weights(model, tmp_path / "out")
    assert_same(read(tmp_path / "out"), weights)


def test_dtype_is_converted_on_request_only(case, tmp_path):
    _, weights, folder = case
    save_hf_weights(build(folder), tmp_path / "out", dtype=torch.bfloat16)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    found = read(tmp_path / "out")
    assert found["model.layers.2.moe.router_bias"].dtype == torch.float32
    assert torch.equal(found["lm_head.weight"], weights["lm_head.weight"].to(torch.bfloat16))
    with pytest.raises(ValueError, match="dtype: expected one of"):
        save_hf_weights(build(folder), tmp_path / "other", dtype=torch.int8)


def test_config_that_transformers_saved_gets_one_dtype(tmp_path):
    """transformers writes "dtype"; a converted model's config.json must not say two things."""
    from transformers.models.step3p7.configuration_step3p7 import Step3p7TextConfig

    config = {name: value for name, value in tiny_config().items() if name != "model_type"}
    Step3p7TextConfig(**config).save_pretrained(tmp_path / "hf")
    assert "dtype" in json.loads((tmp_path / "hf" / "config.json").read_text())
    save_file(random_weights(tiny_config(), 1), tmp_path / "hf" / "model.safetensors")
    save_hf_weights(build(tmp_path / "hf"), tmp_path / "out", dtype=torch.bfloat16)
    document = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "dtype" not in document and document["torch_dtype"] == "bfloat16"
    assert Step35Config.from_pretrained(tmp_path / "out").torch_dtype == "bfloat16"


def test_config_of_a_quantized_folder_is_not_what_is_saved(case, tmp_path):
    """Neither is the name of code that does not come along."""
    config, weights, folder = case
    document = config | {
        "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
        "auto_map": {"AutoConfig": "configuration_step3p5.Step3p5Config"},
    }
    (folder / "config.json").write_text(json.dumps(document))
    save_hf_weights(build(folder), tmp_path / "out")
    assert_same(read(tmp_path / "out"), weights)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config


def test_all_wrong_tensors_are_listed_and_nothing_is_loaded(case, tmp_path):
    config, weights, folder = case
    model = build(folder)
    before = {
        name: value.clone() for name, value in model.state_dict().items() if value is not None
    }
    wrong = dict(weights)
    del wrong["model.layers.7.transformer.shared_head.output.weight"]
    wrong["model.layers.8.enorm.weight"] = torch.zeros(32)
    wrong["model.layers.1.self_attn.g_proj.weight"] = torch.zeros(4, 32)
    wrong["model.layers.2.moe.router_bias"] = weights["model.layers.2.moe.router_bias"].half()
    with pytest.raises(CheckpointError) as error:
        load_hf_weights(model, write_hf_folder(tmp_path / "wrong", config, wrong))
    text = str(error.value)
    assert len(error.value.problems) == 4
    assert "model.layers.7.transformer.shared_head.output.weight: missing" in text
    assert "model.layers.8.enorm.weight: unexpected" in text
    assert "g_proj.weight: shape (4, 32) in model.safetensors, expected (6, 32)" in text
    assert "router_bias: dtype F16 in model.safetensors, expected F32" in text
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def _shards(folder, weights):
    """The weights in two files and an index."""
    names = sorted(weights)
    parts = {"a.safetensors": names[:50], "b.safetensors": names[50:]}
    (folder / "model.safetensors").unlink()
    for file, part in parts.items():
        save_file({name: weights[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return weight_map


def test_sharded_folder_is_read(case, tmp_path):
    _, weights, folder = case
    _shards(folder, weights)
    model = build(folder)
    save_hf_weights(model, tmp_path / "out")
    assert_same(read(tmp_path / "out"), weights)


def _truncate(folder, weights):
    _shards(folder, weights)
    file = folder / "b.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    return "b.safetensors: not readable"


def _leave_the_folder(folder, weights):
    weight_map = _shards(folder, weights)
    weight_map["lm_head.weight"] = "../a.safetensors"
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return "'../a.safetensors' leaves the folder"


def _store_twice(folder, weights):
    _shards(folder, weights)
    name = "lm_head.weight"
    part = load_file(folder / "b.safetensors") | {name: weights[name]}
    save_file(part, folder / "b.safetensors")
    return f"{name}: stored twice, in a.safetensors and b.safetensors"


def _break_the_index(folder, weights):
    _shards(folder, weights)
    (folder / INDEX).write_text('{"weight_map": ')
    return f"{INDEX}: expected an object with a weight_map"


def _lose_a_file(folder, weights):
    _shards(folder, weights)
    (folder / "a.safetensors").unlink()
    return "a.safetensors: not readable"


def _lose_everything(folder, weights):
    (folder / "model.safetensors").unlink()
    return "found neither"


@pytest.mark.parametrize(
    "harm",
    [
        _truncate,
        _leave_the_folder,
        _store_twice,
        _break_the_index,
        _lose_a_file,
        _lose_everything,
    ],
)
def test_broken_folder_is_an_error(case, harm):
    _, weights, folder = case
    model = build(folder)
    expected = harm(folder, weights)
    with pytest.raises(CheckpointError) as error:
        load_hf_weights(model, folder)
    assert expected in str(error.value)


@pytest.mark.parametrize("trained", [None, 1])
def test_mtp_layers_that_are_not_trained_are_kept(case, tmp_path, trained):
    _, weights, folder = case
    model = build(folder, mtp_num_layers=trained)
    assert len(getattr(model, "mtp_output_heads", torch.nn.Module())._modules) == (trained or 0)
    with pytest.raises(ValueError, match=r"mtp_from: the model has . of the config's 2 MTP layers"):
        save_hf_weights(model, tmp_path / "out")
    with torch.no_grad():
        model.decoder.final_layernorm.weight += 1
    save_hf_weights(model, tmp_path / "out", mtp_from=folder)
    wanted = weights | {"model.norm.weight": weights["model.norm.weight"] + 1}
    assert_same(read(tmp_path / "out"), wanted)
    with pytest.raises(ValueError, match="expected None"):
        save_hf_weights(build(folder), tmp_path / "other", mtp_from=folder)


def test_existing_output_is_kept(case, tmp_path):
    model = build(case[2])
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="exists already"):
        save_hf_weights(model, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine.txt"]


def test_drifted_gate_is_refused(case):
    """Weights of an expanded gate that stock Megatron-Core trained: rows of a head differ."""
    model = build(case[2], gate_layout="expanded")
    state = {name: value for name, value in model.state_dict().items() if value is not None}
    name = "decoder.layers.1.self_attention.linear_qkv.weight"
    state[name] = state[name].clone()
    state[name][3 * 16 + 5] += 0.25  # row 5 of the first head's gate
    with pytest.raises(DriftedGateError, match=r"layer 1: linear_qkv: .* up to 0.25"):
        model.load_state_dict(state)


def test_write_that_fails_leaves_nothing(case, tmp_path, monkeypatch):
    from step35_patch.storage import hf_folder as hf_files

    model = build(case[2])
    written = []

    def full_disk(tensors, path, metadata):
        if written:
            raise OSError(28, "No space left on device")
        written.append(path)
        save_file(tensors, path, metadata=metadata)

    monkeypatch.setattr(hf_files, "save_file", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_hf_weights(model, tmp_path / "out", max_shard_bytes=30_000)
    assert written and [p.name for p in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("gate_layout", [None, "headwise", "expanded"])
def test_qkv_rows_stand_by_group(gate_layout):
    plan = Step35Config.from_dict(tiny_config()).layers[1]  # 6 heads, 2 groups, 16 channels
    generator = torch.Generator().manual_seed(0)
    q, k, v, g = (torch.randn(n, 32, generator=generator) for n in (96, 32, 32, 6))
    packed = pack_qkv(q, k, v, g, plan, gate_layout)
    rows = {None: 0, "headwise": 3, "expanded": 48}[gate_layout]
    second = packed.view(2, -1, 32)[1]
    assert torch.equal(second[:48], q[48:])
    if rows:
        assert torch.equal(second[48 : 48 + rows], g[3:].repeat_interleave(rows // 3, 0))
    assert torch.equal(second[48 + rows : 64 + rows], k[16:])
    assert torch.equal(second[64 + rows :], v[16:])
    for found, wanted in zip(unpack_qkv(packed, plan, gate_layout, "w"), (q, k, v, g), strict=True):
        assert (found is None and gate_layout is None) or torch.equal(found, wanted)


def test_gate_layouts_have_the_published_sizes():
    from step35_patch.config import packaged_config_path

    layers = Step35Config.from_pretrained(packaged_config_path()).layers
    heads = sum(plan.num_attention_heads for plan in layers)
    redundant = heads * (layers[0].kv_channels - 1) * 4096
    assert redundant == 2_197_291_008
