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
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from step35_patch.config.layer_plan import LayerPlan
from step35_patch.settings import GATE_LAYOUTS

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
        key: Its name in the checkpoint.
        shape: Its sizes over all ranks, without padding of the vocabulary.
        chunks: They cover it, without overlap.
        is_vocabulary: Whether a checkpoint may have more rows, which are padding.
        is_router_bias: Whether it is fp32 whatever dtype the model has.
    """

    key: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]
    is_vocabulary: bool = False
    is_router_bias: bool = False


@dataclass(frozen=True, slots=True)
class Box:
    """Where a run stands in a Megatron tensor."""

    key: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]


def megatron_tensors(config: Step35Config, gate_layout: str) -> tuple[MegatronTensor, ...]:
    """Every weight and router bias of the model, in the published order of layers.

    Args:
        config: The model.
        gate_layout: `"headwise"` or `"expanded"`; without meaning if the config has no gate.

    Raises:
        ValueError: `gate_layout` is neither.
    """
    if gate_layout not in GATE_LAYOUTS:
        raise ValueError(
            f"gate_layout: expected one of {', '.join(GATE_LAYOUTS)}, found {gate_layout!r}"
        )
    return tuple(_Tensors(config, gate_layout).all())


class _Tensors:
    def __init__(self, config: Step35Config, gate_layout: str):
        self.config, self.gate_layout = config, gate_layout

    def all(self) -> Iterator[MegatronTensor]:
        config = self.config
        hidden, vocabulary = config.hidden_size, (config.vocab_size, config.hidden_size)
        yield self._same(
            "embedding.word_embeddings.weight", "model.embed_tokens.weight", vocabulary, True
        )
        for plan in config.layers:
            if plan.is_mtp:
                yield from self._mtp(plan)
            else:
                yield from self._layer(plan, f"decoder.layers.{plan.index}.")
        yield self._same("decoder.final_layernorm.weight", "model.norm.weight", (hidden,))
        yield self._same("output_layer.weight", "lm_head.weight", vocabulary, True)

    def _mtp(self, plan: LayerPlan) -> Iterator[MegatronTensor]:
        config = self.config
        hidden, depth = config.hidden_size, plan.index - config.num_hidden_layers
        published, key = f"model.layers.{plan.index}.", f"mtp.layers.{depth}."
        yield self._same(f"{key}enorm.weight", f"{published}enorm.weight", (hidden,))
        yield self._same(f"{key}hnorm.weight", f"{published}hnorm.weight", (hidden,))
        shape = (hidden, 2 * hidden)
        yield self._same(f"{key}eh_proj.weight", f"{published}eh_proj.weight", shape)
        yield from self._layer(plan, f"{key}transformer_layer.")
        head = f"{published}transformer.shared_head."
        yield self._same(f"{key}final_layernorm.weight", f"{head}norm.weight", (hidden,))
        shape = (config.vocab_size, hidden)
        output_key = f"mtp_output_layers.{depth}.weight"
        yield self._same(output_key, f"{head}output.weight", shape, True)

    def _layer(self, plan: LayerPlan, key: str) -> Iterator[MegatronTensor]:
        config, published = self.config, f"model.layers.{plan.index}."
        hidden = config.hidden_size
        attention, attn = f"{key}self_attention.", f"{published}self_attn."
        # Transformer Engine keeps a norm in the linear layer behind it.
        norm_key = f"{attention}linear_qkv.layer_norm_weight"
        yield self._same(norm_key, f"{published}input_layernorm.weight", (hidden,))
        yield self._qkv(plan, f"{attention}linear_qkv.weight", attn)
        for letter in "qk":
            norm = (f"{attention}{letter}_layernorm.weight", f"{attn}{letter}_norm.weight")
            yield self._same(*norm, (plan.kv_channels,))
        shape = (hidden, plan.num_attention_heads * plan.kv_channels)
        yield self._same(f"{attention}linear_proj.weight", f"{attn}o_proj.weight", shape)
        norm = f"{published}post_attention_layernorm.weight"
        if not plan.is_moe:
            yield self._same(f"{key}mlp.linear_fc1.layer_norm_weight", norm, (hidden,))
            inner = config.intermediate_size
            yield from self._mlp(f"{key}mlp.", f"{published}mlp.", inner)
            return
        yield self._same(f"{key}pre_mlp_layernorm.weight", norm, (hidden,))
        experts = config.moe_num_experts
        router, moe = f"{key}mlp.router.", f"{published}moe."
        yield self._same(f"{router}weight", f"{moe}gate.weight", (experts, hidden))
        bias = self._same(f"{router}expert_bias", f"{moe}router_bias", (experts,))
        yield replace(bias, is_router_bias=True)
        yield from self._experts(f"{key}mlp.experts.experts.", moe)
        shared = (f"{key}mlp.shared_experts.", f"{published}share_expert.")
        yield from self._mlp(*shared, config.share_expert_dim)

    def _same(
        self, key: str, name: str, shape: tuple[int, ...], is_vocabulary: bool = False
    ) -> MegatronTensor:
        """The same tensor in both layouts."""
        rows, row = shape[0], math.prod(shape[1:])
        chunks = tuple(
            Chunk((first, *[0] * len(shape[1:])), (run.rows, *shape[1:]), (run,))
            for first, run in _runs(name, rows, row)
        )
        return MegatronTensor(key, shape, chunks, is_vocabulary)

    def _mlp(self, key: str, published: str, inner: int) -> Iterator[MegatronTensor]:
        hidden = self.config.hidden_size
        chunks = tuple(
            Chunk((half * inner + first, 0), (run.rows, hidden), (run,))
            for half, name in enumerate(("gate_proj", "up_proj"))
            for first, run in _runs(f"{published}{name}.weight", inner, hidden)
        )
        shape = (2 * inner, hidden)
        yield MegatronTensor(f"{key}linear_fc1.weight", shape, chunks)
        down = f"{published}down_proj.weight"
        yield self._same(f"{key}linear_fc2.weight", down, (hidden, inner))

    def _experts(self, key: str, published: str) -> Iterator[MegatronTensor]:
        config = self.config
        experts, hidden, inner = (
            config.moe_num_experts,
            config.hidden_size,
            config.moe_intermediate_size,
        )

        def chunk(expert: int, first: int, name: str, rows: int, row: int) -> Chunk:
            run = Run(f"{published}{name}.weight", expert * rows * row, rows, row)
            return Chunk((expert, first, 0), (1, rows, row), (run,))

        fc1 = tuple(
            chunk(expert, half * inner, name, inner, hidden)
            for expert in range(experts)
            for half, name in enumerate(("gate_proj", "up_proj"))
        )
        shape = (experts, 2 * inner, hidden)
        yield MegatronTensor(f"{key}linear_fc1.weight", shape, fc1)
        fc2 = tuple(chunk(expert, 0, "down_proj", hidden, inner) for expert in range(experts))
        shape = (experts, hidden, inner)
        yield MegatronTensor(f"{key}linear_fc2.weight", shape, fc2)

    def _qkv(self, plan: LayerPlan, key: str, published: str) -> MegatronTensor:
        """Rows by query group, [q | gate | k | v]; the gate's layouts: see gate_layout.py."""
        hidden, groups, channels = self.config.hidden_size, plan.num_query_groups, plan.kv_channels
        heads = plan.num_attention_heads // groups
        parts = [("q", heads * channels, 1), ("k", channels, 1), ("v", channels, 1)]
        if self.config.use_head_wise_attn_gate:
            repeat = channels if self.gate_layout == "expanded" else 1
            parts.insert(1, ("g", heads * repeat, repeat))
        of_group = sum(rows for _, rows, _ in parts)
        chunks = []
        for group in range(groups):
            runs = tuple(
                Run(
                    f"{published}{letter}_proj.weight",
                    group * (rows // repeat) * hidden,
                    rows,
                    hidden,
                    repeat,
                )
                for letter, rows, repeat in parts
            )
            chunks.append(Chunk((group * of_group, 0), (of_group, hidden), runs))
        shape = (groups * of_group, hidden)
        return MegatronTensor(key, shape, tuple(chunks))


def _runs(name: str, rows: int, row: int) -> Iterator[tuple[int, Run]]:
    """A [rows, row] matrix as runs of bounded size, each with its first row."""
    at_once = max(1, _MAX_RUN // row)
    for first in range(0, rows, at_once):
        yield first, Run(name, first * row, min(at_once, rows - first), row)


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


def extra_states(config: Step35Config) -> Iterator[str]:
    """The keys of the `_extra_state` objects that Megatron-Core asks a checkpoint for.

    Those of Transformer Engine's modules, of which the local implementation has some. They hold
    FP8 scaling, and nothing for a model in another precision.
    """

    def of(*modules: str) -> Iterator[str]:
        yield from (f"{module}._extra_state/shard_0_1" for module in modules)

    for plan in config.layers:
        key = f"decoder.layers.{plan.index}."
        if plan.is_mtp:
            depth = plan.index - config.num_hidden_layers
            key = f"mtp.layers.{depth}."
            yield from of(*(f"{key}{name}" for name in ("enorm", "hnorm", "eh_proj")))
            yield from of(f"{key}final_layernorm", f"mtp_output_layers.{depth}")
            key += "transformer_layer."
        for name in ("linear_qkv", "linear_proj", "q_layernorm", "k_layernorm"):
            yield from of(f"{key}self_attention.{name}")
        linear = ("linear_fc1", "linear_fc2")
        if not plan.is_moe:
            yield from of(*(f"{key}mlp.{name}" for name in linear))
            continue
        yield from of(f"{key}pre_mlp_layernorm")
        yield from of(*(f"{key}mlp.shared_experts.{name}" for name in linear))
        for name in linear:
            experts = config.moe_num_experts
            module = f"{key}mlp.experts.experts.{name}"
            yield from (f"{module}._extra_state/shard_{e}_{experts}" for e in range(experts))
    yield from of("decoder.final_layernorm")
