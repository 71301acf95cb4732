"""Conversion of files in both directions: round trips, options, and what Megatron-Core asks for.

What goes wrong: tests/convert/test_convert_faults.py. Parallel layouts: tests/convert/test_convert_layouts.py.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from support.layout_runs import stored_tensors
from support.reference import FULL, SLIDING, random_weights, tiny_config, write_hf_folder

from step35_patch import Step35Config
from step35_patch.cli import main
from step35_patch.convert import Options, convert_to_hf, convert_to_megatron
from step35_patch.convert.progress import Progress
from step35_patch.storage.errors import CheckpointError
from step35_patch.storage.hf_folder import INDEX
from step35_patch.tensors.megatron import extra_states, megatron_tensors, published_runs
from step35_patch.tensors.published import published_tensors
from step35_patch.tensors.qkv import DriftedGateError

GATE_LAYOUTS = ("headwise", "expanded")
# The lists that have an entry for each MTP layer in tests' configs.
PER_LAYER = (
    "layer_types",
    "rope_theta",
    "partial_rotary_factors",
    "swiglu_limits",
    "swiglu_limits_shared",
)
SMALL_FILES = Options(file_bytes=20_000)


def weights_of(config: dict, seed: int = 5) -> dict[str, torch.Tensor]:
    """Random weights in the dtypes of the published layout."""
    dtype = getattr(torch, config["torch_dtype"])
    return {
        name: value if name.endswith("router_bias") else value.to(dtype)
        for name, value in random_weights(config, seed).items()
    }


def read(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def case(tmp_path):
    config = tiny_config(torch_dtype="bfloat16", architectures=["Step3p5ForCausalLM"])
    weights = weights_of(config)
    return config, weights, write_hf_folder(tmp_path / "hf", config, weights)


# --- Round trips --------------------------------------------------------------------------------


@pytest.mark.parametrize("gate_layout", GATE_LAYOUTS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
@pytest.mark.parametrize("options", [Options(), dataclasses.replace(SMALL_FILES, workers=3)])
def test_round_trip_is_bit_for_bit(tmp_path, gate_layout, dtype, options):
    config = tiny_config(torch_dtype=dtype, a_field_of_the_future=[1, {"b": 2}])
    weights = weights_of(config)
    hf = write_hf_folder(tmp_path / "hf", config, weights)
    convert_to_megatron(hf, tmp_path / "megatron", gate_layout=gate_layout, options=options)
    convert_to_hf(tmp_path / "megatron", tmp_path / "back", hf_dir=hf, options=options)
    assert_same(read(tmp_path / "back"), weights)
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == config
    index = json.loads((tmp_path / "back" / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in weights.values())
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "back" / file)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["back", "hf", "megatron"]


def random_config(seed: int) -> dict:
    """Any legal shape: what every layer is, sizes that divide nothing, options on and off."""
    draw = random.Random(seed)
    layers, mtp = draw.randint(1, 5), draw.randint(0, 3)
    types = [draw.choice([FULL, SLIDING]) for _ in range(layers + mtp)]
    groups = draw.choice([1, 2, 3])
    head_dim = draw.choice([4, 8])
    moe = [i for i in range(layers) if draw.random() < 0.5]
    return tiny_config(
        torch_dtype=draw.choice(["bfloat16", "float32", "float16"]),
        hidden_size=draw.choice([8, 24, 40]),
        intermediate_size=draw.choice([5, 16, 33]),
        num_hidden_layers=layers,
        num_nextn_predict_layers=mtp,
        vocab_size=draw.choice([31, 96, 101]),
        layer_types=types,
        num_attention_heads=groups * draw.randint(1, 3),
        num_attention_groups=groups,
        head_dim=head_dim,
        attention_other_setting={
            "attention_type": SLIDING,
            "num_attention_heads": groups * draw.randint(1, 3),
            "num_attention_groups": groups,
            "head_dim": head_dim,
        },
        rope_theta=draw.choice([1e4, [1e4] * len(types)]),
        partial_rotary_factors=draw.choice([..., [0.5] * len(types)]),
        swiglu_limits=draw.choice([..., [0.0] * len(types)]),
        swiglu_limits_shared=...,
        moe_layers_enum=",".join(map(str, moe)),
        moe_num_experts=draw.choice([2, 5]),
        moe_intermediate_size=draw.choice([3, 8]),
        share_expert_dim=draw.choice([3, 8]),
        use_head_wise_attn_gate=draw.random() < 0.7,
        pad_token_id=0,
    )


@pytest.mark.parametrize("seed", range(40))
def test_any_config_converts_back_bit_for_bit(tmp_path, seed):
    config, draw = random_config(seed), random.Random(1000 + seed)
    weights = weights_of(config, seed)
    hf = write_hf_folder(tmp_path / "hf", config, weights)
    names, at = sorted(weights), draw.randint(1, len(weights) - 1)
    (hf / "model.safetensors").unlink()
    draw.shuffle(names)
    parts = {"a.safetensors": names[:at], "b.safetensors": names[at:]}
    for file, part in parts.items():
        save_file({name: weights[name] for name in part}, hf / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (hf / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    options = Options(file_bytes=draw.choice([1, 3000, 10**6]), workers=draw.choice([1, 4]))
    checked = dataclasses.replace(options, check=True)
    layout = draw.choice(GATE_LAYOUTS)
    convert_to_megatron(hf, tmp_path / "m", gate_layout=layout, options=options)
    convert_to_hf(tmp_path / "m", tmp_path / "back", hf_dir=hf, options=checked)
    assert_same(read(tmp_path / "back"), weights)


def test_published_layout_is_covered_exactly():
    """For the published config: every element of all 804 tensors once, in both gate layouts."""
    config = Step35Config.from_pretrained(_published())
    wanted = {info.name: info for info in published_tensors(config)}
    assert len(wanted) == 804
    redundant = {"headwise": 0, "expanded": 2_197_291_008}
    for layout in GATE_LAYOUTS:
        tensors = megatron_tensors(config, layout)
        runs = published_runs(tensors)
        assert set(runs) == set(wanted)
        for name, pairs in runs.items():
            at = 0
            for run, _ in pairs:
                assert run.start == at
                at += run.num_elements
            assert at == wanted[name].num_elements
        total = sum(torch.Size(tensor.shape).numel() for tensor in tensors)
        assert total == 199_384_301_376 + redundant[layout]
        for tensor in tensors:
            sizes = [torch.Size(chunk.sizes).numel() for chunk in tensor.chunks]
            assert sum(sizes) == torch.Size(tensor.shape).numel()
            assert max(sizes) * 2 < 256 * 2**20  # bytes in bf16 that are held at a time


def _published() -> str:
    from step35_patch.config import packaged_config_path

    return packaged_config_path()


def test_output_does_not_depend_on_workers(case, tmp_path):
    _, _, hf = case
    for name, workers in (("one", 1), ("four", 4)):
        options = dataclasses.replace(SMALL_FILES, workers=workers)
        convert_to_megatron(hf, tmp_path / name, options=options)
        convert_to_hf(tmp_path / name, tmp_path / f"hf-{name}", hf_dir=hf, options=options)
    assert digests(tmp_path / "one") == digests(tmp_path / "four")
    assert digests(tmp_path / "hf-one") == digests(tmp_path / "hf-four")


@pytest.mark.slow
def test_memory_does_not_grow_with_the_model(tmp_path):
    """A model of 1.2 GB in a process of its own: what it holds is a part of that."""
    config = tiny_config(
        torch_dtype="bfloat16",
        hidden_size=512,
        moe_num_experts=64,
        moe_intermediate_size=1024,
        vocab_size=40_000,
        moe_layers_enum="1,2,3,4,5",
    )
    hf = tmp_path / "hf"
    hf.mkdir()
    (hf / "config.json").write_text(json.dumps(config))
    pool, weight_map = torch.randn(2**22).bfloat16(), {}
    for number, info in enumerate(published_tensors(Step35Config.from_dict(config))):
        count = info.num_elements
        values = pool.repeat(-(-count // pool.numel()))[:count].view(info.shape)
        values = values.float() if info.dtype == "F32" else values
        save_file({info.name: values.contiguous()}, hf / f"{number}.safetensors")
        weight_map[info.name] = f"{number}.safetensors"
    (hf / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert sum(p.stat().st_size for p in hf.iterdir()) > 1.1e9
    program = """if True:
        import sys
        from step35_patch import convert
        from step35_patch.convert.progress import peak_memory
        top = sys.argv[1]
        base = peak_memory()
        convert.convert_to_megatron(top + "/hf", top + "/m")
        print(peak_memory() - base)
        convert.convert_to_hf(top + "/m", top + "/back", hf_dir=top + "/hf")
        print(peak_memory() - base)
        assert not any(name.split(".")[0] == "megatron" for name in sys.modules)
    """
    command = [sys.executable, "-c", program, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    peaks = [int(line) for line in result.stdout.split()]
    assert len(peaks) == 2 and max(peaks) < 600e6, peaks


# --- Megatron-Core's side -----------------------------------------------------------------------


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

    tests/convert/test_transformer_engine.py asks its modules, where they are installed.
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
    groups = [torch.cat(p) for p in zip(q.chunk(2), g.chunk(2), k.chunk(2), v.chunk(2))]
    assert torch.equal(qkv, torch.cat(groups))
    assert found["decoder.layers.3.mlp.router.expert_bias"].dtype == torch.float32


def save_dcp(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    return folder


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


# --- Options ------------------------------------------------------------------------------------


def test_drifted_gates_are_refused_or_averaged(case, tmp_path):
    config, weights, hf = case
    convert_to_megatron(hf, tmp_path / "m", gate_layout="expanded")
    tensors = stored_tensors(tmp_path / "m" / "release")
    # Layer 1: 6 heads in 2 groups of 16 channels: 3 * 16 rows of q, then 3 * 16 of the gate.
    qkv = tensors["decoder.layers.1.self_attention.linear_qkv.weight"]
    qkv[3 * 16 + 16 + 2] += 0.5  # head 1, its third row
    drifted = save_dcp(tmp_path / "drifted", tensors)
    with pytest.raises(DriftedGateError) as error:
        convert_to_hf(drifted, tmp_path / "back", hf_dir=hf)
    lines = str(error.value).splitlines()
    assert len(lines) == 3  # one layer
    assert "model.layers.1.self_attn.g_proj.weight: by up to 0.5" in lines[1]
    assert "--average-gate" in lines[2]
    assert not (tmp_path / "back").exists()
    convert_to_hf(drifted, tmp_path / "back", hf_dir=hf, average_gate=True)
    found = read(tmp_path / "back")
    name = "model.layers.1.self_attn.g_proj.weight"
    gate = weights[name].clone()
    mean = qkv[3 * 16 + 16 : 3 * 16 + 32].float().mean(dim=0).bfloat16()
    # An element whose rows stayed equal is not rounded.
    gate[1] = torch.where((qkv[66] == weights[name][1]), weights[name][1], mean)
    assert_same(found, weights | {name: gate})
    assert not torch.equal(gate, weights[name])


def test_gate_row_that_became_nan_is_no_equal_row(case, tmp_path):
    """Neither is it dropped because only the first row of a head is taken."""
    _, _, hf = case
    convert_to_megatron(hf, tmp_path / "m", gate_layout="expanded")
    tensors = stored_tensors(tmp_path / "m" / "release")
    tensors["decoder.layers.1.self_attention.linear_qkv.weight"][3 * 16 + 16 + 2] = float("nan")
    drifted = save_dcp(tmp_path / "drifted", tensors)
    with pytest.raises(DriftedGateError, match="model.layers.1.self_attn.g_proj.weight: by up to"):
        convert_to_hf(drifted, tmp_path / "back", hf_dir=hf)


def test_gate_that_is_nan_in_all_rows_has_not_drifted(case, tmp_path):
    config, weights, hf = case
    name = "model.layers.1.self_attn.g_proj.weight"
    broken = weights | {name: torch.full_like(weights[name], float("nan"))}
    write_hf_folder(hf, config, broken)
    on = Options(allow_nonfinite=True, check=True)
    convert_to_megatron(hf, tmp_path / "m", gate_layout="expanded", options=on)
    convert_to_hf(tmp_path / "m", tmp_path / "back", hf_dir=hf, options=on)
    assert read(tmp_path / "back")[name].isnan().all()


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_a_bar_on_a_terminal_and_lines_elsewhere(terminal, monkeypatch):
    class Stream(io.StringIO):
        def isatty(self):
            return terminal

    now = iter(range(0, 1000, 15))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("step35_patch.convert.progress.time.monotonic", lambda: float(next(now)))
    stream = Stream()
    progress = Progress(3_000_000_000, stream)
    progress.add(1_500_000_000)
    progress.say("a tensor has NaN")
    progress.add(1_500_000_000)
    progress.close()
    said = stream.getvalue()
    assert " 50%  1.50 GB of 3.00 GB  100.0 MB/s  0:15 left" in said
    assert "a tensor has NaN\n" in said
    assert ("\r[############            ]" in said) == terminal
    assert said.endswith("\n") and (terminal or "\r" not in said)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("direction", ["to-megatron", "to-hf"])
def test_dtype_is_converted_on_request(tmp_path, direction, dtype):
    config = tiny_config(torch_dtype=dtype)
    weights = weights_of(config)
    hf = write_hf_folder(tmp_path / "hf", config, weights)
    half = dataclasses.replace(SMALL_FILES, dtype=torch.float16, check=True)
    first, second = (half, SMALL_FILES) if direction == "to-megatron" else (SMALL_FILES, half)
    convert_to_megatron(hf, tmp_path / "m", gate_layout="expanded", options=first)
    convert_to_hf(tmp_path / "m", tmp_path / "back", hf_dir=hf, options=second)
    wanted = {n: t if n.endswith("router_bias") else t.half() for n, t in weights.items()}
    assert_same(read(tmp_path / "back"), wanted)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["torch_dtype"] == "float16"
    assert Step35Config.from_pretrained(tmp_path / "back").torch_dtype == "float16"


def test_checkpoint_of_another_dtype_than_the_config(tmp_path):
    """As of a run with --bf16 of a config in fp32: what is stored is what is written."""
    config = tiny_config(torch_dtype="float32")
    weights = weights_of(config)
    hf = write_hf_folder(tmp_path / "hf", config, weights)
    options = Options(dtype=torch.bfloat16)
    convert_to_megatron(hf, tmp_path / "m", options=options)
    stored = stored_tensors(tmp_path / "m" / "release")
    assert {value.dtype for name, value in stored.items() if "expert_bias" not in name} == {
        torch.bfloat16
    }
    convert_to_hf(tmp_path / "m", tmp_path / "back", hf_dir=hf, options=Options(check=True))
    wanted = {n: t if n.endswith("router_bias") else t.bfloat16() for n, t in weights.items()}
    assert_same(read(tmp_path / "back"), wanted)


def test_other_files_are_copied_along(case, tmp_path):
    _, _, hf = case
    blob = tmp_path / "blob"
    blob.write_text("{}")
    (hf / "tokenizer.json").symlink_to(blob)  # as the hub's cache has it
    (hf / "generation_config.json").write_text('{"temperature": 1}')
    (hf / ".hidden").write_text("")
    (hf / "pytorch_model.bin").write_bytes(b"weights of another kind")
    (hf / "original").mkdir()
    convert_to_megatron(hf, tmp_path / "m")
    convert_to_hf(tmp_path / "m", tmp_path / "back", hf_dir=hf)
    copied = {p.name for p in (tmp_path / "back").iterdir() if p.suffix != ".safetensors"}
    assert copied == {"config.json", INDEX, "tokenizer.json", "generation_config.json"}
    assert not (tmp_path / "back" / "tokenizer.json").is_symlink()
    assert (tmp_path / "back" / "generation_config.json").read_text() == '{"temperature": 1}'


def test_untrained_mtp_layers_are_copied(case, tmp_path):
    """Of a run with --mtp-num-layers 1."""
    _, weights, hf = case
    convert_to_megatron(hf, tmp_path / "m", options=SMALL_FILES)
    tensors = stored_tensors(tmp_path / "m" / "release")
    fewer = {
        n: t
        for n, t in tensors.items()
        if not n.startswith(("mtp.layers.1.", "mtp_output_layers.1."))
    }
    folder = save_dcp(tmp_path / "fewer", fewer)
    with pytest.raises(ValueError, match="mtp_from: the checkpoint lacks 17 tensors"):
        convert_to_hf(folder, tmp_path / "back", hf_dir=hf)
    options = dataclasses.replace(SMALL_FILES, check=True)
    convert_to_hf(folder, tmp_path / "back", hf_dir=hf, mtp_from=hf, options=options)
    assert_same(read(tmp_path / "back"), weights)
    with pytest.raises(ValueError, match="expected None"):
        convert_to_hf(tmp_path / "m", tmp_path / "other", hf_dir=hf, mtp_from=hf)
    # A layer of which a part is there is not an untrained one.
    del fewer["mtp.layers.0.enorm.weight"]
    with pytest.raises(CheckpointError, match="mtp.layers.0.enorm.weight: missing"):
        convert_to_hf(save_dcp(tmp_path / "half", fewer), tmp_path / "b", hf_dir=hf, mtp_from=hf)


def test_checkpoint_of_another_config_is_refused(case, tmp_path):
    config, weights, hf = case
    convert_to_megatron(hf, tmp_path / "m")
    other = write_hf_folder(tmp_path / "other", config | {"sliding_window": 9}, weights)
    with pytest.raises(CheckpointError, match="config: expected fingerprint"):
        convert_to_hf(tmp_path / "m", tmp_path / "back", hf_dir=other)


def test_command_line(case, tmp_path, capsys):
    _, weights, hf = case
    out, back = tmp_path / "m", tmp_path / "back"
    to_megatron = ["convert", "to-megatron", str(hf), str(out), "--gate-layout", "expanded"]
    assert main([*to_megatron, "--dry-run", "--max-shard-size", "40KB"]) == 0
    plan = capsys.readouterr().err
    assert "129 tensors" in plan and "nothing is written (dry run)" in plan and "files" in plan
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf"]
    assert main([*to_megatron, "--max-shard-size", "40KB", "--workers", "1", "--check"]) == 0
    said = capsys.readouterr().err
    assert "checked: all 129 tensors are the source's, bit for bit" in said
    assert "GB/s, peak memory" in said.splitlines()[-1]
    assert main(to_megatron) == 1
    assert "exists already; give --overwrite" in capsys.readouterr().err
    assert main([*to_megatron, "--overwrite"]) == 0
    assert main(["convert", "to-hf", str(out), str(back), "--hf-dir", str(hf)]) == 0
    assert_same(read(back), weights)
    for wrong in (["--max-shard-size", "5 apples"], ["--max-shard-size", "0"]):
        with pytest.raises(SystemExit) as error:
            main([*to_megatron, *wrong])
        assert error.value.code == 2
    assert main([*to_megatron, "--overwrite", "--workers", "0"]) == 1
    assert "workers: expected at least 1, found 0" in capsys.readouterr().err
