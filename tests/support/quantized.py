"""Folders in FP8 with block scales, and the weights that they stand for by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from support.reference import write_hf_folder

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic"}
# What stays as it is in FP8 releases, by parts of names.
_KEPT = ("embed_tokens", "lm_head", "norm", "router_bias", "moe.gate.", "eh_proj", "shared_head")


def is_quantized(name: str) -> bool:
    return not any(part in name for part in _KEPT)


def _whole_blocks(tensor: torch.Tensor, block: tuple[int, int]) -> torch.Tensor:
    """[..., rows, columns], with zeros behind the last row and column of a cut block."""
    rows, columns = tensor.shape[-2:]
    return F.pad(tensor, (0, -columns % block[1], 0, -rows % block[0]))


def quantize(
    tensor: torch.Tensor, block: tuple[int, int], scale_dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight in FP8, and its `weight_scale_inv`."""
    whole = _whole_blocks(tensor.float(), block)
    *stack, rows, columns = whole.shape
    tiles = whole.view(*stack, rows // block[0], block[0], columns // block[1], block[1])
    scales = (tiles.abs().amax(dim=(-3, -1)) / 448).clamp(min=1e-12).to(scale_dtype)
    tiles = tiles / scales.float()[..., :, None, :, None]
    values = tiles.view(whole.shape)[..., : tensor.shape[-2], : tensor.shape[-1]]
    return values.to(torch.float8_e4m3fn).contiguous(), scales


def dequantize_by_transformers(
    values: torch.Tensor, scales: torch.Tensor, block: tuple[int, int], dtype: torch.dtype
) -> torch.Tensor:
    """By its own operation, which knows whole blocks only: others are filled up for it."""
    rows, columns = values.shape[-2:]
    # F.pad knows no FP8.
    whole = _whole_blocks(values.view(torch.uint8), block).view(torch.float8_e4m3fn)
    weights = {"weight": [whole], "weight_scale_inv": [scales.float()]}
    found = Fp8Dequantize(None).convert(weights)["weight"]
    return found[..., :rows, :columns].to(dtype)


def write_fp8_folder(
    folder: Path,
    config: dict[str, Any],
    weights: dict[str, torch.Tensor],
    block: tuple[int, int] = (128, 128),
    scale_dtype: torch.dtype = torch.float32,
) -> dict[str, torch.Tensor]:
    """Write a folder as the published model's FP8 release is; returns what it stands for."""
    stored, meant = dict(weights), dict(weights)
    for name, tensor in weights.items():
        if is_quantized(name):
            stored[name], scales = quantize(tensor, block, scale_dtype)
            stored[f"{name}_scale_inv"] = scales
            meant[name] = dequantize_by_transformers(stored[name], scales, block, tensor.dtype)
    stated = FP8 | {"weight_block_size": list(block)}
    stated["modules_to_not_convert"] = [
        name.removesuffix(".weight") for name in weights if not is_quantized(name)
    ]
    write_hf_folder(folder, config | {"quantization_config": stated}, stored)
    return meant
