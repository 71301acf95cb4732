"""Step35CanonicalLoRA: Megatron-Bridge's CanonicalLoRA with the gate.

It has an adapter for each published matrix of a merged layer. Megatron-Bridge's own puts the
outputs of q, k and v together as rows without a gate, needs all of them, and saves gate's and up's
rows in an order that another tensor-parallel size does not read.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.bridge.peft.adapter_wrapper import AdapterWrapper
from megatron.bridge.peft.canonical_lora import CanonicalLoRA, ModuleDict
from megatron.bridge.peft.utils import (
    ParallelLinearAdapter,
    align_expert_dim_for_tp,
    get_adapter_attributes_from_linear,
    get_effective_lora_dim,
    is_expert_linear,
    is_grouped_expert_linear,
)
from torch import Tensor

from step35_patch.model.description import LayerConfig
from step35_patch.tensors.qkv import join_rows
from step35_patch.tensors.qkv_layout import QkvLayout

# The published matrices of a merged layer in their order, by the names that targets have.
_PARTS = {
    "linear_qkv": {"linear_q": "q", "linear_g": "g", "linear_k": "k", "linear_v": "v"},
    "linear_fc1": {"linear_fc1_gate": "gate", "linear_fc1_up": "up"},
}


@dataclass
class Step35CanonicalLoRA(CanonicalLoRA):
    """LoRA on q, k, v and the gate apart, and on gate and up of an MLP apart.

    Args:
        target_modules: as Megatron-Bridge's, with `linear_g`, the gate of the attention. Some of a
            layer's matrices may have adapters and others none. Grouped experts have one adapter
            for gate and up, whichever of the two is named.

    All other arguments are CanonicalLoRA's.
    """

    target_modules: list[str] = field(
        default_factory=lambda: [
            *(target for parts in _PARTS.values() for target in parts),
            *("linear_proj", "linear_fc2"),
        ]
    )

    def _init_target_match_state(self) -> None:
        super()._init_target_match_state()
        for target in self.target_modules or []:
            if target.endswith("linear_g"):
                del self.canonical_mapping[target]
                pattern = target.removesuffix("linear_g") + "linear_qkv"
                self.register_target_alias(target, pattern)
                self.canonical_mapping[pattern].add("linear_g")

    def transform(self, m: Any, name: str | None = None, prefix: str | None = None) -> Any:
        """A layer with its adapters around it, or the layer itself."""
        if isinstance(m, ApartLinear):
            return m
        plan = getattr(getattr(m, "config", None), "step35_layer", None)
        found = self.match(m, name, prefix) if name in _PARTS and plan is not None else None
        if name is None or found is None or is_grouped_expert_linear(found[1]):
            return super().transform(m, name, prefix)
        pattern, full_name = found
        asked = self.canonical_mapping[pattern]
        layout = _layout(m.config) if name == "linear_qkv" else None
        is_expert = is_expert_linear(full_name)
        # What Transformer Engine's norm returns gathered has no gradient, so that the adapters
        # gather their input themselves.
        attributes = get_adapter_attributes_from_linear(
            m, is_expert=is_expert, sequence_parallel_input_regather=True
        )
        dim = align_expert_dim_for_tp(
            m,
            get_effective_lora_dim(
                m, dim=self.dim, normalize_moe_lora=self.normalize_moe_lora, is_expert=is_expert
            ),
            normalize_moe_lora=self.normalize_moe_lora,
            is_expert=is_expert,
            input_is_parallel=attributes.input_is_parallel,
        )
        rows = _rows(layout, attributes.out_features)
        adapters = {
            f"adapter_{part}": ParallelLinearAdapter(
                attributes.in_features,
                rows[part],
                dim,
                # The layer's own name would make Megatron-Bridge take B for gate's and up's.
                base_linear_name=f"{full_name.removesuffix(name)}{part}",
                activation="identity",
                column_init_method=self.lora_A_init_method,
                row_init_method=self.lora_B_init_method,
                input_is_parallel=attributes.input_is_parallel,
                dropout=self.dropout,
                dropout_position=self.dropout_position,
                model_parallel_config=m.config,
                alpha=self.alpha,
                is_expert=is_expert,
                disable_tensor_parallel_comm=attributes.disable_tensor_parallel_comm,
                disable_sequence_parallel_comm=attributes.disable_sequence_parallel_comm,
                base_linear_is_parallel=attributes.base_linear_is_parallel,
            )
            for target, part in _PARTS[name].items()
            if target in asked and part in rows
        }
        return ApartLinear(m, ModuleDict(adapters), rows, layout) if adapters else m


class ApartLinear(AdapterWrapper):
    """A merged layer with an adapter for each of some of its published matrices.

    Args:
        to_wrap: the layer.
        adapters: by `adapter_` and the matrix: q, g, k and v, or gate and up.
        rows: of each matrix that the layer has, over all tensor-parallel ranks.
        layout: of all of linear_qkv's rows; None of another layer, whose rows stand matrix by
            matrix.
    """

    def __init__(
        self,
        to_wrap: torch.nn.Module,
        adapters: ModuleDict,
        rows: dict[str, int],
        layout: QkvLayout | None,
    ):
        super().__init__(to_wrap, adapters)
        ranks = next(iter(adapters.values())).tp_group.size()
        self.rows = {part: whole // ranks for part, whole in rows.items()}
        self.layout = layout and layout.share(ranks)

    def joined(self, parts: dict[str, Tensor], dim: int) -> Tensor:
        """What belongs to some matrices' rows, as the layer has its rows; zeros for the others'.

        Args:
            parts: by the adapters' names, of this rank.
            dim: where the rows are.
        """
        like = next(iter(parts.values()))
        whole = {}
        for part, rows in self.rows.items():
            shape = list(like.shape)
            shape[dim] = rows
            found = parts.get(f"adapter_{part}")
            whole[part] = like.new_zeros(shape) if found is None else found
        if self.layout is None:
            return torch.cat([*whole.values()], dim=dim)
        q, k, v = (whole[part] for part in "qkv")
        return join_rows(q, whole.get("g"), k, v, self.layout, dim)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """As the layer's: x [s, b, h]; returns this rank's [s, b, rows] and the bias or None."""
        output, bias, normed = self.base_linear_forward(x, *args, **kwargs)
        if not self._adapter_enabled:
            return output, bias
        normed = normed.contiguous()
        parts = {
            name: self.adapter_forward(adapter, normed, *args, **kwargs)
            for name, adapter in self.adapter.items()
        }
        return output + self.joined(parts, -1), bias


def _layout(config: LayerConfig) -> QkvLayout:
    gate_layout = config.step35.gate_layout if config.attention_output_gate else None
    return QkvLayout.of(config.step35_layer, gate_layout)


def _rows(layout: QkvLayout | None, of_layer: int) -> dict[str, int]:
    """Rows of each published matrix of a layer, over all ranks."""
    if layout is None:
        return dict.fromkeys(_PARTS["linear_fc1"].values(), of_layer // 2)
    heads, keys = layout.groups * layout.heads, layout.groups * layout.channels
    gate = {"g": heads} if layout.gate_rows else {}
    return {"q": heads * layout.channels, **gate, "k": keys, "v": keys}
