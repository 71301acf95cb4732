"""The parameters of a live model, and the published tensors that they are made of.

`step35_patch.tensors.table` says which weight is made of which published tensors and how; here the
live parameters are found that stand for its rows. Each rank reads only what its own parameters
need, and gathers the parts of its tensor- and expert-parallel groups.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from step35_patch.model.adapters import adapter_parameters, base_of
from step35_patch.model.description import Step35Runtime
from step35_patch.model.layer import Step35DecoderLayer
from step35_patch.tensors.published import Weights
from step35_patch.tensors.qkv import pack_qkv, unpack_qkv
from step35_patch.tensors.table import (
    Cut,
    MadeOf,
    Row,
    layer_prefix,
    mtp_prefix,
    tensor_table,
)


class _Groups(Protocol):
    """The process groups over which a model's weights are cut.

    Attributes:
        tp: Tensor-parallel.
        expt_tp: Tensor-parallel, of the routed experts.
        ep: Expert-parallel.
    """

    tp: ProcessGroup
    expt_tp: ProcessGroup
    ep: ProcessGroup


@dataclass(frozen=True)
class Entry:
    """One parameter (or buffer) of a live model and its published tensors.

    Attributes:
        row: Of the table; for a routed expert's weight that of all of them.
        parameter: The parameter, this rank's part.
        load: Reads this rank's part from published tensors, in the parameter's shape.
        save: Yields the published tensors; to be called on all ranks of the tensor- and
            expert-parallel groups, because it gathers.
    """

    row: Row
    parameter: Tensor
    load: Callable[[Weights], Tensor]
    save: Callable[[], Iterator[tuple[str, Tensor]]]


def _share(tensor: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """This rank's part of a tensor that is cut along `dim` over a group."""
    return tensor.chunk(group.size(), dim=dim)[group.rank()]


def _gather(tensor: Tensor, dim: int, group: ProcessGroup) -> Tensor:
    """The whole tensor from the parts of a group's ranks, along `dim`."""
    if group.size() == 1:
        return tensor.detach()
    parts = [torch.empty_like(tensor) for _ in range(group.size())]
    torch.distributed.all_gather(parts, tensor.detach().contiguous(), group=group)
    return torch.cat(parts, dim=dim)


def own_values(parameter: Tensor) -> Tensor:
    """What a parameter itself holds."""
    # Through .data: micro-batches in flight may hold the parameter.
    return parameter.data


def _find(module: torch.nn.Module, path: str) -> Tensor | None:
    """The parameter or buffer at a dotted path below a module, or None; adapters apart."""
    found: object = module
    for name in path.split("."):
        found = getattr(base_of(found), name, None)
    return found if isinstance(found, Tensor) else None


class _LiveModel:
    """The entries of one model chunk: the table's rows, found in its modules.

    Args:
        model: A GPTModel.
        runtime: The model that it is.
        values: As for `entries_of`.
    """

    def __init__(self, model: Any, runtime: Step35Runtime, values: Callable[[Tensor], Tensor]):
        self.values = values
        self.model, self.config = model, runtime.config
        self.gate_layout = runtime.gate_layout
        self.groups: _Groups = model.pg_collection
        self.tp = self.groups.tp

    def entries(self) -> Iterator[Entry]:
        """Of the rows whose modules this chunk has."""
        owners = self._owners()
        for row in tensor_table(self.config, self.gate_layout):
            owner = owners.get(row.prefix)
            if owner is None:
                continue
            if row.is_expert:
                yield from self._experts(row, owner)
                continue
            parameter = _find(owner, row.path)
            if parameter is None and row.local_path is not None:
                parameter = _find(owner, row.local_path)
            if parameter is not None:
                yield self._entry(row, parameter, owner)
            elif row.prefix:  # what stands outside the layers is on some stages only
                raise ValueError(f"{row.key}: expected it in the model, found no such parameter")

    def _owners(self) -> dict[str, Any]:
        """The modules that the table's prefixes stand for, as far as this chunk has them."""
        owners = {"": self.model}
        for layer in self.model.decoder.layers:
            owners[layer_prefix(self.config, layer.plan)] = layer
        for mtp in self.model.mtp.layers if getattr(self.model, "mtp_process", False) else ():
            layer = mtp.mtp_model_layer
            owners[mtp_prefix(self.config, layer.plan)] = mtp
            owners[layer_prefix(self.config, layer.plan)] = layer
        return owners

    def _entry(self, row: Row, parameter: Tensor, owner: Any) -> Entry:
        if row.made_of is MadeOf.QKV:
            return self._qkv(row, parameter, owner)
        if row.made_of is MadeOf.STACKED:
            return self._stacked(row, parameter)
        if row.is_vocabulary:
            return self._vocabulary(row, parameter)
        return self._same(row, parameter)

    def _same(self, row: Row, parameter: Tensor) -> Entry:
        (published,) = row.published
        dim = {Cut.WHOLE: None, Cut.ROWS: 0, Cut.COLUMNS: 1}[row.cut]

        def load(weights: Weights) -> Tensor:
            whole = weights.get(published.name)
            return whole if dim is None else _share(whole, dim, self.tp)

        def save() -> Iterator[tuple[str, Tensor]]:
            part = self.values(parameter)
            yield published.name, part if dim is None else _gather(part, dim, self.tp)

        return Entry(row, parameter, load, save)

    def _vocabulary(self, row: Row, parameter: Tensor) -> Entry:
        """Cut by rows, which Megatron-Core pads; the padding is zero and is not published."""
        (published,) = row.published
        if parameter.shape[0] * self.tp.size() < published.shape[0]:
            raise ValueError(
                f"{row.key}: expected at least {published.shape[0]} rows over all ranks, found "
                f"{parameter.shape[0]} on each of {self.tp.size()}; with a value head in place of "
                "the output layer a model has no published layout: load the weights before it is "
                "put there, and save the model in Megatron's format"
            )

        def load(weights: Weights) -> Tensor:
            rows, rank = parameter.shape[0], self.tp.rank()
            part = weights.get(published.name, slice(rank * rows, (rank + 1) * rows))
            return torch.cat([part, part.new_zeros(rows - part.shape[0], part.shape[1])])

        def save() -> Iterator[tuple[str, Tensor]]:
            yield published.name, _gather(self.values(parameter), 0, self.tp)[: published.shape[0]]

        return Entry(row, parameter, load, save)

    def _qkv(self, row: Row, parameter: Tensor, layer: Step35DecoderLayer) -> Entry:
        attention, plan = layer.self_attention, layer.plan
        gate_layout = self.gate_layout if self.config.use_head_wise_attn_gate else None
        q, *g, k, v = (published.name for published in row.published)

        def load(weights: Weights) -> Tensor:
            gate = weights.get(g[0]) if g else None
            parts = weights.get(q), weights.get(k), weights.get(v), gate
            return _share(pack_qkv(*parts, plan, gate_layout), 0, self.tp)

        def save() -> Iterator[tuple[str, Tensor]]:
            own = self.values(parameter)
            if attention.tied_gate:
                attention.tie_gate_rows(own)
            whole = _gather(own, 0, self.tp)
            parts = unpack_qkv(whole, plan, gate_layout, row.key)
            for name, part in zip((q, k, v, *g), parts, strict=False):  # no gate without its name
                if part is not None:
                    yield name, part

        return Entry(row, parameter, load, save)

    def _stacked(self, row: Row, parameter: Tensor) -> Entry:
        """Each rank has its part of each published tensor, one below the other."""
        names = [published.name for published in row.published]

        def load(weights: Weights) -> Tensor:
            return torch.cat([_share(weights.get(name), 0, self.tp) for name in names])

        def save() -> Iterator[tuple[str, Tensor]]:
            for name, part in zip(names, self.values(parameter).chunk(len(names)), strict=True):
                yield name, _gather(part, 0, self.tp)

        return Entry(row, parameter, load, save)

    def _experts(self, row: Row, layer: Step35DecoderLayer) -> Iterator[Entry]:
        """A weight of this rank's routed experts; published as one tensor for all experts."""
        moe, etp, ep = layer.mlp, self.groups.expt_tp, self.groups.ep
        names = [published.name for published in row.published]
        dim = {Cut.ROWS: 0, Cut.COLUMNS: 1}[row.cut]
        parameters = [
            _expert_weight(moe.experts, row.path.split(".")[-2], position)
            for position in range(len(moe.local_expert_indices))
        ]

        def load(weights: Weights, expert: int) -> Tensor:
            parts = [_share(weights.get(name, expert), dim, etp) for name in names]
            return torch.cat(parts)

        def save() -> Iterator[tuple[str, Tensor]]:
            own = torch.stack([self.values(parameter) for parameter in parameters])
            for name, part in zip(names, own.chunk(len(names), dim=1), strict=True):
                yield name, _gather(_gather(part, 1 + dim, etp), 0, ep)

        def nothing() -> Iterator[tuple[str, Tensor]]:
            return iter(())

        for position, expert in enumerate(moe.local_expert_indices):
            # All experts make up one published tensor: the first entry saves it.
            first = position == 0
            loads = functools.partial(load, expert=expert)
            yield Entry(row, parameters[position], loads, save if first else nothing)


def _expert_weight(experts: Any, linear: str, position: int) -> Tensor:
    """The weight of one of a rank's experts, which are modules of their own or grouped in one."""
    parameter: Tensor
    if hasattr(experts, "local_experts"):
        parameter = base_of(getattr(experts.local_experts[position], linear)).weight
    else:
        parameter = getattr(base_of(getattr(experts, linear)), f"weight{position}")
    return parameter


def _check_covered(model: torch.nn.Module, entries: list[Entry], *, beside_adapters: bool) -> None:
    """Every parameter and router bias must have an entry: none may keep its random start."""
    known = {id(entry.parameter) for entry in entries}
    if beside_adapters:
        known |= {id(parameter) for parameter in adapter_parameters(model)}
    forgotten = [name for name, value in model.named_parameters() if id(value) not in known]
    if forgotten:
        raise ValueError(
            "parameters of the model that the published layout does not have:\n  "
            + "\n  ".join(forgotten)
        )


def entries_of(
    model: torch.nn.Module,
    runtime: Step35Runtime,
    values: Callable[[Tensor], Tensor] = own_values,
    *,
    beside_adapters: bool = False,
) -> list[Entry]:
    """Every parameter and router bias of one model chunk, with its published tensors.

    Args:
        model: A GPTModel.
        runtime: The model that it is.
        values: What to save for a parameter or router bias: this rank's part, in its shape.
        beside_adapters: Whether the model may have LoRA adapters, which have no entry.

    Raises:
        ValueError: the model has a parameter that the published layout does not have.
    """
    # A model whose modules stand otherwise than a GPTModel's shows them as these do.
    as_gpt = getattr(model, "as_gpt_model", lambda: model)()
    entries = list(_LiveModel(as_gpt, runtime, values).entries())
    _check_covered(model, entries, beside_adapters=beside_adapters)
    return entries
