"""One weight of a Megatron model as published tensors, for trainers that send them one by one."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from step35_patch.config.model import Step35Config
from step35_patch.model.description import Step35Runtime, runtime_for
from step35_patch.settings import GATE_LAYOUTS
from step35_patch.tensors.qkv import gate_rows, refuse_drift, split_rows
from step35_patch.tensors.spelling import expert_name
from step35_patch.tensors.table import MadeOf, Row, live_names, tensor_table

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

# What wrappers (Float16Module, DistributedDataParallel) put before a name, each once.
_WRAPPER = "module."


class _Place(NamedTuple):
    """What a name stands for.

    Attributes:
        row: Of the table.
        expert: Which of the routed experts; None for another weight, or for all of them.
    """

    row: Row
    expert: int | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes over all ranks, without padding of the vocabulary."""
        return self.row.shape if self.expert is None else self.row.shape[1:]

    def fits(self, tensor: Tensor) -> bool:
        """Whether a tensor is the whole weight; of the vocabulary's rows it may have more."""
        rows, *others = tensor.shape or [0]
        wanted, *wanted_others = self.shape
        enough = rows >= wanted if self.row.is_vocabulary else rows == wanted
        return enough and others == wanted_others

    def __str__(self) -> str:
        return f"{list(self.shape)}{' or more rows' if self.row.is_vocabulary else ''}"


def megatron_to_hf(
    name: str, tensor: Tensor, config: Step35Config | TransformerConfig
) -> list[tuple[str, Tensor]]:
    """The published tensors that one weight of a Megatron model is made of.

    The published layout has the routed experts of a layer in one tensor. A single expert's weight
    gets the name that vLLM's Step-3.5 reads it by, `model.layers.3.moe.experts.7.up_proj.weight`;
    `step35_patch.checkpoint.published_tensors_of` yields them as they are published.

    Args:
        name: Of the parameter (or router bias) as `named_parameters` of a GPTModel has it, or as a
            Megatron checkpoint does, with any number of `module.` before it. Layers are counted
            over the whole model, and so are experts: `...experts.linear_fc1.weight7` and
            `...experts.local_experts.7.linear_fc1.weight` are one of them, a checkpoint's
            `...experts.experts.linear_fc1.weight` is all of them.
        tensor: The whole weight: gathered over the tensor-parallel ranks, a gated linear_fc1 with
            all gate rows above all up rows. Rows that pad the vocabulary are cut off.
        config: The model: its Step35Config, or a TransformerConfig that it was built with (a
            Step35ModelProvider is one). With a Step35Config the gate's layout is told by the
            tensor's rows. In the `expanded` layout the first of a head's gate rows is the one
            that is trained and taken; with a Step35Config, which does not say who trained them,
            they have to be equal.

    Returns:
        (name, tensor) pairs in the tensor's dtype, on its device; they may share its memory.

    Raises:
        ValueError: The model has no weight of this name, or one of another shape; or the config is
            no Step-3.5 model's.
        DriftedGateError: The gate's rows differ, with a Step35Config.
    """
    place, parts = _published(name, tensor, config)
    names = [published.name for published in place.row.published]
    if place.expert is not None:
        names = [expert_name(one, place.expert) for one in names]
    return list(zip(names, parts, strict=True))


def _published(
    name: str, tensor: Tensor, config: Step35Config | TransformerConfig | Step35Runtime
) -> tuple[_Place, Sequence[Tensor]]:
    """What a weight stands for, and the published tensors' values, in the row's order."""
    tensor = tensor.detach()
    step35, gate_layout = _description(config)
    bare = name
    while bare.startswith(_WRAPPER):
        bare = bare.removeprefix(_WRAPPER)
    layouts = GATE_LAYOUTS if gate_layout is None else (gate_layout,)
    places = (_places(step35, one).get(bare) for one in layouts)
    known = [place for place in places if place is not None]
    if not known:
        raise ValueError(
            f"{name}: a Step-3.5 model of this config ({step35.num_hidden_layers} decoder and "
            f"{step35.num_nextn_predict_layers} MTP layers) has no such weight; expected a "
            "parameter's name with the layer's and expert's number in the whole model, as "
            "decoder.layers.0.self_attention.linear_qkv.weight"
        )
    place = next((place for place in known if place.fits(tensor)), None)
    if place is None:
        raise ValueError(
            f"{name}: expected the whole weight, {' or '.join(dict.fromkeys(map(str, known)))}, "
            f"found {list(tensor.shape)}; gather it over the tensor-parallel ranks (a routed "
            "expert's: over the expert-tensor-parallel ones)"
        )
    return place, _parts(name, tensor, place.row, from_here=gate_layout is not None)


class WholeTensors:
    """One weight after the other as published tensors, those of routed experts together.

    For engines that read the experts of a layer as they are published, in one tensor. Each call
    does what `megatron_to_hf` does; single experts are held back until all of a tensor are there,
    at most the weights of the layers that are under way.

    Args:
        config: as for `megatron_to_hf`.
    """

    def __init__(self, config: Step35Config | TransformerConfig | Step35Runtime):
        self._config = config
        self._waiting: dict[str, dict[int, Tensor]] = {}

    def __call__(self, name: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
        """As `megatron_to_hf`; nothing for an expert's weight unless it is a layer's last.

        Raises:
            ValueError, DriftedGateError: As `megatron_to_hf`; or an expert came twice before all
                of its layer had come.
        """
        place, parts = _published(name, tensor, self._config)
        names = [published.name for published in place.row.published]
        if place.expert is None:
            return list(zip(names, parts, strict=True))
        whole = []
        for published, part in zip(names, parts, strict=True):
            waiting = self._waiting.setdefault(published, {})
            if place.expert in waiting:
                raise ValueError(
                    f"{name}: expected the other experts of its layer first, found this one again; "
                    "the weights before it were not gone through to their end: begin again with a "
                    "new WholeTensors"
                )
            # The caller may use the tensor's memory again.
            waiting[place.expert] = part.detach().clone()
            if len(waiting) == place.row.shape[0]:
                del self._waiting[published]
                whole.append((published, torch.stack([waiting[i] for i in sorted(waiting)])))
        return whole


def _parts(name: str, tensor: Tensor, row: Row, *, from_here: bool) -> Sequence[Tensor]:
    """What the published tensors of a row are; `from_here` if a model of this package has it."""
    if row.qkv is not None:
        q, g, k, v = split_rows(tensor, row.qkv)
        if g is None:
            return q, k, v
        if not from_here:
            refuse_drift(gate_rows(tensor, row.qkv), name)
        return q, g, k, v
    if row.made_of is MadeOf.STACKED:
        return tensor.chunk(len(row.published), dim=-2)
    return [tensor[: row.shape[0]] if row.is_vocabulary else tensor]


def _description(
    config: Step35Config | TransformerConfig | Step35Runtime,
) -> tuple[Step35Config, str | None]:
    """The model, and its gate's layout if that is known."""
    if isinstance(config, Step35Config):
        return config, None
    runtime = config if isinstance(config, Step35Runtime) else _runtime_of(config)
    if runtime is None:
        raise ValueError(
            "config: expected a Step35Config or a Step-3.5 model's TransformerConfig, found a "
            f"{type(config).__name__} that is neither; hand over model.config"
        )
    return runtime.config, runtime.gate_layout


def _runtime_of(config: object) -> Step35Runtime | None:
    from megatron.core.transformer.transformer_config import TransformerConfig

    return runtime_for(config) if isinstance(config, TransformerConfig) else None


@functools.lru_cache(maxsize=4)
def _places(config: Step35Config, gate_layout: str) -> dict[str, _Place]:
    """Every name that a weight goes by."""
    return {
        name: _Place(row, expert)
        for row in tensor_table(config, gate_layout)
        for name, expert in ((row.key, None), *live_names(row))
    }
