"""Generating with Megatron-Core's static inference context: what a layer needs to know of it.

The context has a cache of keys and values for each layer, and says how many tokens of each sequence
are in it. Megatron-Core makes, fills and reads the cache; what `step35_patch.model.attention` adds
is the layer's own RoPE at the next tokens' positions, and its window.

Shapes are named as in `step35_patch.model.windowed_attention`.
"""

from __future__ import annotations

from typing import Protocol

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


class StaticContext(Protocol):
    """What is used of Megatron-Core's StaticInferenceContext.

    Attributes:
        max_sequence_length: Tokens of a sequence that the cache has room for.
        sequence_len_offset: Tokens of each sequence that are in it already.
    """

    max_sequence_length: int
    sequence_len_offset: int

    def is_dynamic_batching(self) -> bool:
        """Whether it is another context: paged, with sequences of different lengths."""


DYNAMIC_CONTEXT = (
    "Step-3.5 does not generate with Megatron-Core's DynamicInferenceContext: its paged attention "
    "is flash-attn's, which releases before 0.19 call without the layers' windows, and which was "
    "never held to the model. Use a StaticInferenceContext, or save the weights with "
    "step35_patch.checkpoint.save_hf_weights and serve them from there."
)


def check_generation(
    context: StaticContext, packed_seq_params: PackedSeqParams | None, cp_size: int
) -> None:
    """Refuse what Step-3.5 layers can't generate with.

    Args:
        context: of this call.
        packed_seq_params: of this call.
        cp_size: ranks that share a sequence.

    Raises:
        NotImplementedError: the context is a dynamic one, sequences are packed, or ranks share
            them.
    """
    if context.is_dynamic_batching():
        raise NotImplementedError(DYNAMIC_CONTEXT)
    if packed_seq_params is not None:
        raise NotImplementedError(
            "packed_seq_params: expected None with an inference context, found packed sequences. "
            "Give each sequence a row of the batch."
        )
    if cp_size > 1:
        raise NotImplementedError(
            f"context_parallel_size: expected 1 with an inference context, found {cp_size}. Each "
            "rank would keep a part of the keys only: generate with tensor or pipeline parallelism."
        )


def next_positions(context: StaticContext, s: int) -> slice:
    """Where the next s tokens of each sequence stand.

    Raises:
        ValueError: the cache has no room for them.
    """
    first = context.sequence_len_offset
    last = first + s
    if last > context.max_sequence_length:
        raise ValueError(
            f"max_sequence_length of the StaticInferenceContext: expected at least {last}, for "
            f"{first} tokens and {s} more, found {context.max_sequence_length}. Make the context "
            "as long as prompt and new tokens together."
        )
    return slice(first, last)


def in_sight(cached: Tensor, s: int, window_left: int | None) -> Tensor:
    """The part of a cache that the last s tokens see, so that no other part is read.

    Args:
        cached: [keys, b, ng, hn], of all tokens so far.
        s: number of queries.
        window_left: as in `windowed_attention`.

    Returns:
        [seen, b, ng, hn].
    """
    if window_left is None or cached.size(0) <= s + window_left:
        return cached
    # Transformer Engine refuses a view that begins in the middle of its memory.
    return cached[-(s + window_left) :].clone(memory_format=torch.contiguous_format)
