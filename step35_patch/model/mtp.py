"""What the MTP losses of Step-3.5 need: an output matrix for each layer, and means over all tokens.

The published checkpoint has one output matrix for each MTP layer
(`transformer.shared_head.output.weight`); Megatron-Core computes the MTP logits with the model's
one `output_layer`. The matrices live on the GPTModel, on the pipeline stage that has the output
layer, and `process_mtp_loss` is handed a callable that takes the right one in turn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.multi_token_prediction import roll_tensor
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor
from torch.distributed import ProcessGroup

# The attribute of GPTModel, and so the prefix of the matrices in Megatron checkpoints.
OUTPUT_LAYERS = "mtp_output_layers"
# Where process_mtp_loss, which sees only the model's output layer, finds them.
_LINK = "step35_mtp_output_layers"


class ModelWithOutputLayer(Protocol):
    """What is used here of a GPTModel on the last pipeline stage."""

    config: TransformerConfig
    vocab_size: int
    parallel_output: bool
    pg_collection: ProcessGroupCollection
    output_layer: torch.nn.Module


class MtpOutputLayers(MegatronModule):
    """One vocabulary-parallel output matrix for each MTP layer, children "0", "1", ...

    Args:
        model: the GPTModel whose output layer's shape, precision and gathering they share.
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
                gather_output=not model.parallel_output,
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
        return sharded


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

    Args:
        loss: Megatron-Core's function: (labels [b, s], logits) -> losses [b, s].
        loss_mask: [b, s], this rank's part of the sequences, before any token is left out.
        packed_seq_params: as the model got them.
        group: the context-parallel group.
    """

    def __init__(
        self,
        loss: Callable[[Tensor, Tensor], Tensor],
        loss_mask: Tensor,
        packed_seq_params: PackedSeqParams | None,
        group: ProcessGroup,
    ):
        self._loss, self._mask = loss, loss_mask
        self._packed_seq_params, self._group = packed_seq_params, group

    def __call__(self, labels: Tensor, logits: Tensor) -> Tensor:
        """labels: [b, s]; logits: as Megatron-Core's loss takes them; returns losses [b, s]."""
        self._mask, own = roll_tensor(
            self._mask,
            shifts=-1,
            dims=-1,
            cp_group=self._group,
            packed_seq_params=self._packed_seq_params,
        )
        own_tokens: Tensor = own.float()
        total = own_tokens.clone()
        torch.distributed.all_reduce(total, group=self._group)
        return self._loss(labels, logits) * (own_tokens * self._group.size() / total.clamp(min=1))


def share_of_the_tokens(call: dict[str, Any]) -> None:
    """Weight the losses of a process_mtp_loss call, given by its arguments, as above."""
    group, labels = call.get("cp_group"), call["labels"]
    if group is None or group.size() == 1 or labels is None:
        return
    mask = call.get("loss_mask")
    call["compute_language_model_loss"] = ShareOfTheTokens(
        call["compute_language_model_loss"],
        torch.ones_like(labels) if mask is None else mask,
        call.get("packed_seq_params"),
        group,
    )


def add_output_layers(model: ModelWithOutputLayer) -> None:
    """Give a GPTModel with an output layer and MTP layers its `mtp_output_layers`."""
    layers = MtpOutputLayers(model)
    setattr(model, OUTPUT_LAYERS, layers)
    # A tuple, so that torch does not register the matrices a second time.
    setattr(model.output_layer, _LINK, tuple(layers.children()))


def has_output_layers(output_layer: torch.nn.Module) -> bool:
    """Whether a model's output layer is a Step-3.5 model's with MTP layers."""
    return hasattr(output_layer, _LINK)


def by_depth(output_layer: torch.nn.Module) -> OutputLayerByDepth:
    """The output layer that process_mtp_loss is given for a Step-3.5 model."""
    layers = getattr(output_layer, _LINK, None)
    if layers is None:
        raise RuntimeError(
            "this Step-3.5 model has no output matrices for its MTP layers: it was built before "
            "step35_patch was active, or its output layer was exchanged. Import step35_patch "
            "before building the model."
        )
    return OutputLayerByDepth(output_layer, layers)
