"""RoPE: one table for each kind of layer and sequence length, shared by all layers of a model.

Megatron-Core's GPTModel computes one table with one base and one share for all layers, and knows
llama3 scaling only with fixed constants. Step-3.5 has two kinds of layers; a table at 256k
positions takes 64 to 128 MiB, so that layers of one kind must share it.

Megatron-Core's own rotation takes angles, and makes sines and cosines of them for each tensor of
each layer. It is left packed sequences and Transformer Engine's kernel (`apply_rope_fusion`);
otherwise `rotate` takes a `Rotation`, which the layers of a kind share.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from step35_patch.config.layer_plan import LayerPlan, RopeScaling

# Two kinds of layers at two lengths, training and evaluation; at 256k positions each takes up to
# 128 MiB.
_TABLES_KEPT = 4


def inverse_frequencies(
    kv_channels: int, rotary_percent: float, rotary_base: float, scaling: RopeScaling | None
) -> Tensor:
    """Scaled base ** (-2i / d) of the d = rotary_percent * kv_channels rotated dimensions.

    With llama3 scaling, wavelengths over original / low_freq_factor are stretched by `factor`,
    those under original / high_freq_factor are kept, and those between are interpolated
    linearly in frequency (the formula of transformers' `_compute_llama3_parameters`).

    Returns:
        [d / 2] float32 tensor on the CPU, in radians for each position.
    """
    dim = int(kv_channels * rotary_percent)
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim
    frequencies = 1.0 / (rotary_base**exponents)
    if scaling is None:
        return frequencies
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    kept = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    kept = kept.clamp(0.0, 1.0)
    return frequencies * (kept + (1.0 - kept) / scaling.factor)


class Rotation(NamedTuple):
    """What `rotate` turns by: [s, 1, 1, d / 2] float32 each, d of a head's channels being rotated.

    A tuple, so that it goes through Megatron-Core's attention as a rotary_pos_emb does.
    """

    cos: Tensor
    sin: Tensor


class _Table(NamedTuple):
    """What the positions of one kind of layer are turned by."""

    kv_channels: int
    rotary_percent: float
    rotary_base: float
    scaling: RopeScaling | None
    length: int
    device: torch.device
    cp_rank: int
    cp_size: int

    def angles(self) -> Tensor:
        """[s, d / 2] in radians, s being this context-parallel rank's positions."""
        frequencies = inverse_frequencies(
            self.kv_channels, self.rotary_percent, self.rotary_base, self.scaling
        )
        positions = torch.arange(self.length, dtype=torch.float32, device=self.device)
        if self.cp_size > 1:
            # Megatron-Core's context parallelism gives each rank one early and one late chunk.
            chunks = positions.view(2 * self.cp_size, -1)
            late = 2 * self.cp_size - 1 - self.cp_rank
            positions = torch.cat([chunks[self.cp_rank], chunks[late]])
        return torch.outer(positions, frequencies.to(self.device))


# inference_mode(False): a table made during an evaluation must be usable in training.
@lru_cache(maxsize=_TABLES_KEPT)
@torch.inference_mode(False)
@torch.no_grad()
def _angles(table: _Table) -> Tensor:
    return torch.cat([table.angles()] * 2, dim=-1)[:, None, None, :]


@lru_cache(maxsize=_TABLES_KEPT)
@torch.inference_mode(False)
@torch.no_grad()
def _rotation(table: _Table) -> Rotation:
    angles = table.angles()[:, None, None, :]
    return Rotation(angles.cos(), angles.sin())


def rotary_pos_emb(
    plan: LayerPlan,
    config: TransformerConfig,
    hidden_states: Tensor,
    packed_seq_params: PackedSeqParams | None,
    cp_group: ProcessGroup,
) -> Tensor | Rotation:
    """What turns q and k of one layer: for `rotate`, or angles for Megatron-Core's attention.

    Args:
        plan: the layer; its base, rotated share and scaling are used.
        config: gives sequence parallelism, tensor- and context-parallel sizes.
        hidden_states: [s, b, h] input of the attention, s being this rank's share of the sequence.
        packed_seq_params: None, or the packed ("thd") sequences; as in Megatron-Core the table then
            covers the longest sequence and `apply_rotary_pos_emb` slices it by sequence and
            context-parallel rank.
        cp_group: the context-parallel group.

    Returns:
        A `Rotation` with s * tensor-parallel size rows under sequence parallelism, else s. For
        packed sequences, and with `apply_rope_fusion`, angles as Megatron-Core has them: as many
        rows (packed: the longest sequence's), [rows, 1, 1, d] float32, halves repeated (not
        interleaved). Under context parallelism the rows are those of this rank's positions.
    """
    megatrons = config.apply_rope_fusion
    if packed_seq_params is not None and packed_seq_params.qkv_format == "thd":
        megatrons = True
        length = int(max(packed_seq_params.max_seqlen_q, packed_seq_params.max_seqlen_kv))
        rank, size = 0, 1
    else:
        length = hidden_states.size(0)
        if config.sequence_parallel:
            length *= config.tensor_model_parallel_size
        rank, size = cp_group.rank(), cp_group.size()
        length *= size
        if length % (2 * size) and size > 1:
            raise ValueError(
                f"sequence length {length}: expected a multiple of 2 * context_parallel_size = "
                f"{2 * size}; change --seq-length or --context-parallel-size"
            )
    table = _table(plan, length, hidden_states.device, rank, size)
    return _angles(table) if megatrons else _rotation(table)


def generation_rotary_pos_emb(
    plan: LayerPlan, config: TransformerConfig, length: int, device: torch.device
) -> Tensor | Rotation:
    """What turns q and k of one layer while a sequence is generated, for all of its positions.

    Args:
        plan: as for `rotary_pos_emb`.
        config: says whether Transformer Engine's kernel rotates.
        length: the most tokens that the sequence may come to have.
        device: of q and k.

    Returns:
        A `Rotation` of `length` rows; with `apply_rope_fusion` angles, as `rotary_pos_emb` does.
    """
    table = _table(plan, length, device)
    return _angles(table) if config.apply_rope_fusion else _rotation(table)


def _table(
    plan: LayerPlan, length: int, device: torch.device, cp_rank: int = 0, cp_size: int = 1
) -> _Table:
    return _Table(
        plan.kv_channels,
        plan.rotary_percent,
        plan.rotary_base,
        plan.rope_scaling,
        length,
        device,
        cp_rank,
        cp_size,
    )


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Turn the first d channels of each head by their position, channel i with i + d / 2.

    Sines and cosines are taken in x's dtype. Nothing is kept for backward but the rotation.

    Args:
        x: [s, b, heads, channels], floating point.
        rotation: of the s positions, d <= channels.

    Returns:
        As x, contiguous.
    """
    rotated: Tensor = _Rotate.apply(x, *rotation)
    return rotated


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, sin, -1), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    """By the angles, or with a sign of -1 back by them."""
    half = cos.size(-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    sizes = [half, half, x.size(-1) - 2 * half]
    (first, second, rest), (out_first, out_second, out_rest) = (
        x.split(sizes, -1),
        out.split(sizes, -1),
    )
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-sign)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin, value=sign)
    out_rest.copy_(rest)
    return out
