"""What the MTP losses of Step-3.5 need: an output matrix for each layer, and means over all tokens.

The published checkpoint has one output matrix for each MTP layer
(`transformer.shared_head.output.weight`); Megatron-Core computes the MTP logits with the model's
one `output_layer`. The matrices live on the GPTModel, on the pipeline stage that has the output
layer, and `process_mtp_loss` is handed a callable that takes the right one in turn.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any, Protocol

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.multi_token_prediction import (
    MTPLossLoggingHelper,
    MultiTokenPredictionLayer,
    get_mtp_ranks,
    roll_tensor,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup

from step35_patch.model.adapters import base_of

# The attribute of GPTModel that the matrices are. Not "layers": Megatron-Bridge takes what stands
# behind "layers." in a parameter's name for the number of a decoder layer.
OUTPUT_HEADS = "mtp_output_heads"
# What a Megatron checkpoint has them under, which is older.
_CHECKPOINT_PREFIX = "mtp_output_layers."
# Layers with which a model chunk has the embedding or a copy of it.
_WITH_EMBEDDING = {LayerType.embedding, LayerType.mtp}
# Where process_mtp_loss, which sees only the model's output layer, finds them.
_LINK = "step35_mtp_output_heads"
# Whether full recomputation of an MTP layer takes what 0.18 and later hand it.
_RECOMPUTES_WITH_PADDING_MASK = any(
    parameter.name == "padding_mask" or parameter.kind == parameter.VAR_KEYWORD
    for parameter in inspect.signature(
        MultiTokenPredictionLayer._checkpointed_forward
    ).parameters.values()
)


class ModelWithOutputLayer(Protocol):
    """What is used here of a GPTModel on the last pipeline stage."""

    config: TransformerConfig
    vocab_size: int
    pg_collection: ProcessGroupCollection
    output_layer: torch.nn.Module
    register_load_state_dict_pre_hook: Callable[[Callable[..., None]], Any]


class MtpOutputHeads(MegatronModule):
    """One vocabulary-parallel output matrix for each MTP layer, children "0", "1", ...

    Args:
        model: the GPTModel whose output layer's shape and precision they share.
    """

    def __init__(self, model: ModelWithOutputLayer):
        config = model.config
        super().__init__(config)
        for depth in range(config.mtp_num_layers):
            layer = tensor_parallel.ColumnParallelLinear(
                config.hidden_size,
                model.vocab_size,
                config=config,
                init_method=config.init_method,
                bias=False,
                skip_bias_add=False,
                gather_output=False,  # only losses are computed of them
                tp_group=model.pg_collection.tp,
            )
            # As setup_embeddings_and_output_layer marks the model's own; optimizers read it.
            layer.weight.is_embedding_or_output_parameter = True
            self.add_module(str(depth), layer)

    def sharded_state_dict(
        self,
        prefix: str = "",
        sharded_offsets: tuple[tuple[int, int, int], ...] = (),
        metadata: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """The matrices sharded by vocabulary rows, whose padding may differ between layouts."""
        sharded: dict[str, Any] = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        for key, tensor in sharded.items():
            if key.endswith(".weight"):
                tensor.allow_shape_mismatch = True
        older = prefix.removesuffix(f"{OUTPUT_HEADS}.") + _CHECKPOINT_PREFIX
        replace_prefix_for_sharding(sharded, prefix, older)
        return sharded


def _by_older_names(model: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Let a model's state dict have the matrices by a checkpoint's names (--ckpt-format torch)."""
    older = prefix + _CHECKPOINT_PREFIX
    for name in [name for name in state_dict if name.startswith(older)]:
        newer = f"{prefix}{OUTPUT_HEADS}.{name.removeprefix(older)}"
        state_dict[newer] = state_dict.pop(name)


class OutputLayerByDepth:
    """Stands for the output layer in one call of process_mtp_loss: call k uses matrix k.

    Everything else that is asked of it is answered by the model's output layer.
    """

    def __init__(self, output_layer: torch.nn.Module, layers: tuple[torch.nn.Module, ...]):
        self._output_layer = output_layer
        self._layers = iter(layers)

    def __call__(self, hidden_states: Tensor, weight: Tensor | None = None, **kwargs: Any) -> Any:
        """hidden_states: [s, b, h]; returns what ColumnParallelLinear does: (logits, None).

        Raises:
            ValueError: a weight is given, as for an output layer that shares the embedding's.
        """
        if weight is not None:
            raise ValueError("Step-3.5's output matrices are untied: expected no shared weight")
        return next(self._layers)(hidden_states, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._output_layer, name)


class ShareOfTheTokens:
    """Stands for compute_language_model_loss in a process_mtp_loss call with context parallelism.

    Megatron-Core divides each rank's summed loss by the rank's own number of tokens and averages
    over the ranks. MTP layer k predicts nothing for a sequence's last k tokens, all of them on
    one rank, so that its other tokens would count more. Each rank's loss of depth k is weighted
    by its share of the tokens here, which makes it the mean over all of them.

    With calculate_per_token_loss the gradients of all ranks are summed instead, and divided by the
    number of all tokens that the main loss counts, N. What is summed must then be N times that
    mean: the gradients are weighted so, the losses, which are logged, as before.

    Args:
        loss: Megatron-Core's function: (labels [b, s], logits) -> losses [b, s].
        loss_mask: [b, s], this rank's part of the sequences, before any token is left out.
        packed_seq_params: as the model got them.
        group: the context-parallel group.
        per_token: whether gradients are summed, as above.
    """

    def __init__(
        self,
        loss: Callable[[Tensor, Tensor], Tensor],
        loss_mask: Tensor,
        packed_seq_params: PackedSeqParams | None,
        group: ProcessGroup,
        *,
        per_token: bool,
    ):
        self._loss, self._mask = loss, loss_mask
        self._packed_seq_params, self._group = packed_seq_params, group
        self._main_tokens = self._over_all(loss_mask.sum()) if per_token else None

    def _over_all(self, own: Tensor) -> Tensor:
        """The sum over the group's ranks, fp32."""
        total = own.float().clone()
        torch.distributed.all_reduce(total, group=self._group)
        return total

    def __call__(self, labels: Tensor, logits: Tensor) -> Tensor:
        """labels: [b, s]; logits: as Megatron-Core's loss takes them; returns losses [b, s]."""
        self._mask, own = roll_tensor(
            self._mask,
            shifts=-1,
            dims=-1,
            cp_group=self._group,
            packed_seq_params=self._packed_seq_params,
        )
        share = own.float() / self._over_all(own).clamp(min=1)
        losses = self._loss(labels, logits)
        logged: Tensor = losses * (share * self._group.size())
        if self._main_tokens is None:
            return logged
        # The values of one, the gradients of the other.
        summed = losses * (share * self._main_tokens)
        return torch.add(logged.detach(), summed - summed.detach())


def make_room_in_the_log(config: TransformerConfig) -> None:
    """Give Megatron-Core's log of MTP losses, one of a process, an entry for each MTP layer.

    It is made by the first model of a process, and too short for a later one with more of them.

    Args:
        config: of the model whose losses are next.
    """
    tracker = MTPLossLoggingHelper.tracker
    for name, values in tracker.items():
        if isinstance(values, Tensor) and len(values) < (config.mtp_num_layers or 0):
            longer = values.new_zeros(config.mtp_num_layers)
            longer[: len(values)] = values
            tracker[name] = longer


def share_of_the_tokens(call: dict[str, Any]) -> None:
    """Weight the losses of a process_mtp_loss call, given by its arguments, as above."""
    group, labels, mask = call.get("cp_group"), call["labels"], call.get("loss_mask")
    if group is None or group.size() == 1:
        return
    tokens = call.get("input_ids") if labels is None else labels
    if tokens is None:
        return  # no losses are computed
    mask = torch.ones_like(tokens) if mask is None else mask
    packed_seq_params = call.get("packed_seq_params")
    if labels is None:  # made from the tokens: of one token fewer
        mask, _ = roll_tensor(
            mask, shifts=-1, dims=-1, cp_group=group, packed_seq_params=packed_seq_params
        )
    per_token = call["config"].calculate_per_token_loss
    call["compute_language_model_loss"] = ShareOfTheTokens(
        call["compute_language_model_loss"], mask, packed_seq_params, group, per_token=per_token
    )
    if per_token:
        # Megatron-Core would weight by what each rank has of both numbers of tokens, and could not
        # where a rank has none that the main loss counts.
        call["config"] = copy.copy(call["config"])
        call["config"].calculate_per_token_loss = False


def by_slots(packed_seq_params: PackedSeqParams | None) -> PackedSeqParams | None:
    """What tokens are rolled by: documents with the padding behind them, as they lie.

    Megatron-Core rolls at `cu_seqlens_q`, which of documents in padded slots are no places in the
    batch. The tokens behind a document are padding, which a loss mask leaves out.
    """
    if packed_seq_params is None or packed_seq_params.cu_seqlens_q_padded is None:
        return packed_seq_params
    slots = copy.copy(packed_seq_params)
    slots.cu_seqlens_q = packed_seq_params.cu_seqlens_q_padded
    return slots


class Step35MultiTokenPredictionLayer(MultiTokenPredictionLayer):
    """Megatron-Core's MTP layer, whose tokens are rolled within their padded slots.

    And which full recomputation can call: 0.18.2 hands a padding mask to a function without one.
    """

    def _checkpointed_forward(self, *args: Any, **kwargs: Any) -> Any:
        if not _RECOMPUTES_WITH_PADDING_MASK and kwargs.pop("padding_mask", None) is not None:
            raise ValueError(
                "padding_mask: expected None, found a mask, which this Megatron-Core cannot hand "
                "to MTP layers that are recomputed; leave it out, set recompute_granularity to "
                "selective, or install megatron-core 0.19"
            )
        return super()._checkpointed_forward(*args, **kwargs)

    def _get_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        roll = super()._get_embeddings
        call = inspect.signature(roll).bind(*args, **kwargs).arguments
        call["packed_seq_params"] = by_slots(call.get("packed_seq_params"))
        return roll(**call)


def embedding_ranks(pp_ranks: list[int], config: TransformerConfig) -> list[int]:
    """The ranks with a copy of the embedding: the first stage's, and those with MTP layers.

    Their copies' gradients are summed, over the group that `initialize_model_parallel` makes of
    what its `get_embedding_ranks` returns. Megatron-Core's default for it is the first and the
    last stage, wherever the MTP layers are.

    Args:
        pp_ranks: a pipeline's ranks, by stage.
        config: of the model.
    """
    return sorted({pp_ranks[0], *get_mtp_ranks(pp_ranks, config)})


def embedding_chunk_problems(config: TransformerConfig) -> list[str]:
    """A line for each pipeline rank on which Megatron-Core would not find the embedding's copy.

    It sums the gradients of one copy a rank: in the first model chunk of the first rank, and in
    the last one of the others. A further copy on the same rank would be trained apart.

    Args:
        config: of a model.
    """
    if config.pipeline_model_parallel_layout is None or not config.mtp_num_layers:
        return []
    problems = []
    for rank, chunks in enumerate(config.pipeline_model_parallel_layout.layout):
        found = [n for n, held in enumerate(chunks) if {*held} & _WITH_EMBEDDING]
        summed = 0 if rank == 0 else len(chunks) - 1
        if found not in ([], [summed]):
            problems.append(
                "pipeline_model_parallel_layout: expected the embedding and MTP layers of pipeline "
                f"rank {rank} in its virtual stage {summed} alone, where Megatron-Core sums the "
                f"gradients of the embedding's copies, found them in {found}; move the MTP layers "
                "to the last stage, or to another rank's last virtual stage"
            )
    return problems


def check_embedding_group(model: ModelWithOutputLayer) -> None:
    """Raise RuntimeError if this rank's gradients of the embedding would be summed with others.

    A last stage without MTP layers would add its output matrix's gradient, of the same shape; a
    stage between with MTP layers would train a copy of its own.

    Args:
        model: a GPTModel on any pipeline stage.
    """
    config = model.config
    pp_ranks = torch.distributed.get_process_group_ranks(model.pg_collection.pp)
    if len(pp_ranks) == 1 or not config.mtp_num_layers:
        return
    rank, expected = torch.distributed.get_rank(), embedding_ranks(pp_ranks, config)
    group = parallel_state.get_embedding_group(check_initialized=False)
    is_member = isinstance(group, ProcessGroup)
    found = torch.distributed.get_process_group_ranks(group) if is_member else []
    wanted = expected if rank in expected else []
    # Alone, a rank needs no group.
    if sorted(found) != wanted and max(len(found), len(wanted)) > 1:
        raise RuntimeError(
            f"rank {rank}: the embedding's gradients are summed over rank(s) {found or 'none'}, "
            f"and its copies are on {expected}: MTP layers are not on the last stage alone. Call "
            "parallel_state.initialize_model_parallel(..., get_embedding_ranks="
            "provider.embedding_ranks), or hand pretrain() a get_embedding_ranks as "
            "pretrain_gpt.py does"
        )


def mark_embedding(model: Any) -> None:
    """Mark a stage's copy of the embedding as one, for optimizers: 0.17 marks the first stage's.

    Else the copies drift apart under a learning rate or an optimizer of the embedding's own.

    Args:
        model: a GPTModel on any pipeline stage.
    """
    if hasattr(model, "embedding"):
        model.embedding.word_embeddings.weight.is_embedding_or_output_parameter = True


def add_output_heads(model: ModelWithOutputLayer) -> None:
    """Give a GPTModel with an output layer and MTP layers its `mtp_output_heads`."""
    heads = MtpOutputHeads(model)
    setattr(model, OUTPUT_HEADS, heads)
    model.register_load_state_dict_pre_hook(_by_older_names)
    # In a tuple, so that torch does not register the matrices a second time.
    setattr(model.output_layer, _LINK, (heads,))


def has_output_heads(output_layer: torch.nn.Module) -> bool:
    """Whether a model's output layer is a Step-3.5 model's with MTP layers."""
    return hasattr(base_of(output_layer), _LINK)


def by_depth(output_layer: torch.nn.Module) -> OutputLayerByDepth:
    """The output layer that process_mtp_loss is given for a Step-3.5 model."""
    own = base_of(output_layer)
    heads = getattr(own, _LINK, None)
    if heads is None and not isinstance(own, tensor_parallel.ColumnParallelLinear):
        raise RuntimeError(
            f"output_layer: expected the model's own, found a {type(own).__name__} in its place: "
            "with a value head MTP layers have nothing to predict with. Build the model without "
            "them: mtp_num_layers=0, or --mtp-num-layers 0"
        )
    if heads is None:
        raise RuntimeError(
            "this Step-3.5 model has no output matrices for its MTP layers: it was built before "
            "step35_patch was active, or its output layer was exchanged. Import step35_patch "
            "before building the model."
        )
    # As they are now: adapters may have been put around them.
    return OutputLayerByDepth(own, tuple(heads[0].children()))
