"""The one table of a model's tensors: published names, Megatron keys, shapes, what is made of what.

Everything that knows a weight by name reads it here: the published list and its byte counts, the
conversion in both directions, the weights of live models, the counts of parameters by rank.

A row is one weight (or router bias) of Megatron-Core's:

    key        its name in a Megatron checkpoint, `prefix` + `path`
    shape      its sizes over all ranks, without padding of the vocabulary
    published  the published tensors that it is made of, in their order in it
    made_of    how it is made of them
    cut        how tensor parallelism divides it
    layer      the plan of its layer; None for what stands outside the layers

    prefix                            path                          published
    ""                                embedding.word_embeddings...  model.embed_tokens.weight
    decoder.layers.3.                 self_attention.linear_qkv...  q, g, k and v_proj
    mtp.layers.0.transformer_layer.   mlp.linear_fc1...             gate_proj, up_proj

Only the standard library is used, so that the table can be had where there is no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto
from typing import TYPE_CHECKING

from step35_patch.config.layer_plan import LayerPlan
from step35_patch.tensors.qkv_layout import QkvLayout

if TYPE_CHECKING:
    from step35_patch.config.model import Step35Config

# Published names of what stands outside the layers, and the embedding's key.
EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
EMBEDDING_KEY = "embedding.word_embeddings.weight"
_MTP_HEAD = "transformer.shared_head.output"


class MadeOf(Enum):
    """How a Megatron weight is made of published tensors.

    The weights of routed experts are made so expert by expert; both sides have the experts as
    their first dimension.
    """

    SAME = auto()  # one published tensor, as it is
    STACKED = auto()  # published tensors one below the other: gate over up
    QKV = auto()  # by query group: see QkvLayout


class Cut(Enum):
    """How tensor parallelism divides a weight; routed experts' by the expert-tensor-parallel size.

    Expert parallelism divides routed experts' weights by their first dimension besides.
    """

    WHOLE = auto()  # every rank has all of it
    ROWS = auto()  # column-parallel layers: each published tensor by rows, q, k and v by groups
    COLUMNS = auto()  # row-parallel layers


@dataclass(frozen=True, slots=True)
class Published:
    """One published tensor.

    Attributes:
        name: As in the published checkpoint.
        shape: Its sizes; a weight of a linear layer is [out, in].
        place: Its place among the tensors of its layer, or of what stands outside the layers.
        is_fp32: Whether it is fp32 whatever dtype the model has: the routers' biases.
    """

    name: str
    shape: tuple[int, ...]
    place: int
    is_fp32: bool = False


@dataclass(frozen=True, slots=True)
class Row:
    """One weight or router bias of Megatron-Core's: see the top of this module.

    Attributes:
        prefix: Of its key: the module that it stands in, with a dot behind it, or nothing.
        path: The rest of its key.
        published: What it is made of.
        made_of: How it is made of that.
        cut: How tensor parallelism divides it.
        layer: The plan of its layer, or None.
        local_path: Where a live model has it if not at `path`: Transformer Engine keeps a norm in
            the linear layer behind it, the local implementation has a module of its own; and the
            MTP layers' output matrices are under an older name in checkpoints.
        qkv: How the rows of a linear_qkv stand; None for others.
        is_vocabulary: Whether its rows are the vocabulary, which Megatron-Core may pad.
        is_expert: Whether its first dimension is the routed experts.
        has_extra_state: Whether Megatron-Core asks a checkpoint for its module's `_extra_state`.
    """

    prefix: str
    path: str
    published: tuple[Published, ...]
    made_of: MadeOf = MadeOf.SAME
    cut: Cut = Cut.WHOLE
    layer: LayerPlan | None = None
    local_path: str | None = None
    qkv: QkvLayout | None = None
    is_vocabulary: bool = False
    is_expert: bool = False
    has_extra_state: bool = True

    @property
    def key(self) -> str:
        """Its name in a Megatron checkpoint."""
        return self.prefix + self.path

    @property
    def shape(self) -> tuple[int, ...]:
        """Its sizes over all ranks, without padding of the vocabulary."""
        first = self.published[0].shape
        if self.made_of is MadeOf.SAME:
            return first
        rows = sum(tensor.shape[-2] for tensor in self.published)
        if self.qkv is not None:
            rows = self.qkv.rows
        return (*first[:-2], rows, first[-1])

    @property
    def num_elements(self) -> int:
        """How many numbers it holds, over all ranks."""
        return math.prod(self.shape)

    @property
    def is_fp32(self) -> bool:
        """Whether it is fp32 whatever dtype the model has: a router's bias, which is a buffer."""
        return self.published[0].is_fp32

    def elements_on_rank(self, *, tensor: int, expert: int, expert_tensor: int) -> int:
        """How many of its numbers one rank holds.

        Args:
            tensor: Tensor-parallel size.
            expert: Expert-parallel size.
            expert_tensor: Tensor-parallel size of the routed experts.
        """
        if self.is_expert:
            return self.num_elements // expert // expert_tensor
        return self.num_elements if self.cut is Cut.WHOLE else self.num_elements // tensor


def tensor_table(
    config: Step35Config, gate_layout: str, *, mtp_layers: int | None = None
) -> tuple[Row, ...]:
    """Every weight and router bias of a model, in the order of its layers.

    Args:
        config: The model.
        gate_layout: `"headwise"` or `"expanded"`; without meaning if the config has no gate.
        mtp_layers: How many of the config's MTP layers, the first ones; all if None.
    """
    hidden, vocabulary = config.hidden_size, (config.vocab_size, config.hidden_size)
    rows = [_vocabulary(EMBEDDING_KEY, Published(EMBEDDING, vocabulary, 0))]
    for plan in layers_with(config, mtp_layers):
        rows += layer_rows(config, plan, gate_layout)
    norm = Published(FINAL_NORM, (hidden,), 1)
    rows.append(Row("", "decoder.final_layernorm.weight", (norm,)))
    rows.append(_vocabulary("output_layer.weight", Published(HEAD, vocabulary, 2)))
    return tuple(rows)


def layers_with(config: Step35Config, mtp_layers: int | None) -> tuple[LayerPlan, ...]:
    """The decoder's layers and the first MTP layers of a config; all if `mtp_layers` is None."""
    if mtp_layers is None:
        return config.layers
    return config.layers[: config.num_hidden_layers + mtp_layers]


def layer_rows(config: Step35Config, plan: LayerPlan, gate_layout: str) -> Iterator[Row]:
    """The rows of one layer; see `tensor_table`."""
    return _Layer(config, plan, gate_layout if config.use_head_wise_attn_gate else None).rows()


def layer_prefix(config: Step35Config, plan: LayerPlan) -> str:
    """The prefix of a decoder layer's keys, or of the decoder layer's inside an MTP module."""
    if plan.is_mtp:
        return f"{mtp_prefix(config, plan)}transformer_layer."
    return f"decoder.layers.{plan.index}."


def mtp_prefix(config: Step35Config, plan: LayerPlan) -> str:
    """The prefix of the keys of the MTP module around a layer."""
    return f"mtp.layers.{plan.index - config.num_hidden_layers}."


def live_names(row: Row) -> Iterator[tuple[str, int | None]]:
    """What the parameters of a live model may be called that a row stands for.

    Layers and experts are counted over the whole model.

    Yields:
        A name, and the number of the routed expert whose parameter it is, or None.
    """
    # An MTP module's decoder layer has another name there than in a checkpoint.
    prefix = row.prefix.replace(".transformer_layer.", ".mtp_model_layer.")
    if not row.is_expert:
        yield from ((prefix + path, None) for path in (row.path, row.local_path) if path)
        return
    experts, linear, weight = row.path.rsplit(".", 2)
    experts = experts.removesuffix(".experts")
    for expert in range(row.shape[0]):
        # A module of its own, or grouped with the others.
        yield f"{prefix}{experts}.local_experts.{expert}.{linear}.{weight}", expert
        yield f"{prefix}{experts}.{linear}.{weight}{expert}", expert


def mtp_head(plan: LayerPlan) -> str:
    """The published name of an MTP layer's output matrix."""
    return f"model.layers.{plan.index}.{_MTP_HEAD}.weight"


def _vocabulary(
    path: str,
    published: Published,
    layer: LayerPlan | None = None,
    local_path: str | None = None,
) -> Row:
    return Row(
        prefix="",
        path=path,
        published=(published,),
        cut=Cut.ROWS,
        layer=layer,
        local_path=local_path,
        is_vocabulary=True,
        # The MTP layers' output matrices are modules of this package's, which have one.
        has_extra_state=layer is not None,
    )


# The published tensors of a layer, without "model.layers.N." and ".weight", in their order.
_PLACES = {
    name: place
    for place, name in enumerate(
        """
        input_layernorm self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj
        self_attn.g_proj self_attn.q_norm self_attn.k_norm post_attention_layernorm
        mlp.gate_proj mlp.up_proj mlp.down_proj
        moe.gate moe.router_bias moe.gate_proj moe.up_proj moe.down_proj
        share_expert.gate_proj share_expert.up_proj share_expert.down_proj
        enorm hnorm eh_proj transformer.shared_head.norm transformer.shared_head.output
        """.split()
    )
}


class _Layer:
    """The rows of one layer; those of an MTP layer include the module around it.

    Args:
        config: The model.
        plan: The layer.
        gate_layout: As for `QkvLayout.of`.
    """

    def __init__(self, config: Step35Config, plan: LayerPlan, gate_layout: str | None):
        self.config, self.plan, self.gate_layout = config, plan, gate_layout
        self.hidden = config.hidden_size
        self.prefix = layer_prefix(config, plan)

    def rows(self) -> Iterator[Row]:
        """All of them, in Megatron-Core's order."""
        if not self.plan.is_mtp:
            yield from self._inner()
            return
        hidden = self.hidden
        yield self._mtp("enorm.weight", "enorm", (hidden,))
        yield self._mtp("hnorm.weight", "hnorm", (hidden,))
        yield self._mtp("eh_proj.weight", "eh_proj", (hidden, 2 * hidden), Cut.ROWS)
        yield from self._inner()
        norm = "transformer.shared_head.norm"
        yield self._mtp("final_layernorm.weight", norm, (hidden,))
        output = self._published(_MTP_HEAD, self.config.vocab_size, hidden)
        depth = self.plan.index - self.config.num_hidden_layers
        path, live = (f"mtp_output_{word}.{depth}.weight" for word in ("layers", "heads"))
        yield _vocabulary(path, output, self.plan, local_path=live)

    def _published(self, name: str, *shape: int, is_fp32: bool = False) -> Published:
        suffix = "" if is_fp32 else ".weight"  # a router's bias is no weight
        whole = f"model.layers.{self.plan.index}.{name}{suffix}"
        return Published(whole, shape, _PLACES[name], is_fp32)

    def _mtp(self, path: str, name: str, shape: tuple[int, ...], cut: Cut = Cut.WHOLE) -> Row:
        prefix = mtp_prefix(self.config, self.plan)
        return Row(prefix, path, (self._published(name, *shape),), cut=cut, layer=self.plan)

    def _norm(self, path: str, name: str, size: int, local_path: str | None = None) -> Row:
        published = (self._published(name, size),)
        return Row(self.prefix, path, published, layer=self.plan, local_path=local_path)

    def _inner(self) -> Iterator[Row]:
        """The decoder layer."""
        hidden, plan = self.hidden, self.plan
        queries = plan.num_attention_heads * plan.kv_channels
        yield self._norm(
            "self_attention.linear_qkv.layer_norm_weight",
            "input_layernorm",
            hidden,
            local_path="input_layernorm.weight",
        )
        yield self._qkv()
        for letter in "qk":
            path = f"self_attention.{letter}_layernorm.weight"
            yield self._norm(path, f"self_attn.{letter}_norm", plan.kv_channels)
        yield Row(
            self.prefix,
            "self_attention.linear_proj.weight",
            (self._published("self_attn.o_proj", hidden, queries),),
            cut=Cut.COLUMNS,
            layer=plan,
        )
        norm, local = "post_attention_layernorm", "pre_mlp_layernorm.weight"
        if not plan.is_moe:
            path = "mlp.linear_fc1.layer_norm_weight"
            yield self._norm(path, norm, hidden, local_path=local)
            yield from self._mlp("mlp.", "mlp", self.config.intermediate_size)
            return
        yield self._norm(local, norm, hidden)
        yield from self._router()
        yield from self._experts()
        yield from self._mlp("mlp.shared_experts.", "share_expert", self.config.share_expert_dim)

    def _qkv(self) -> Row:
        plan, hidden = self.plan, self.hidden
        queries = plan.num_attention_heads * plan.kv_channels
        keys = plan.num_query_groups * plan.kv_channels
        rows = {"q": queries, "g": plan.num_attention_heads, "k": keys, "v": keys}
        if self.gate_layout is None:
            del rows["g"]
        return Row(
            self.prefix,
            "self_attention.linear_qkv.weight",
            tuple(self._published(f"self_attn.{x}_proj", n, hidden) for x, n in rows.items()),
            made_of=MadeOf.QKV,
            cut=Cut.ROWS,
            layer=plan,
            qkv=QkvLayout.of(plan, self.gate_layout),
        )

    def _mlp(self, path: str, name: str, inner: int | None) -> Iterator[Row]:
        """A dense MLP or the shared expert."""
        yield from self._gate_up_down(path, name, (), _known(inner), is_expert=False)

    def _experts(self) -> Iterator[Row]:
        stack = (_known(self.config.moe_num_experts),)
        inner = _known(self.config.moe_intermediate_size)
        yield from self._gate_up_down("mlp.experts.experts.", "moe", stack, inner, is_expert=True)

    def _gate_up_down(
        self, path: str, name: str, stack: tuple[int, ...], inner: int, *, is_expert: bool
    ) -> Iterator[Row]:
        gate_up = tuple(
            self._published(f"{name}.{part}_proj", *stack, inner, self.hidden)
            for part in ("gate", "up")
        )
        yield Row(
            self.prefix,
            f"{path}linear_fc1.weight",
            gate_up,
            made_of=MadeOf.STACKED,
            cut=Cut.ROWS,
            layer=self.plan,
            is_expert=is_expert,
        )
        yield Row(
            self.prefix,
            f"{path}linear_fc2.weight",
            (self._published(f"{name}.down_proj", *stack, self.hidden, inner),),
            cut=Cut.COLUMNS,
            layer=self.plan,
            is_expert=is_expert,
        )

    def _router(self) -> Iterator[Row]:
        experts = _known(self.config.moe_num_experts)
        weight = self._published("moe.gate", experts, self.hidden)
        bias = self._published("moe.router_bias", experts, is_fp32=True)
        for path, published in (("weight", weight), ("expert_bias", bias)):
            yield Row(
                self.prefix,
                f"mlp.router.{path}",
                (published,),
                layer=self.plan,
                has_extra_state=False,
            )


def _known(size: int | None) -> int:
    """A size that only models with MoE layers have; their configs are refused without it."""
    if size is None:
        raise ValueError("a config with MoE layers has their sizes; this one was not validated")
    return size
