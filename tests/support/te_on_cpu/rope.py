"""The fused rotary position embedding (common/fused_rope/fused_rope.cu)."""

from __future__ import annotations

from itertools import pairwise

import torch

from support.te_on_cpu.extension import CONTENTS, kernel, refuse

QKVFormat = CONTENTS["NVTE_QKV_Format"]


def _rope_rows(length: int, cp_size: int, cp_rank: int) -> torch.Tensor:
    """The positions of a rank's tokens; under context parallelism an early and a late chunk."""
    rows = torch.arange(length)
    if cp_size == 1:
        return rows
    half = length // 2
    late = length * cp_size - (cp_rank + 1) * half - half
    return torch.where(rows < half, rows + cp_rank * half, rows + late)


def _rope(x, freqs, start_positions, qkv_format, interleaved, cu_seqlens, cp_size, cp_rank, sign):
    refuse("RoPE with start_positions", start_positions is None)
    assert freqs.dtype == torch.float32 and freqs.dim() == 4 and freqs.shape[1:3] == (1, 1)
    if qkv_format == QKVFormat.NVTE_THD:
        bounds = [bound // cp_size for bound in cu_seqlens.tolist()]
        lengths = [end - start for start, end in pairwise(bounds)]
        rows = torch.cat([_rope_rows(n, cp_size, cp_rank) for n in lengths])
        angles = freqs[rows].squeeze(2)  # [t, 1, d2]
        assert x.shape[0] == rows.numel(), "padding behind the last sequence"
    elif qkv_format == QKVFormat.NVTE_SBHD:
        angles = freqs[_rope_rows(x.shape[0], cp_size, cp_rank)]  # [s, 1, 1, d2]
    else:
        assert qkv_format == QKVFormat.NVTE_BSHD, qkv_format
        angles = freqs[_rope_rows(x.shape[1], cp_size, cp_rank)].transpose(0, 1)
    width = freqs.shape[-1]
    turned, rest = x[..., :width].float(), x[..., width:]
    cos, sin = angles.cos(), angles.sin()

    def rotate(y: torch.Tensor) -> torch.Tensor:
        if interleaved:
            return torch.stack([-y[..., 1::2], y[..., 0::2]], -1).flatten(-2)
        first, second = y.chunk(2, -1)
        return torch.cat([-second, first], -1)

    # The transpose of (cos + sin * rotate) is (cos - rotate(sin * .)), as rotate's is -rotate.
    moved = rotate(turned) * sin if sign > 0 else -rotate(turned * sin)
    return torch.cat([(turned * cos + moved).to(x.dtype), rest], -1)


@kernel
def fused_rope_forward(
    input, freqs, start_positions, qkv_format, interleaved, cu_seqlens, cp_size, cp_rank
):
    return _rope(
        input, freqs, start_positions, qkv_format, interleaved, cu_seqlens, cp_size, cp_rank, 1
    )


@kernel
def fused_rope_backward(
    grads, freqs, start_positions, qkv_format, interleaved, cu_seqlens, cp_size, cp_rank
):
    return _rope(
        grads, freqs, start_positions, qkv_format, interleaved, cu_seqlens, cp_size, cp_rank, -1
    )
