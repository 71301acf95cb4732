"""The numbers of one layer: what `Step35Config.layers` holds for each absolute layer index.

Only the standard library is used, so that a table can be read, printed and compared without
torch, pydantic or Megatron-Core. Both classes are immutable and hashable: they are safe as keys
of a cache (one RoPE table for each kind of layer) and equal plans mean equal computation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# Which keys a sliding query sees: see `Step35Config.resolve`.
Window = Literal["hf", "steptron"]
FULL_ATTENTION = "full_attention"
SLIDING_ATTENTION = "sliding_attention"
LAYER_TYPES = (FULL_ATTENTION, SLIDING_ATTENTION)


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Frequency scaling of Llama 3.1 with the config's own constants (`rope_scaling`).

    With wavelength w = 2 pi / inv_freq and L = `original_max_position_embeddings` (tokens):
    w < L / high_freq_factor keeps its frequency, w > L / low_freq_factor has it divided by
    `factor`, and in between the two are blended linearly in L / w. The formula is that of
    transformers' `rope_type: llama3`.
    """

    rope_type: str
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """All in which one layer of a Step-3.5 model can differ from the next.

    Attributes:
        index: Absolute layer index from 0, whatever the pipeline layout; MTP layers follow the
            decoder's, so the published model has 0-44 and 45-47.
        is_mtp: Whether this is the decoder layer inside an MTP module.
        is_moe: Whether the FFN is routed experts and a shared expert (else a dense MLP).
        attention_type: `"full_attention"` or `"sliding_attention"`.
        num_attention_heads: Query heads of this layer, over all tensor-parallel ranks.
        num_query_groups: Key/value heads of this layer; divides `num_attention_heads`.
        kv_channels: Dimensions of one head (the config's `head_dim`).
        window_size: None for full attention; else (left, right): a query sees itself, `left`
            keys before it and `right` keys after it.
        rotary_base: RoPE's base (the config's `rope_theta`).
        rotary_percent: Share of a head's dimensions that is rotated, its first ones; its
            product with `kv_channels` is a whole and even number.
        rope_scaling: The scaling of this layer's frequencies, or None for plain RoPE.
        swiglu_limit: Clamp after the activation of the routed experts, or None for no clamp.
        swiglu_limit_shared: The same for the shared expert and for a dense MLP.
    """

    index: int
    is_mtp: bool
    is_moe: bool
    attention_type: str
    num_attention_heads: int
    num_query_groups: int
    kv_channels: int
    window_size: tuple[int, int] | None
    rotary_base: float
    rotary_percent: float
    rope_scaling: RopeScaling | None
    swiglu_limit: float | None
    swiglu_limit_shared: float | None
