"""Self-attention of a Step-3.5 layer: own RoPE and the head-wise output gate.

Megatron-Core's `SelfAttention` does the work; its per-layer config has the layer's heads, groups
and window. Two layouts of the gate are known:

- `headwise`: `linear_qkv` has one row a head for the gate, by query group
  [q (r * d) | gate (r) | k (d) | v (d)] with r heads a group and d channels a head. Exact in
  training, 96 or 64 rows more than q, k and v.
- `expanded`: Megatron-Core's own `attention_output_gate` layout [q (r * d) | gate (r * d) | k | v],
  in which each head's gate row stands d times. Interchangeable with tools that know only that
  layout, at the cost of the redundant rows. With Megatron-Core's own gate, where each row gates
  a channel, they drift apart in training. Here a head is gated by the first of its rows, which
  alone is trained, with the gradients, their norm and the steps of the head-wise layout; the
  others are made equal to it wherever weights leave the model, and must be where they enter it.

Shapes: s sequence, b batch, h hidden size, np / ng heads / query groups of this
tensor-parallel rank, hn channels a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from step35_patch.model.adapters import base_of, by_rows_of
from step35_patch.model.description import LayerConfig
from step35_patch.model.generation import (
    StaticContext,
    check_generation,
    in_sight,
    next_positions,
)
from step35_patch.model.output_gate import headwise_gate
from step35_patch.model.rope import (
    Rotation,
    generation_rotary_pos_emb,
    rotary_pos_emb,
    rotate,
)
from step35_patch.tensors.qkv import gate_rows, refuse_drift
from step35_patch.tensors.qkv_layout import QkvLayout


def build_headwise_qkv(
    linear: Callable[..., torch.nn.Module],
    input_size: int,
    output_size: int,
    /,
    *,
    config: LayerConfig,
    **kwargs: Any,
) -> torch.nn.Module:
    """Build `linear_qkv` with one gate row a head.

    Megatron-Core's SelfAttention asks for kv_channels gate rows a head when
    `attention_output_gate` is set; the difference is taken off again here.

    Args:
        linear: the column-parallel linear class of the spec.
        input_size: h, as SelfAttention passes it.
        output_size: as SelfAttention passes it, with kv_channels gate rows a head.
        config: the layer's config.
        kwargs: as SelfAttention passes them.

    Raises:
        ValueError: the layer has no gate.
    """
    if not config.attention_output_gate:
        raise ValueError(
            "the head-wise gate needs attention_output_gate=True on the layer's config"
        )
    rows = output_size - config.num_attention_heads * (config.kv_channels - 1)
    return linear(input_size, rows, config=config, **kwargs)


def _tie_before_saving(attention: Step35SelfAttention, prefix: str, keep_vars: bool) -> None:
    attention.tie_gate_rows()


def _check_after_loading(attention: Step35SelfAttention, incompatible_keys: object) -> None:
    attention.check_gate_rows()


class Step35SelfAttention(SelfAttention):
    """Megatron-Core's SelfAttention with the layer's own RoPE and the gate of its layout.

    Built by `Step35DecoderLayer` with that layer's config.
    """

    config: LayerConfig

    def __init__(self, config: LayerConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        gate_layout = config.step35.gate_layout if config.attention_output_gate else None
        self.headwise_gate = gate_layout == "headwise"
        self.tied_gate = gate_layout == "expanded"
        self.qkv = QkvLayout.of(config.step35_layer, gate_layout).share(self.world_size)
        if self.tied_gate:
            self.tie_gate_rows()  # they are drawn differently
            self.register_state_dict_pre_hook(_tie_before_saving)
            self.register_load_state_dict_post_hook(_check_after_loading)

    def tied_gate_rows(self, tensor: Tensor) -> Tensor:
        """The gate rows of the `expanded` linear_qkv weight, or of its gradient, as a view.

        Args:
            tensor: this rank's [rows, h].

        Returns:
            [groups, heads a group, d, h]: the d rows of each head that stand for one of g_proj.
        """
        return gate_rows(tensor, self.qkv)

    def tie_gate_rows(self, weight: Tensor | None = None) -> None:
        """Copy the first row of each head of an `expanded` gate to its others.

        Args:
            weight: of this rank's linear_qkv, [rows, h], changed in place; the parameter if None,
                and the rows of an adapter around it as well.
        """
        for matrix in self._with_gate_rows() if weight is None else [weight]:
            rows = self.tied_gate_rows(matrix)
            rows.copy_(rows[:, :, :1].clone().expand_as(rows))

    def _with_gate_rows(self) -> list[Tensor]:
        """linear_qkv's matrix, and what of an adapter around it has the same rows."""
        # Through .data: micro-batches in flight hold the weight, and none uses the other rows.
        return [base_of(self.linear_qkv).weight.data, *by_rows_of(self.linear_qkv)]

    def check_gate_rows(self) -> None:
        """Refuse weights of an `expanded` gate whose rows of a head differ.

        Raises:
            DriftedGateError: they, or an adapter around them, were trained with Megatron-Core's
                own gate.
        """
        name = f"layer {self.config.step35_layer.index}: linear_qkv"
        for position, matrix in enumerate(self._with_gate_rows()):
            refuse_drift(self.tied_gate_rows(matrix), name + "'s adapter" * (position > 0))

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """As Megatron-Core's, with tied gate rows."""
        if self.tied_gate:
            self.tie_gate_rows()
        sharded: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return sharded

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        key_value_states: Tensor | None = None,
        inference_context: StaticContext | None = None,
        rotary_pos_emb: Tensor | None = None,  # the model-wide one, which is not this layer's
        rotary_pos_cos: Tensor | None = None,
        rotary_pos_sin: Tensor | None = None,
        rotary_pos_cos_sin: Tensor | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        sequence_len_offset: int | None = None,
        *,
        inference_params: StaticContext | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states: [s, b, h]; returns ([s, b, h], bias or None), as Megatron-Core's does.

        With Megatron-Core's StaticInferenceContext the s tokens are the next of each sequence:
        their keys, rotated, and values are added to its cache, and the queries see those in it.

        Raises:
            NotImplementedError: another inference context is given, or one together with packed
                sequences or context parallelism.
        """
        context = inference_context if inference_context is not None else inference_params
        if context is None:
            rotation = self._own_rotary_pos_emb(hidden_states, packed_seq_params)
        else:
            check_generation(context, packed_seq_params, self.pg_collection.cp.size())
            rotation = generation_rotary_pos_emb(
                self.config.step35_layer,
                self.config,
                context.max_sequence_length,
                hidden_states.device,
            )
        output: tuple[Tensor, Tensor | None] = super().forward(
            hidden_states,
            attention_mask,
            key_value_states=key_value_states,
            inference_context=context,
            rotary_pos_emb=rotation,
            attention_bias=attention_bias,
            packed_seq_params=packed_seq_params,
            sequence_len_offset=sequence_len_offset,
        )
        return output

    def _own_rotary_pos_emb(
        self, hidden_states: Tensor, packed_seq_params: PackedSeqParams | None
    ) -> Tensor | Rotation:
        return rotary_pos_emb(
            self.config.step35_layer,
            self.config,
            hidden_states,
            packed_seq_params,
            self.pg_collection.cp,
        )

    def _adjust_key_value_for_inference(
        self,
        inference_context: StaticContext | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rotary_pos_emb: Tensor | tuple[Tensor, Tensor] | None,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        """What Megatron-Core does between projection and rotation; here the rotation as well."""
        if inference_context is not None:
            # Megatron-Core would cache keys as they are, and rotate all of them for each token.
            here = next_positions(inference_context, query.size(0))
            query, key = self._rotated(query, key, rotary_pos_emb, here)
            rotary_pos_emb = None
        elif isinstance(rotary_pos_emb, Rotation):
            query, key = rotate(query, rotary_pos_emb), rotate(key, rotary_pos_emb)
            rotary_pos_emb = None
        adjusted: tuple[Any, ...] = super()._adjust_key_value_for_inference(
            inference_context, query, key, value, rotary_pos_emb, *args, **kwargs
        )
        query, key, value, rotary_pos_emb, _, *rest = adjusted
        if inference_context is None or key.size(0) == query.size(0):
            return adjusted
        left = None if self.config.window_size is None else self.config.window_size[0]
        key, value = (in_sight(cached, query.size(0), left) for cached in (key, value))
        return query, key, value, rotary_pos_emb, AttnMaskType.causal_bottom_right, *rest

    def _rotated(
        self, query: Tensor, key: Tensor, rotary_pos_emb: Any, positions: slice
    ) -> tuple[Tensor, Tensor]:
        """The two turned, as tokens at some of the positions that `rotary_pos_emb` is for."""
        if isinstance(rotary_pos_emb, Rotation):
            rotation = Rotation(*(part[positions] for part in rotary_pos_emb))
            return rotate(query, rotation), rotate(key, rotation)
        options = {"config": self.config, "cp_group": self.pg_collection.cp}
        of_query, of_key = (angles[positions] for angles in rotary_pos_emb)
        return (
            apply_rotary_pos_emb(query, of_query, **options),
            apply_rotary_pos_emb(key, of_key, **options),
        )

    def get_query_key_value_tensors(
        self,
        hidden_states: Tensor,
        key_value_states: Tensor | None = None,
        output_gate: bool = False,
        split_qkv: bool = True,
    ) -> tuple[Any, ...]:
        """What attention starts from, as Megatron-Core's: (query, key, value), and with a gate it.

        Args:
            hidden_states: [s, b, h].
            key_value_states: None, as there is no cross attention.
            output_gate: whether the gate is asked for.
            split_qkv: False, which asks for the parts in one tensor, goes with no head-wise gate.

        Returns:
            Query [s, b, np, hn], key and value [s, b, ng, hn], and with a gate its logits,
            [s, b, ng, np / ng] (headwise) or [s, b, np, hn] (expanded).

        Raises:
            ValueError: the parts are asked for in one tensor, with a head-wise gate among them.
        """
        if not (output_gate and self.headwise_gate):
            parts: tuple[Any, ...] = super().get_query_key_value_tensors(
                hidden_states, key_value_states, output_gate=output_gate, split_qkv=split_qkv
            )
            return parts
        if not split_qkv:
            raise ValueError("fused_single_qkv_rope does not know the gate: leave it off")
        mixed, _ = self.linear_qkv(hidden_states)
        mixed = mixed.view(*mixed.shape[:-1], self.qkv.groups, -1)
        query, gate, key, value = mixed.split(self.qkv.sections, dim=-1)
        query = query.reshape(*query.shape[:2], -1, self.qkv.channels)
        return self.q_layernorm(query), self.k_layernorm(key), value, gate

    def _apply_output_gate(self, x: Tensor, gate: Tensor) -> Tensor:
        """x: [s, b, np * hn]; gate: logits as above; multiplies each head by its sigmoid."""
        return headwise_gate(x, gate if self.headwise_gate else gate[..., 0])
