"""The core attention of Step-3.5 layers behind Megatron-Core's interface, on torch.

Two things differ from Megatron-Core's local `DotProductAttention` on purpose:

- A given attention mask is combined with causality and the window. There, a window replaces the
  mask, and a mask replaces causality.
- A query to which every key is masked gets zeros, and passes no gradient. There, masked scores are
  -10000 rather than -inf, so that such a query gets the mean of all values, future ones included.

Shapes are named as in `step35_patch.model.windowed_attention`; np and ng count the heads of this
tensor-parallel rank.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup

from step35_patch.model.context_parallel import Document, documents_of, fetch, plan
from step35_patch.model.refused_options import Place, refused
from step35_patch.model.windowed_attention import (
    attend_to_prefix,
    packed_windowed_attention,
    sequence_bounds,
    windowed_attention,
)

_NO_CONTEXT_PARALLELISM = (
    "Under context parallelism, attention on torch knows causality, windows and packed documents: "
    "set context_parallel_size to 1 (--context-parallel-size 1), or leave this out."
)


class Step35DotProductAttention(MegatronModule):
    """Core attention of a Step-3.5 layer on torch, replacing Megatron-Core's `DotProductAttention`.

    It has no parameters and no buffers. Selective recomputation may run it twice: torch's
    generators are its only state.

    Args:
        config: of this layer alone. Read are `window_size` (None, or (left, 0), see
            `windowed_attention`), `kv_channels`, `attention_dropout`, `sequence_parallel`. The
            numbers of heads are taken from the tensors.
        layer_number: 1-based number of the layer, for messages.
        attn_mask_type: `AttnMaskType.causal` or `AttnMaskType.padding_causal`. Here they mean the
            same, but padding_causal asks for something that tells where the padding is: a mask or
            packed sequences.
        attention_type: "self".
        attention_dropout: share of probabilities dropped in training; None: the config's.
        softmax_scale: factor on the scores; None: kv_channels ** -0.5.
        cp_comm_type: how context parallelism is to communicate. Whatever it says, each rank fetches
            the keys and values that its queries see (`step35_patch.model.context_parallel`), which
            gives the same numbers.
        pg_collection: process groups, of which `cp` and `tp` are used; None means the global ones.

    Raises:
        ValueError: if the arguments or the config ask for what this attention doesn't do.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        if attention_type != "self":
            raise ValueError(
                f"Layer {layer_number}: attention_type: expected 'self', found {attention_type!r}. "
                "Step-3.5 has no cross attention."
            )
        _check_config(config, layer_number)
        self._check_mask_type(attn_mask_type)
        self.attn_mask_type = attn_mask_type
        self.window_left = _window_left(config, layer_number)
        self.softmax_scale = config.kv_channels**-0.5 if softmax_scale is None else softmax_scale
        self.attention_dropout = (
            config.attention_dropout if attention_dropout is None else attention_dropout
        )
        self.cp_group: ProcessGroup | None = getattr(pg_collection, "cp", None)
        if self.cp_group is None and config.context_parallel_size > 1:
            self.cp_group = parallel_state.get_context_parallel_group()
        # MegatronModule.sharded_state_dict looks for it, and else for the global groups.
        if pg_collection is not None and hasattr(pg_collection, "tp"):
            self.tp_group = pg_collection.tp

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attention of one layer, on the heads of this tensor-parallel rank.

        Under context parallelism s is this rank's share of the sequence: its early and its late
        chunk, as Megatron-Core deals them out (rank r of n has chunks r and 2n - 1 - r of 2n). Of
        packed sequences, t are these two of each document, with its padding; the sums of lengths
        are those of the whole batch.

        Args:
            query: [s, b, np, hn]; [t, np, hn] if the sequences are packed.
            key: [s, b, ng, hn]; [t, ng, hn] if packed. With `AttnMaskType.causal_bottom_right`, as
                while a sequence is generated, [keys, b, ng, hn] of the keys >= s tokens of which
                the queries are the last.
            value: as key.
            attention_mask: bool [1 or b, 1, s, s] ([1, 1, t, t] if packed), True where masked, on
                top of causality and window; or None. With causal_bottom_right its columns may be
                more than the keys, which are then the last of them.
            attn_mask_type: None means the module's.
            attention_bias: must be None.
            packed_seq_params: None, or with qkv_format "thd" for packed sequences (see
                `packed_windowed_attention`), or with "sbhd", which changes nothing.

        Returns:
            [s, b, np * hn]; [t, np * hn] if packed, which Megatron-Core's attention reshapes to
            [t, 1, np * hn].

        Raises:
            ValueError: if an argument asks for what this attention doesn't do, or shapes don't fit.
        """
        if attention_bias is not None:
            raise ValueError(
                f"Layer {self.layer_number}: attention_bias: expected None, found a tensor "
                f"{list(attention_bias.shape)}. Step-3.5 has no bias on attention scores."
            )
        packed = self._is_packed(packed_seq_params)
        mask_type = self.attn_mask_type if attn_mask_type is None else attn_mask_type
        if mask_type == AttnMaskType.causal_bottom_right:
            if packed or (self.cp_group is not None and self.cp_group.size() > 1):
                raise ValueError(
                    f"Layer {self.layer_number}: attn_mask_type: expected AttnMaskType.causal for "
                    "packed sequences and under context parallelism, found causal_bottom_right. "
                    "The last tokens of a sequence go alone with whole sequences on one rank."
                )
            return self._of_the_last_tokens(query, key, value, attention_mask)
        self._check_mask_type(mask_type)
        if mask_type == AttnMaskType.padding_causal and attention_mask is None and not packed:
            raise ValueError(
                f"Layer {self.layer_number}: attention_mask: expected a mask, because "
                "attn_mask_type is padding_causal and the sequences are not packed; found None. "
                "Pass the mask, or use AttnMaskType.causal if there is no padding to hide."
            )
        dropout_p = self.attention_dropout if self.training else 0.0
        # As in Megatron-Core, each tensor-parallel rank draws its own numbers for its own heads.
        # With sequence parallelism the whole block runs in that generator's state already.
        draws_apart = dropout_p > 0.0 and not self.config.sequence_parallel
        with tensor_parallel.get_cuda_rng_tracker().fork() if draws_apart else nullcontext():
            if self.cp_group is not None and self.cp_group.size() > 1:
                self._check_no_mask(attention_mask)
                documents = self._documents(query.size(0), packed_seq_params, self.cp_group)
                if not packed:
                    return self._context_parallel(
                        query, key, value, documents, dropout_p, self.cp_group
                    )
                q, k, v = (x.unsqueeze(1) for x in (query, key, value))
                out = self._context_parallel(q, k, v, documents, dropout_p, self.cp_group)
                return out.squeeze(1)
            if packed:
                cu_seqlens, cu_seqlens_padded = self._cu_seqlens(packed_seq_params)
                return packed_windowed_attention(
                    query,
                    key,
                    value,
                    cu_seqlens=cu_seqlens,
                    cu_seqlens_padded=cu_seqlens_padded,
                    window_left=self.window_left,
                    softmax_scale=self.softmax_scale,
                    attention_mask=attention_mask,
                    dropout_p=dropout_p,
                )
            return windowed_attention(
                query,
                key,
                value,
                window_left=self.window_left,
                softmax_scale=self.softmax_scale,
                attention_mask=attention_mask,
                dropout_p=dropout_p,
            )

    def _of_the_last_tokens(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> Tensor:
        return attend_to_prefix(
            query,
            key,
            value,
            window_left=self.window_left,
            softmax_scale=self.softmax_scale,
            attention_mask=None if mask is None else mask[..., -key.size(0) :],
            dropout_p=self.attention_dropout if self.training else 0.0,
        )

    def _documents(
        self, tokens: int, params: PackedSeqParams | None, group: ProcessGroup
    ) -> tuple[Document, ...]:
        """Those of all ranks; a whole sequence is one. tokens: of this rank."""
        size = group.size()
        if params is None or params.qkv_format != "thd":
            return ((tokens * size, tokens * size),)
        return documents_of(sequence_bounds(*self._cu_seqlens(params), tokens * size), size)

    def _context_parallel(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        documents: tuple[Document, ...],
        dropout_p: float,
        group: ProcessGroup,
    ) -> Tensor:
        """query, key and value [s, b, heads, hn], s being this rank's tokens of the documents."""
        own = plan(documents, group.rank(), group.size(), self.window_left, str(query.device))
        parts = query.split([n for chunk in own.chunks for n in (chunk.queries, chunk.padding)])
        outputs = []
        for number, (k, v) in enumerate(fetch(key, value, own, group)):
            queries, padding = parts[2 * number : 2 * number + 2]
            if queries.size(0):
                outputs.append(
                    attend_to_prefix(
                        queries,
                        k,
                        v,
                        window_left=self.window_left,
                        softmax_scale=self.softmax_scale,
                        dropout_p=dropout_p,
                    )
                )
            if padding.size(0):
                # A rank with nothing but padding takes part in the backward pass all the same: the
                # others' gradients of its keys come with the same collective.
                nothing = k[:0].sum() + v[:0].sum()
                outputs.append(torch.zeros_like(padding).flatten(2) + nothing)
        return torch.cat(outputs)

    def _check_no_mask(self, mask: Tensor | None) -> None:
        if mask is not None:
            raise ValueError(
                f"Layer {self.layer_number}: attention_mask: expected None under context "
                f"parallelism, found a tensor {list(mask.shape)}. "
                f"{_NO_CONTEXT_PARALLELISM} (--no-create-attention-mask-in-dataloader)"
            )

    def _check_mask_type(self, mask_type: AttnMaskType) -> None:
        if mask_type not in (AttnMaskType.causal, AttnMaskType.padding_causal):
            raise ValueError(
                f"Layer {self.layer_number}: attn_mask_type: expected AttnMaskType.causal or "
                f"padding_causal, found {mask_type}. Step-3.5 is causal; hide further keys with "
                "attention_mask. For the last tokens of a sequence alone, as with a KV cache, "
                "forward takes causal_bottom_right."
            )

    def _is_packed(self, params: PackedSeqParams | None) -> bool:
        if params is None:
            return False
        if params.qkv_format not in ("thd", "sbhd"):
            raise ValueError(
                f"Layer {self.layer_number}: packed_seq_params.qkv_format: expected 'thd' or "
                f"'sbhd', found {params.qkv_format!r}."
            )
        size = 1 if self.cp_group is None else self.cp_group.size()
        if params.local_cp_size not in (None, size) or params.cp_group not in (None, self.cp_group):
            group = params.cp_group
            raise ValueError(
                f"Layer {self.layer_number}: packed_seq_params.local_cp_size and cp_group: "
                f"expected None, or the model's own context parallelism of {size}, found "
                f"{params.local_cp_size} and a group of {group if group is None else group.size()}."
                " On torch it can't differ by batch: leave out --hybrid-context-parallel."
            )
        return bool(params.qkv_format == "thd")

    def _cu_seqlens(self, params: PackedSeqParams) -> tuple[Tensor, Tensor | None]:
        for suffix in ("", "_padded"):
            q = getattr(params, f"cu_seqlens_q{suffix}")
            kv = getattr(params, f"cu_seqlens_kv{suffix}")
            if q is not kv and (q is None or kv is None or not torch.equal(q, kv)):
                raise ValueError(
                    f"Layer {self.layer_number}: packed_seq_params.cu_seqlens_kv{suffix}: expected "
                    f"cu_seqlens_q{suffix}, {_listed(q)}, found {_listed(kv)}. Queries and keys of "
                    "self attention are the same tokens: pass the same tensor for both."
                )
        if params.cu_seqlens_q is None:
            raise ValueError(
                f"Layer {self.layer_number}: packed_seq_params.cu_seqlens_q: expected sums of the "
                "sequence lengths, int32 [n + 1], because qkv_format is 'thd'; found None."
            )
        return params.cu_seqlens_q, params.cu_seqlens_q_padded


def _listed(tensor: Tensor | None) -> list[int] | None:
    return None if tensor is None else tensor.tolist()


def _check_config(config: TransformerConfig, layer_number: int) -> None:
    for row, found in refused(config, Place.TORCH_ATTENTION):
        expected = row.legal[0]
        raise ValueError(
            f"Layer {layer_number}: {row.name}: expected {expected!r}, found {found!r}. It would "
            f"have no effect in attention on torch: {row.reason}. Leave it at {expected!r}."
        )


def _window_left(config: TransformerConfig, layer_number: int) -> int | None:
    if config.window_size is None:
        return None
    left: int
    left, right = config.window_size
    if right != 0 or left < 0:
        raise ValueError(
            f"Layer {layer_number}: window_size: expected None or (left, 0) with left at least 0, "
            f"found {config.window_size}. A causal query has no keys to its right; for a layer "
            "without a window use None."
        )
    if config.window_attn_skip_freq is not None:
        raise ValueError(
            f"Layer {layer_number}: window_attn_skip_freq: expected None next to this layer's own "
            f"window_size {config.window_size}, found {config.window_attn_skip_freq}. Which layers "
            "have a window is decided by the config that each layer gets."
        )
    return left
