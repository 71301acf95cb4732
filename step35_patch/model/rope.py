"""RoPE tables, one for each kind of layer and sequence length, shared by all layers of a model.

Megatron-Core's GPTModel computes one table with one base and one share for all layers, and knows
llama3 scaling only with fixed constants. Step-3.5 has two kinds of layers; a table at 256k
positions takes 64 to 128 MiB, so that layers of one kind must share it.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
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


@lru_cache(maxsize=_TABLES_KEPT)
def _angles(
    kv_channels: int,
    rotary_percent: float,
    rotary_base: float,
    scaling: RopeScaling | None,
    length: int,
    device: torch.device,
    cp_rank: int,
    cp_size: int,
) -> Tensor:
    # inference_mode(False): a table made during an evaluation must be usable in training.
    with torch.inference_mode(False), torch.no_grad():
        frequencies = inverse_frequencies(kv_channels, rotary_percent, rotary_base, scaling)
        positions = torch.arange(length, dtype=torch.float32, device=device)
        if cp_size > 1:
            # Megatron-Core's context parallelism gives each rank one early and one late chunk.
            chunks = positions.view(2 * cp_size, -1)
            positions = torch.cat([chunks[cp_rank], chunks[2 * cp_size - 1 - cp_rank]])
        angles = torch.outer(positions, frequencies.to(device))
        return torch.cat([angles, angles], dim=-1)[:, None, None, :]


def rotary_pos_emb(
    plan: LayerPlan,
    config: TransformerConfig,
    hidden_states: Tensor,
    packed_seq_params: PackedSeqParams | None,
    cp_group: ProcessGroup,
) -> Tensor:
    """The angles that Megatron-Core's attention applies to q and k of one layer.

    Args:
        plan: the layer; its base, rotated share and scaling are used.
        config: gives sequence parallelism, tensor- and context-parallel sizes.
        hidden_states: [s, b, h] input of the attention, s being this rank's share of the sequence.
        packed_seq_params: None, or the packed ("thd") sequences; as in Megatron-Core the table then
            covers the longest sequence and `apply_rotary_pos_emb` slices it by sequence and
            context-parallel rank.
        cp_group: the context-parallel group.

    Returns:
        [s * tensor-parallel size under sequence parallelism, 1, 1, d] float32; halves repeated
        (not interleaved). Under context parallelism the rows are those of this rank's positions.
    """
    if packed_seq_params is not None and packed_seq_params.qkv_format == "thd":
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
    return _angles(
        plan.kv_channels,
        plan.rotary_percent,
        plan.rotary_base,
        plan.rope_scaling,
        length,
        hidden_states.device,
        rank,
        size,
    )
