"""Batches of packed documents (--sft, --dataloader-inter-document-masking), as they are dealt out.

A batch has tokens, labels, loss_mask and position_ids, [b, s] each (None where a pipeline stage has
no use for them), and `cu_seqlens`, int32, at which documents begin and end; a document of length 0
is none. Under context parallelism with N ranks each document is cut into 2N chunks of equal length,
of which rank r has chunks r and 2N - 1 - r.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core import utils as megatron_utils
from torch import Tensor

from step35_patch import settings as process
from step35_patch.patch.notices import say, warn

# What of a batch has a place for each token.
_BY_TOKEN = ("tokens", "labels", "loss_mask", "position_ids")


def mark(config: Any) -> None:
    """Say in a data set's config that a Step-3.5 model is trained on it.

    A worker process that is spawned gets the data set and its config, but not this process's
    activation.
    """
    config.is_step35 = True


def is_step35(config: Any) -> bool:
    """Whether a Step-3.5 model is trained on the data set with this config."""
    return process.active() is not None or getattr(config, "is_step35", False)


def partitioned_indices(
    cu_seqlens: Tensor, total_tokens: int, world_size: int, rank: int
) -> Tensor:
    """The places in the batch of a rank's tokens, document by document.

    It stands for Transformer Engine's `thd_get_partitioned_indices`, and takes its arguments.

    Args:
        cu_seqlens: [documents + 1], where documents begin and the last one ends.
        total_tokens: of the batch, on all ranks.
        world_size: N ranks of context parallelism.
        rank: one of them.

    Returns:
        int32 [total_tokens / N], on the device of `cu_seqlens`.

    Raises:
        ValueError: a document's length is no multiple of 2N, or the documents are not the batch.
    """
    bounds, chunks = cu_seqlens.tolist(), 2 * world_size
    if bounds[0] != 0 or bounds[-1] != total_tokens or bounds != sorted(bounds):
        raise ValueError(
            f"cu_seqlens: expected places from 0 to the batch's {total_tokens} tokens, none before "
            f"the one to its left, found {bounds}"
        )
    if uneven := [end for end in bounds if end % chunks]:
        raise ValueError(
            f"cu_seqlens: expected multiples of 2 x context parallel size = {chunks}, found "
            f"{uneven}; pad each document to such a length, or use --context-parallel-size 1"
        )
    parts = []
    for start, end in itertools.pairwise(bounds):
        size = (end - start) // chunks
        parts += [
            torch.arange(start + size * chunk, start + size * (chunk + 1), dtype=torch.int32)
            for chunk in (rank, chunks - 1 - rank)
        ]
    return torch.cat(parts).to(cu_seqlens.device)


@contextmanager
def index_function() -> Iterator[None]:
    """Give Megatron's data path `partitioned_indices` where Transformer Engine is not installed."""
    if megatron_utils.tex is not None:
        yield
        return
    megatron_utils.tex = SimpleNamespace(thd_get_partitioned_indices=partitioned_indices)
    try:
        yield
    finally:
        megatron_utils.tex = None


def deal(make: Callable[..., Any], call: dict[str, Any]) -> tuple[dict[str, Tensor | None], Any]:
    """A rank's part of a packed batch, and its PackedSeqParams, in 0.17.

    Its own function deals out by padded bounds, which no data set of Megatron's has, and looks for
    the tokens on stages that have none.

    Args:
        make: `get_thd_batch_on_this_cp_rank`.
        call: its arguments by name; `cu_seqlens` [documents + 1].
    """
    size, rank = call.pop("cp_size", None), call.pop("cp_rank", None)
    size = parallel_state.get_context_parallel_world_size() if size is None else size
    rank = parallel_state.get_context_parallel_rank() if rank is None else rank
    batch, packed_seq_params = make(**call, cp_size=1)
    if size == 1:
        return batch, packed_seq_params
    padded = call.get("cu_seqlens_padded")
    bounds = call["cu_seqlens"] if padded is None else padded
    total = next(batch[name] for name in _BY_TOKEN if batch.get(name) is not None).size(1)
    index = partitioned_indices(bounds, total, size, rank)
    for name in _BY_TOKEN:
        if batch.get(name) is not None:
            batch[name] = batch[name].index_select(1, index)
    return batch, packed_seq_params


def share_bounds(batch: dict[str, Any]) -> None:
    """Let all tensor-parallel ranks have the documents' bounds that the first of them has read.

    0.17 sends them on the stages that have tokens only; on the others a rank would take the batch
    for one document, or have none to go by.

    Args:
        batch: changed in place; `cu_seqlens` and `max_seqlen` of the first rank's.
    """
    # Not at the top: a wheel may be installed without what megatron.training needs.
    from megatron.training import get_args

    group = parallel_state.get_tensor_model_parallel_group()
    if group.size() == 1 or not get_args().sft:
        return
    source = parallel_state.get_tensor_model_parallel_src_rank()
    names = ("cu_seqlens", "max_seqlen")
    shared: list[Any] = [batch[name].cpu() if group.rank() == 0 else None for name in names]
    torch.distributed.broadcast_object_list(shared, source, group=group)
    for name, value in zip(names, shared, strict=True):
        batch[name] = value.cuda()


def leave_out_ends(sample: dict[str, Tensor]) -> None:
    """Count no loss where a document's last token would predict the next document's first.

    Megatron's data set counts it where it counts prompts (prompt formats `default` and `identity`).

    Args:
        sample: of `SFTDataset`, changed in place; loss_mask [s].
    """
    ends = sample["cu_seqlens"][1:].long()
    sample["loss_mask"][ends[ends > 0] - 1] = 0.0


def in_slots(sample: dict[str, Any], multiple: int) -> dict[str, Any]:
    """A sample whose documents begin at multiples of `multiple`, so that each can be dealt out.

    Each document is followed by padding, which no loss is counted of. The sample stays as long as
    it was: what no longer fits, at its end, is left out.

    Args:
        sample: of `GPTDataset` with inter_document_masking: `tokens`, `labels`, `loss_mask` and
            `position_ids` [s]; `cu_seqlens` [s + 1], filled up with s; `max_seqlen`.
        multiple: a divisor of s.

    Returns:
        The same with other tensors; `cu_seqlens` are the slots, padding included.
    """
    length, bounds = len(sample["tokens"]), sample["cu_seqlens"].unique().tolist()
    slots, source, counted, positions = [0], [], [], []
    for start, end in itertools.pairwise(bounds):
        place, size = torch.arange(-(-(end - start) // multiple) * multiple), end - start
        # Padding repeats the document's last token, whose value nothing depends on.
        source.append(start + place.clamp(max=size - 1))
        counted.append(place < size)
        positions.append(place)
        slots.append(min(slots[-1] + len(place), length))
    index, kept = torch.cat(source)[:length], torch.cat(counted)[:length]
    cu_seqlens = torch.full_like(sample["cu_seqlens"], length)
    cu_seqlens[: len(slots)] = torch.tensor(slots, dtype=cu_seqlens.dtype)
    return sample | {
        "tokens": sample["tokens"][index],
        "labels": sample["labels"][index],
        "loss_mask": sample["loss_mask"][index] * kept,
        "position_ids": torch.cat(positions)[:length],
        "cu_seqlens": cu_seqlens,
        "max_seqlen": cu_seqlens.diff().max(),
    }


def is_built_on_rank() -> bool:
    """Whether a rank reads the data set: the first tensor-parallel one of each pipeline stage.

    With packed documents a stage without tokens reads their bounds. Megatron lets it do so with
    --sft alone; with --dataloader-inter-document-masking it would have no data to ask for them.
    """
    return bool(parallel_state.get_tensor_model_parallel_rank() == 0)


@functools.cache
def say_slots(multiple: int) -> None:
    """Tell once of what `in_slots` does to a run's samples."""
    say(
        "--dataloader-inter-document-masking under context parallelism: documents are padded to "
        f"multiples of {multiple}, and what then no longer fits is left out at a sample's end"
    )


@functools.cache
def check_padding(pad: int | None, eod: int | None) -> None:
    """Look at a tokenizer's padding, with the first sample.

    Args:
        pad: the token that pads, which is left out of the loss wherever it is predicted.
        eod: the token that ends a document.

    Raises:
        ValueError: there is no padding token.
    """
    if pad is None:
        raise ValueError(
            "--sft-tokenizer-prompt-format: expected the format's padding token in the tokenizer's "
            "vocabulary, found none; add it, or use the format `default` and a pad_token"
        )
    if pad == eod:
        warn(
            f"--sft: the tokenizer pads with its end of document (token {pad}), and Megatron-Core "
            "counts no loss where padding is predicted: the model does not learn to end. Give the "
            "tokenizer a pad_token of its own, unless turns end with another token"
        )
