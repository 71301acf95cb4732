"""Columns of the logits that only pad the vocabulary, left out of every softmax.

Megatron-Core pads the vocabulary so that tensor parallelism can cut it, and lets the padded columns
take part in the softmax: the losses are then those of a larger vocabulary. Here each output matrix
of a model, the MTP layers' too, gets a forward hook that overwrites these columns. Losses, logits
and gradients become the unpadded model's, and the padded rows' gradients zero.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from step35_patch.model.description import Step35Runtime
from step35_patch.model.mtp import OUTPUT_HEADS, ModelWithOutputLayer

# What a module's forward hook returns instead of its output: (logits, bias).
type _Output = tuple[Tensor, Tensor | None]


def masked_logit(dtype: torch.dtype) -> float:
    """The value of a masked column: a quarter of the dtype's lowest finite one.

    Not -inf: it makes NaN of p log p in a KL divergence or an entropy, of a loss that a loss mask
    takes times zero, and of a softmax over the part of a rank that has no other column. A quarter,
    because what is still done to logits must not make it -inf: log-softmax takes the log-sum-exp
    away, for which fp16's lowest one has less than 16 left, and sampling divides by a temperature.
    Its exponential is zero in every dtype.
    """
    return torch.finfo(dtype).min / 4


def mask_padded_columns(model: ModelWithOutputLayer, runtime: Step35Runtime) -> None:
    """Mask the padded columns of a GPTModel's output matrices, if it has any and should.

    Args:
        model: a GPTModel of any pipeline stage, the MTP layers' output matrices included.
        runtime: the Step-3.5 model that it is.
    """
    columns, whole = runtime.config.vocab_size, model.vocab_size
    layer = getattr(model, "output_layer", None)
    if layer is None or whole == columns or runtime.padded_logits == "kept":
        return
    group = model.pg_collection.tp
    part = whole // group.size()
    own = min(max(columns - group.rank() * part, 0), part)
    mask = functools.partial(_mask, columns={whole: columns, part: own})
    for matrix in (layer, *getattr(model, OUTPUT_HEADS, torch.nn.Module()).children()):
        matrix.register_forward_hook(mask)


def _mask(
    module: torch.nn.Module, inputs: tuple[object, ...], output: _Output, columns: dict[int, int]
) -> _Output | None:
    """The forward hook of an output matrix.

    Args:
        module: the matrix.
        inputs: of the call.
        output: logits [s, b, n] and a bias. n is the rank's part or, gathered, the whole.
        columns: for each such n, how many of the columns are of the vocabulary.

    Returns:
        The output with the others masked; None, which leaves it, where there are no others.
    """
    logits, bias = output
    width = logits.shape[-1]
    if columns[width] == width:
        return None
    # In place, since logits are large. Autograd allows it but for a view out of one of its
    # functions, which Megatron-Core's gathering over a single rank returns.
    if logits._is_view():
        logits = logits.clone()
    logits[..., columns[width] :] = masked_logit(logits.dtype)
    return logits, bias
