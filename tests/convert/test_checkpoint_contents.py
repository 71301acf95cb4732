"""What is in a converted checkpoint: what Megatron-Core asks for, torch reads and training adds."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from support.converted import GATE_LAYOUTS, SMALL_FILES, assert_same, read, save_dcp, weights_of
from support.reference import tiny_config, write_hf_folder
from support.stored import stored_tensors

from step35_patch import Step35Config
from step35_patch.convert import convert_to_hf, convert_to_megatron
from step35_patch.tensors.megatron import extra_states, megatron_tensors

# The lists that have an entry for each MTP layer in tests' configs.
PER_LAYER = (
    "layer_types",
    "rope_theta",
    "partial_rotary_factors",
    "swiglu_limits",
    "swiglu_limits_shared",
)


@pytest.mark.megatron
@pytest.mark.parametrize("gate_layout", GATE_LAYOUTS)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_head_wise_attn_gate": False},
        {"num_nextn_predict_layers": 0} | {n: tiny_config()[n][:6] for n in PER_LAYER},
        {"moe_layers_enum": ""},
    ],
    ids=["published kind", "no gate", "no MTP", "no MoE"],
)
def test_keys_and_shapes_are_those_of_a_built_model(tmp_path, gate_layout, changes):
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import apply_factories
    from support.ours import build

    config = tiny_config(**changes)
    hf = write_hf_folder(tmp_path / "hf", config, weights_of(config))
    state = build(hf, gate_layout=gate_layout).sharded_state_dict()
    apply_factories(state)
    values = list(nested_values(state))
    wanted = {v.key: tuple(v.global_shape) for v in values if isinstance(v, ShardedTensor)}
    tensors = megatron_tensors(Step35Config.from_pretrained(hf), gate_layout)
    assert {tensor.key: tensor.shape for tensor in tensors} == wanted
    objects = {v.unique_key for v in values if not isinstance(v, ShardedTensor)}
    assert objects <= set(extra_states(Step35Config.from_pretrained(hf)))


def test_every_module_of_transformer_engine_finds_its_extra_state():
    """All that have weights but the embedding, the output layer and routers, which are not its own.

    tests/convert/test_transformer_engine.py asks its modules.
    """
    config = Step35Config.from_dict(tiny_config())
    wanted = set()
    for tensor in megatron_tensors(config, "headwise"):
        module = tensor.key.rpartition(".")[0]
        if module in ("embedding.word_embeddings", "output_layer") or module.endswith("router"):
            continue
        shards = tensor.shape[0] if ".experts.experts." in module else 1
        wanted |= {f"{module}._extra_state/shard_{n}_{shards}" for n in range(shards)}
    assert set(extra_states(config)) == wanted


@pytest.mark.megatron
@pytest.mark.parametrize("gate_layout", GATE_LAYOUTS)
def test_megatron_core_loads_what_load_hf_weights_does(case, tmp_path, gate_layout):
    from megatron.core import dist_checkpointing
    from support.ours import build

    _, _, hf = case
    convert_to_megatron(hf, tmp_path / "m", gate_layout=gate_layout, options=SMALL_FILES)
    bf16 = {"gate_layout": gate_layout, "bf16": True, "params_dtype": torch.bfloat16}
    wanted, model = build(hf, **bf16), build(hf, **bf16)
    biases = [name for name, _ in model.named_buffers() if name.endswith("expert_bias")]
    for value in [*model.parameters(), *map(model.get_buffer, biases)]:
        torch.nn.init.constant_(value, float("nan"))
    # Megatron-Core calls unexpected what the model asks for and the checkpoint lacks, and missing
    # the reverse: FP8 states of modules that the local implementation has not.
    state, missing, unexpected = dist_checkpointing.load(
        {"model": model.sharded_state_dict()}, str(tmp_path / "m" / "release"), strict="return_all"
    )
    assert not unexpected and all("_extra_state" in key for key in missing)
    model.load_state_dict(state["model"])
    for (name, found), (_, value) in zip(
        model.named_parameters(), wanted.named_parameters(), strict=True
    ):
        assert torch.equal(found, value), name
    for name in biases:
        found, value = model.get_buffer(name), wanted.get_buffer(name)
        assert torch.equal(found, value) and found.dtype == torch.float32, name


def test_torch_reads_the_checkpoint(case, tmp_path):
    """torch.distributed.checkpoint by itself, which knows nothing of Step-3.5."""
    _, weights, hf = case
    convert_to_megatron(hf, tmp_path / "m", options=SMALL_FILES)
    found = stored_tensors(tmp_path / "m" / "release")
    experts = found["decoder.layers.3.mlp.experts.experts.linear_fc1.weight"]
    gate, up = (weights[f"model.layers.3.moe.{n}_proj.weight"] for n in ("gate", "up"))
    assert torch.equal(experts, torch.cat([gate, up], dim=1))
    qkv = found["mtp.layers.1.transformer_layer.self_attention.linear_qkv.weight"]
    q, g, k, v = (weights[f"model.layers.7.self_attn.{n}_proj.weight"] for n in "qgkv")
    groups = [
        torch.cat(p) for p in zip(q.chunk(2), g.chunk(2), k.chunk(2), v.chunk(2), strict=True)
    ]
    assert torch.equal(qkv, torch.cat(groups))
    assert found["decoder.layers.3.mlp.router.expert_bias"].dtype == torch.float32


def test_optimizer_state_is_not_read(case, tmp_path):
    """Its bytes are overwritten: only who reads them can notice."""
    _, weights, hf = case
    convert_to_megatron(hf, tmp_path / "m")
    tensors = stored_tensors(tmp_path / "m" / "release")
    marked = torch.full((5000,), 1234.5)
    tensors |= {"optimizer.state.exp_avg.decoder.final_layernorm.weight": marked}
    tensors |= {"optimizer.state.fp32_param.output_layer.weight": marked}
    folder = save_dcp(tmp_path / "trained", tensors)
    for file in folder.glob("*.distcp"):
        data = file.read_bytes()
        damaged = data.replace(marked.numpy().tobytes(), b"\xff" * 20_000)
        assert damaged.count(b"\xff" * 20_000) == data.count(marked.numpy().tobytes())
        file.write_bytes(damaged)
    convert_to_hf(folder, tmp_path / "back", hf_dir=hf, options=dataclasses.replace(SMALL_FILES))
    assert_same(read(tmp_path / "back"), weights)


def test_checkpoint_saved_without_check_sums_is_read(case, tmp_path, capsys):
    """As after torch.serialization.set_crc32_options(False)."""
    _, weights, hf = case
    convert_to_megatron(hf, tmp_path / "m")
    tensors = stored_tensors(tmp_path / "m" / "release")
    torch.serialization.set_crc32_options(False)
    try:
        folder = save_dcp(tmp_path / "unsummed", tensors)
    finally:
        torch.serialization.set_crc32_options(True)
    capsys.readouterr()
    convert_to_hf(folder, tmp_path / "back", hf_dir=hf)
    assert "saved without check sums" in capsys.readouterr().err
    assert_same(read(tmp_path / "back"), weights)


def test_padded_vocabulary_is_cut(case, tmp_path):
    config, weights, hf = case
    convert_to_megatron(hf, tmp_path / "m")
    tensors = stored_tensors(tmp_path / "m" / "release")
    for key in ("embedding.word_embeddings.weight", "mtp_output_layers.1.weight"):
        padding = torch.full((32, config["hidden_size"]), 7.0, dtype=torch.bfloat16)
        tensors[key] = torch.cat([tensors[key], padding])
    convert_to_hf(save_dcp(tmp_path / "padded", tensors), tmp_path / "back", hf_dir=hf)
    assert_same(read(tmp_path / "back"), weights)
