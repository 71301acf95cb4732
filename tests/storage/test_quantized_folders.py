"""Folders of quantised weights: said once what they are, and FP8 is dequantised on request."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.converted import weights_of
from support.quantized import (
    dequantize_by_transformers,
    is_quantized,
    quantize,
    write_fp8_folder,
)
from support.reference import tiny_config, write_hf_folder

from step35_patch import Step35Config
from step35_patch.storage.errors import CheckpointError
from step35_patch.storage.hf_folder import Accepted, HfFolder
from step35_patch.tensors.published import published_tensors
from step35_patch.tensors.spelling import transformers_place

DEQUANTIZE = Accepted(dequantize_fp8=True)


def config_of(**changes) -> dict:
    return tiny_config(torch_dtype="bfloat16", **changes)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("block", "scale_dtype"),
    [((128, 128), torch.float32), ((16, 16), torch.float32), ((7, 10), torch.bfloat16)],
)
def test_fp8_is_dequantized_as_by_transformers(tmp_path, seed, block, scale_dtype):
    """Bit for bit: blocks larger than the tensors, cut ones, and none that divides a size."""
    config = config_of()
    weights = weights_of(config, seed)
    meant = write_fp8_folder(tmp_path, config, weights, block, scale_dtype)
    folder = HfFolder(tmp_path, Step35Config.from_dict(config), accept=DEQUANTIZE)
    assert sum(map(is_quantized, meant)) > 60
    for name, tensor in meant.items():
        found = folder.get(name)
        assert found.dtype == tensor.dtype and torch.equal(found, tensor), name
        if is_quantized(name):
            assert not torch.equal(found, weights[name]), name


def test_parts_need_not_align_with_blocks(tmp_path):
    config = config_of()
    meant = write_fp8_folder(tmp_path, config, weights_of(config), (16, 16))
    folder = HfFolder(tmp_path, Step35Config.from_dict(config), accept=DEQUANTIZE)
    experts, matrix = "model.layers.3.moe.up_proj.weight", "model.layers.1.self_attn.o_proj.weight"
    assert meant[experts].shape == (4, 24, 32) and meant[matrix].shape == (32, 96)
    for name in (experts, matrix):
        flat = meant[name].flatten()
        # Within a row, over the end of a block's rows, over the end of an expert, and all.
        for start, count in ((5, 20), (13 * 32 + 7, 320), (23 * 32, 96), (0, flat.numel()), (9, 0)):
            assert torch.equal(folder.block(name, start, count), flat[start : start + count])
    assert torch.equal(folder.get(experts, 2), meant[experts][2])
    assert torch.equal(folder.get(matrix, slice(3, 18)), meant[matrix][3:18])


def test_fused_experts_in_transformers_names(tmp_path):
    """The up projection begins within a block of the tensor that it shares with the gate's."""
    config = config_of()
    weights, parsed, block = weights_of(config), Step35Config.from_dict(config), (16, 16)
    fused: dict[str, list[torch.Tensor]] = {}
    for info in published_tensors(parsed):
        fused.setdefault(transformers_place(info).name, []).append(weights[info.name])
    stored, meant = {}, {}
    for name, parts in fused.items():
        stored[name] = torch.cat(parts, dim=-2) if len(parts) > 1 else parts[0]
        meant[name] = stored[name]
        if ".experts." in name:
            values, scales = quantize(stored[name], block)
            stored |= {name: values, f"{name}_scale_inv": scales}
            meant[name] = dequantize_by_transformers(values, scales, block, torch.bfloat16)
    assert len(stored) == len(fused) + 2 * 4 and len(fused) == len(weights) - 4
    stated = {"quant_method": "fp8", "weight_block_size": list(block)}
    write_hf_folder(tmp_path, config | {"quantization_config": stated}, stored)
    folder = HfFolder(tmp_path, parsed, accept=DEQUANTIZE)
    for info in published_tensors(parsed):
        place = transformers_place(info)
        wanted = meant[place.name]
        if place.shape != info.shape:
            wanted = wanted[:, place.first_row : place.first_row + info.shape[1]]
        assert torch.equal(folder.get(info.name), wanted), info.name
    up = "model.layers.3.moe.up_proj.weight"
    flat = meant["model.language_model.layers.3.mlp.experts.gate_up_proj"][:, 24:].flatten()
    assert torch.equal(folder.block(up, 700, 900), flat[700:1600])  # of two experts


def test_large_tensors_are_dequantized_piece_by_piece(tmp_path):
    """More than is computed at a time, with the pieces' ends within blocks."""
    config = config_of(hidden_size=96, intermediate_size=30_000)
    meant = write_fp8_folder(tmp_path, config, weights_of(config), (128, 64))
    folder = HfFolder(tmp_path, Step35Config.from_dict(config), accept=DEQUANTIZE)
    for part in ("gate", "down"):
        name = f"model.layers.0.mlp.{part}_proj.weight"
        assert meant[name].numel() > 2 * 2**20
        assert torch.equal(folder.get(name), meant[name])


# What programs write beside the weights, and what has to be said of it.
STATED = {
    "gptq": ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq, 4 bits"),
    "awq": ({"quant_method": "awq", "w_bit": 4, "zero_point": True}, "awq, 4 bits"),
    "compressed-tensors": (
        {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "config_groups": {"group_0": {"weights": {"num_bits": 4, "type": "int"}}},
        },
        "compressed-tensors, 4 bits",
    ),
    "bitsandbytes": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "8 bits"),
    "FP8 without blocks": ({"quant_method": "fp8"}, "fp8, 8 bits (quantization_config"),
    "nobody": (None, "by which method, no file says"),
}


@pytest.mark.parametrize("accept", [Accepted(), DEQUANTIZE], ids=["", "dequantize"])
@pytest.mark.parametrize("case", STATED)
@pytest.mark.parametrize("nested", [False, True], ids=["", "text_config"])
def test_other_kinds_are_named_once(tmp_path, case, accept, nested):
    stated, said = STATED[case]
    config = config_of()
    weights = weights_of(config)
    packed = {}
    for name, tensor in weights.items():
        if is_quantized(name):
            packed[name.removesuffix("weight") + "qweight"] = tensor.view(torch.int16).int()
            packed[name.removesuffix("weight") + "scales"] = tensor[:1].contiguous()
        else:
            packed[name] = tensor
    document = config if stated is None else config | {"quantization_config": stated}
    if nested:
        document = {"model_type": "step3p7", "text_config": document}
    write_hf_folder(tmp_path, document, packed)
    with pytest.raises(CheckpointError) as error:
        HfFolder(tmp_path, Step35Config.from_dict(config), accept=accept)
    [problem] = error.value.problems
    assert said in problem and "take the folder of the model in bf16" in problem
    assert f"{len(packed) - len(weights)} tensors of I32" in problem
    assert "--dequantize-fp8" not in problem
    assert ("only FP8 can be dequantised" in problem) == accept.dequantize_fp8


def test_method_in_a_file_of_its_own(tmp_path):
    config = config_of()
    write_hf_folder(tmp_path, config, {"model.norm.weight": torch.zeros(32, dtype=torch.uint8)})
    stated = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(stated))
    with pytest.raises(CheckpointError, match=r"NVFP4 \(quantization in hf_quant_config.json\)"):
        HfFolder(tmp_path, Step35Config.from_dict(config))


def test_fp8_is_named_with_the_option(tmp_path):
    config = config_of()
    write_fp8_folder(tmp_path, config, weights_of(config))
    with pytest.raises(CheckpointError) as error:
        HfFolder(tmp_path, Step35Config.from_dict(config))
    [problem] = error.value.problems
    for said in (
        "quant_method fp8, 8 bits, blocks of 128 x 128 (quantization_config in config.json)",
        "--dequantize-fp8 (dequantize_fp8=True)",
    ):
        assert said in problem


def test_config_that_speaks_of_fp8_beside_plain_weights_does_no_harm(tmp_path):
    """As an export with the config of an FP8 folder was; the bytes are what is read."""
    config = config_of()
    weights = weights_of(config)
    stated = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    write_hf_folder(tmp_path, config | {"quantization_config": stated}, weights)
    for accept in (Accepted(), DEQUANTIZE):
        folder = HfFolder(tmp_path, Step35Config.from_dict(config), accept=accept)
        assert all(torch.equal(folder.get(name), tensor) for name, tensor in weights.items())


def test_wrong_scales_are_listed(tmp_path):
    config = config_of()
    write_fp8_folder(tmp_path, config, weights_of(config), (16, 16))
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    start = "model.layers.1.self_attn."
    del tensors[f"{start}q_proj.weight_scale_inv"]
    tensors[f"{start}k_proj.weight_scale_inv"] = torch.ones(1, 1)
    scales = tensors[f"{start}v_proj.weight_scale_inv"]
    tensors[f"{start}v_proj.weight_scale_inv"] = scales.double()
    tensors[f"{start}q_norm.weight"] = tensors[f"{start}q_norm.weight"].to(torch.float8_e4m3fn)
    tensors["model.norm.weight_scale_inv"] = torch.ones(1)
    save_file(tensors, file)
    with pytest.raises(CheckpointError) as error:
        HfFolder(tmp_path, Step35Config.from_dict(config), accept=DEQUANTIZE)
    name = "model.safetensors"
    assert sorted(error.value.problems) == [
        f"{start}k_proj.weight_scale_inv: shape (1, 1) in {name}, expected (2, 2)",
        f"{start}q_norm.weight: dtype F8_E4M3 in {name}, expected BF16 (the config's torch_dtype; "
        "router_bias is F32)",
        f"{start}q_proj.weight_scale_inv: missing, the scales of an FP8 weight",
        f"{start}v_proj.weight_scale_inv: dtype F64 in {name}, expected BF16 or F16 or F32",
        f"model.norm.weight_scale_inv: unexpected, in {name}",
    ]
