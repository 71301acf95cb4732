"""Megatron-Bridge's mappings of a Step-3.5 model, made from the table of tensors.

Which published tensors a parameter is made of, and how, is `step35_patch.tensors.table`'s to say.
What moves them between processes is Megatron-Bridge's: the classes here add to its own mappings
what they don't know of this model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from megatron.bridge.models.conversion.param_mapping import (
    ColumnParallelMapping,
    GatedMLPMapping,
    MegatronParamMapping,
    QKVGMapping,
    QKVMapping,
    ReplicatedMapping,
    RowParallelMapping,
)
from torch import Tensor

from step35_patch.config.model import Step35Config
from step35_patch.tensors.qkv import join_rows, split_rows
from step35_patch.tensors.qkv_layout import QkvLayout
from step35_patch.tensors.table import Cut, MadeOf, Row, live_names, tensor_table

_PARALLEL = {
    Cut.WHOLE: ReplicatedMapping,
    Cut.ROWS: ColumnParallelMapping,
    Cut.COLUMNS: RowParallelMapping,
}


def mappings_of(config: Step35Config, gate_layout: str) -> Iterator[MegatronParamMapping]:
    """The mapping of every parameter and router bias, by all names that a live model may have.

    Args:
        config: the model.
        gate_layout: "headwise" or "expanded".
    """
    for row in tensor_table(config, gate_layout):
        for name in _names(row):
            yield _mapping(row, name)


def _names(row: Row) -> Iterator[str]:
    """Its parameters' names in a model, those of all experts as one with `*` for the number."""
    for name, expert in live_names(row):
        if expert is None:
            yield name
        elif expert == 0:
            yield re.sub(r"(?<=\.local_experts\.)0(?=\.)|(?<=\.weight)0$", "*", name)


def _mapping(row: Row, name: str) -> MegatronParamMapping:
    published = [tensor.name for tensor in row.published]
    if row.qkv is not None:
        q, *g, k, v = published
        gated = Step35QKVGMapping(name, row.qkv, q, k, v, g[0]) if g else None
        return gated or Step35QKVMapping(name, row.qkv, q, k, v)
    if row.is_vocabulary:
        return VocabularyMapping(name, published[0], row.shape[0])
    if row.is_expert:
        if row.made_of is MadeOf.STACKED:
            return ExpertsGatedMLPMapping(name, *published)
        return ExpertsRowParallelMapping(name, published[0])
    if row.made_of is MadeOf.STACKED:
        return GatedMLPMapping(name, *published)
    return _PARALLEL[row.cut](name, published[0])


class VocabularyMapping(ColumnParallelMapping):
    """A matrix by vocabulary rows: padded with zeros for the model, without padding for the file.

    Args:
        megatron_param: the parameter's name.
        hf_param: the published tensor's.
        rows: of the published tensor.
    """

    def __init__(self, megatron_param: str, hf_param: str, rows: int):
        super().__init__(megatron_param, hf_param)
        self.rows = rows

    def hf_to_megatron(self, hf_weights: Tensor, megatron_module: torch.nn.Module) -> Tensor:
        """hf_weights: [vocabulary, h]; returns this rank's rows."""
        padded = megatron_module.get_parameter("weight").shape[0] * self.tp_size
        whole = hf_weights.new_zeros(padded, hf_weights.shape[1])
        whole[: self.rows] = hf_weights
        own: Tensor = super().hf_to_megatron(whole, megatron_module)
        return own

    def megatron_to_hf(
        self, megatron_weights: Tensor | None, megatron_module: torch.nn.Module | None
    ) -> dict[str, Tensor]:
        """megatron_weights: this rank's rows; returns [vocabulary, h] by its published name."""
        whole = super().megatron_to_hf(megatron_weights, megatron_module)
        return {name: tensor[: self.rows] for name, tensor in whole.items()}

    def resolve(self, captures: tuple[str, ...]) -> VocabularyMapping:
        """Its name has no wildcard."""
        return self


class _Qkv:
    """linear_qkv by the layer's own layout, which a whole model's config can't tell.

    Megatron-Bridge's two classes, for a gate and without one, take it from the config.
    """

    layout: QkvLayout
    hf_param: dict[str, str]
    _tp_mapping: ColumnParallelMapping

    def hf_to_megatron(
        self, hf_weights: dict[str, Tensor], megatron_module: torch.nn.Module
    ) -> Tensor:
        """hf_weights: q, k, v and perhaps g, whole; returns this rank's rows of linear_qkv."""
        q, k, v = (hf_weights[letter] for letter in "qkv")
        packed = join_rows(q, hf_weights.get("g"), k, v, self.layout)
        own: Tensor = self._tp_mapping.hf_to_megatron(packed, megatron_module)
        return own

    def megatron_to_hf(
        self, megatron_weights: Tensor | None, megatron_module: torch.nn.Module | None
    ) -> dict[str, Tensor]:
        """megatron_weights: this rank's rows; returns the published tensors by name.

        Of an `expanded` gate's rows of a head, which are tied, the first is taken.
        """
        packed = self._tp_mapping.megatron_to_hf(megatron_weights, megatron_module)
        if not packed:
            return {}
        (whole,) = packed.values()
        q, g, k, v = split_rows(whole, self.layout)
        parts = {"q": q, "k": k, "v": v, "g": g}
        return {self.hf_param[letter]: part for letter, part in parts.items() if part is not None}

    def resolve(self, captures: tuple[str, ...]) -> _Qkv:
        """Its name has no wildcard."""
        return self


class Step35QKVGMapping(_Qkv, QKVGMapping):
    """linear_qkv with a gate.

    Args:
        megatron_param: the parameter's name.
        layout: of its rows.
        q, k, v, g: the published tensors' names.
    """

    def __init__(self, megatron_param: str, layout: QkvLayout, q: str, k: str, v: str, g: str):
        super().__init__(megatron_param, q, k, v, g)
        self.layout = layout
        self._tp_mapping = ColumnParallelMapping(megatron_param, megatron_param)


class Step35QKVMapping(_Qkv, QKVMapping):
    """linear_qkv without a gate.

    Args:
        megatron_param: the parameter's name.
        layout: of its rows.
        q, k, v: the published tensors' names.
    """

    def __init__(self, megatron_param: str, layout: QkvLayout, q: str, k: str, v: str):
        super().__init__(megatron_param, q, k, v)
        self.layout = layout
        self._tp_mapping = ColumnParallelMapping(megatron_param, megatron_param)


class _OfAllExperts(MegatronParamMapping):
    """One expert's weight, whose published tensors hold all experts' in their first dimension."""

    # Megatron-Bridge collects what the experts' tasks export, and stacks it.
    is_grouped_export = True

    def expert(self) -> int:
        """The number of the expert, over all ranks."""
        (number,) = re.findall(r"(?<=\.local_experts\.)\d+|(?<=\.weight)\d+$", self.megatron_param)
        return int(number)


class ExpertsGatedMLPMapping(_OfAllExperts, GatedMLPMapping):
    """An expert's linear_fc1; published are gate and up, [experts, n, h] each."""

    def hf_to_megatron(
        self, hf_weights: dict[str, Tensor], megatron_module: torch.nn.Module
    ) -> Tensor:
        """hf_weights: gate and up of all experts; returns this rank's rows of the expert's."""
        one = {name: weight[self.expert()] for name, weight in hf_weights.items()}
        own: Tensor = super().hf_to_megatron(one, megatron_module)
        return own


class ExpertsRowParallelMapping(_OfAllExperts, RowParallelMapping):
    """An expert's linear_fc2; published is down, [experts, h, n]."""

    def hf_to_megatron(self, hf_weights: Tensor, megatron_module: torch.nn.Module) -> Tensor:
        """hf_weights: down of all experts; returns this rank's columns of the expert's."""
        own: Tensor = super().hf_to_megatron(hf_weights[self.expert()], megatron_module)
        return own
