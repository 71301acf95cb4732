"""The tensors of a Megatron checkpoint of a Step-3.5 model, and what they are made of.

A torch_dist checkpoint holds each weight whole, under a key, as chunks that need not be the
parallel ranks' parts. `megatron_tensors` lists keys, shapes and chunks; a chunk is made of runs of
rows that stand in a published tensor in the same order, so that conversion in either direction
is copying runs. Keys are the same for both of Megatron-Core's transformer implementations and for
every parallel layout. Nothing but the standard library is used.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from step35_patch.settings import GATE_LAYOUTS
from step35_patch.tensors.qkv_layout import QkvLayout
from step35_patch.tensors.table import Row, layer_prefix, tensor_table

if TYPE_CHECKING:
    from step35_patch.config.model import Step35Config

# The most elements in a run, so that what is held in memory does not grow with the vocabulary.
_MAX_RUN = 2**25


@dataclass(frozen=True, slots=True)
class Run:
    """Rows that stand one after the other in a published tensor and in a Megatron one.

    Attributes:
        name: The published tensor.
        start: The first element, in it, row by row.
        rows: How many rows on Megatron's side.
        row: Elements of a row.
        repeat: How often each published row stands on Megatron's side (the gate's rows in the
            `expanded` layout).
    """

    name: str
    start: int
    rows: int
    row: int
    repeat: int = 1

    @property
    def num_elements(self) -> int:
        """How many numbers of the published tensor it covers."""
        return self.rows // self.repeat * self.row


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a Megatron tensor, made of runs of rows, one below the other.

    Attributes:
        offsets: Of its first element in the tensor, by dimension.
        sizes: Its own, by dimension; those behind the rows' are the tensor's.
        runs: Together as many rows as it has.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    runs: tuple[Run, ...]


@dataclass(frozen=True, slots=True)
class MegatronTensor:
    """A weight in a Megatron checkpoint.

    Attributes:
        row: Of the table.
        chunks: They cover it, without overlap.
    """

    row: Row
    chunks: tuple[Chunk, ...]

    @property
    def key(self) -> str:
        """Its name in the checkpoint."""
        return self.row.key

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes over all ranks, without padding of the vocabulary."""
        return self.row.shape

    @property
    def is_vocabulary(self) -> bool:
        """Whether a checkpoint may have more rows, which are padding."""
        return self.row.is_vocabulary

    @property
    def is_router_bias(self) -> bool:
        """Whether it is fp32 whatever dtype the model has."""
        return self.row.is_fp32


@dataclass(frozen=True, slots=True)
class Box:
    """Where a run stands in a Megatron tensor."""

    key: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


def megatron_tensors(
    config: Step35Config, gate_layout: str, *, mtp_layers: int | None = None
) -> tuple[MegatronTensor, ...]:
    """Every weight and router bias of the model, in the published order of layers.

    Args:
        config: The model.
        gate_layout: `"headwise"` or `"expanded"`; without meaning if the config has no gate.
        mtp_layers: How many of the config's MTP layers, the first ones; all if None.

    Raises:
        ValueError: `gate_layout` is neither.
    """
    if gate_layout not in GATE_LAYOUTS:
        raise ValueError(
            f"gate_layout: expected one of {', '.join(GATE_LAYOUTS)}, found {gate_layout!r}"
        )
    return tuple(
        MegatronTensor(row, tuple(_qkv_chunks(row, row.qkv) if row.qkv else _chunks(row)))
        for row in tensor_table(config, gate_layout, mtp_layers=mtp_layers)
    )


def _chunks(row: Row) -> Iterator[Chunk]:
    """Of a weight that is one published tensor, or several one below the other."""
    shape = row.published[0].shape
    if row.is_expert:
        experts, rows, width = shape
        places: list[tuple[int, ...]] = [(expert,) for expert in range(experts)]
    else:
        rows, width = shape[0], math.prod(shape[1:])
        places = [()]
    behind = shape[-1:] if len(shape) > 1 else ()
    for place in places:
        start = math.prod((*place, rows, width)) if place else 0
        for number, tensor in enumerate(row.published):
            for first, run in _runs(tensor.name, start, rows, width):
                offsets = (*place, number * rows + first, *(0 for _ in behind))
                yield Chunk(offsets, (*(1 for _ in place), run.rows, *behind), (run,))


def _qkv_chunks(row: Row, layout: QkvLayout) -> Iterator[Chunk]:
    """Of linear_qkv: one for each query group."""
    hidden, sections = row.shape[-1], layout.sections
    parts = [(rows, 1) for rows in sections if rows]
    if layout.gate_rows:
        parts[1] = (sections.gate, layout.gate_rows)
    of_group = sum(sections)
    for group in range(layout.groups):
        runs = tuple(
            # Of the gate, a published row stands `gate_rows` times.
            Run(tensor.name, group * (rows // repeat) * hidden, rows, hidden, repeat)
            for tensor, (rows, repeat) in zip(row.published, parts, strict=True)
        )
        yield Chunk((group * of_group, 0), (of_group, hidden), runs)


def _runs(name: str, start: int, rows: int, row: int) -> Iterator[tuple[int, Run]]:
    """A [rows, row] matrix that begins at element `start`, as runs of bounded size.

    Yields:
        A run, and which of the matrix's rows is its first.
    """
    at_once = max(1, _MAX_RUN // row)
    for first in range(0, rows, at_once):
        yield first, Run(name, start + first * row, min(at_once, rows - first), row)


def published_runs(tensors: tuple[MegatronTensor, ...]) -> dict[str, list[tuple[Run, Box]]]:
    """For each published tensor the runs that make it up, in its order, and where they stand."""
    runs: dict[str, list[tuple[Run, Box]]] = {}
    for tensor in tensors:
        for chunk in tensor.chunks:
            # The dimension of rows is the last but one, or the only one.
            rows_at = max(0, len(chunk.sizes) - 2)
            first = chunk.offsets[rows_at]
            for run in chunk.runs:
                offsets, sizes = list(chunk.offsets), list(chunk.sizes)
                offsets[rows_at], sizes[rows_at] = first, run.rows
                box = Box(tensor.key, tuple(offsets), tuple(sizes))
                runs.setdefault(run.name, []).append((run, box))
                first += run.rows
    for pairs in runs.values():
        pairs.sort(key=lambda pair: pair[0].start)
    return runs


def extra_states(config: Step35Config, *, mtp_layers: int | None = None) -> Iterator[str]:
    """The keys of the `_extra_state` objects that Megatron-Core asks a checkpoint for.

    Those of Transformer Engine's modules, of which the local implementation has some. They hold
    FP8 scaling, and nothing for a model in another precision.

    Args:
        config: The model.
        mtp_layers: As for `megatron_tensors`.
    """

    def place(row: Row) -> tuple[int, int]:
        # As converted checkpoints have always listed them: another order is other bytes.
        if row.layer is None:
            return len(config.layers), 0
        if row.prefix != layer_prefix(config, row.layer):  # around an MTP layer
            return row.layer.index, 0
        if row.path.startswith("self_attention.linear_"):
            return row.layer.index, 1
        return row.layer.index, 3 if row.is_expert else 2

    table = tensor_table(config, GATE_LAYOUTS[0], mtp_layers=mtp_layers)
    for row in sorted(table, key=place):
        yield from _extra_states_of(row)


def norm_extra_states(config: Step35Config) -> frozenset[str]:
    """Those of norms, which are empty in every precision, and which only Transformer Engine has."""
    table = tensor_table(config, GATE_LAYOUTS[0])
    return frozenset(key for row in table if len(row.shape) == 1 for key in _extra_states_of(row))


def _extra_states_of(row: Row) -> Iterator[str]:
    module, _, name = row.key.rpartition(".")
    if name != "weight" or not row.has_extra_state:  # a norm within a linear layer has none
        return
    shards = row.shape[0] if row.is_expert else 1
    yield from (f"{module}._extra_state/shard_{shard}_{shards}" for shard in range(shards))
