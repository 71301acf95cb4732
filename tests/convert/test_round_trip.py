"""Conversion there and back is bit for bit, of any config, within little memory."""

from __future__ import annotations

import dataclasses
import json
import random
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.converted import GATE_LAYOUTS, SMALL_FILES, assert_same, digests, read, weights_of
from support.figures import record
from support.reference import FULL, SLIDING, tiny_config, write_hf_folder

from step35_patch import Step35Config
from step35_patch.convert import Options, convert_to_hf, convert_to_megatron
from step35_patch.storage.hf_folder import INDEX
from step35_patch.tensors.megatron import megatron_tensors, published_runs
from step35_patch.tensors.published import published_tensors


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
    assert record("published tensors", len(wanted)) == 804
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
