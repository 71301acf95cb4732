"""Packed sequences under context parallelism (common/fused_attn/context_parallel.cu).

With N ranks a sequence is cut into 2N chunks of one length, of which rank r has chunks r and
2N - 1 - r: the two halves of the sequence's tokens there. The ring ("p2p") reads and corrects one
half of each sequence, or both; "a2a" and "all_gather" reorder what comes from all ranks, which lies
rank after rank.

Sequences may have padding behind them, which counts as theirs: cu_seqlens, int32 [sequences + 1],
are the padded ones' bounds. What a kernel would leave uninitialised is no number here.

Shapes: t tokens, h heads, d channels.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from support.te_on_cpu.extension import kernel, refuse


def _places(cu_seqlens: Tensor, total_tokens: int, cp_size: int, rank: int) -> Tensor:
    """[t / cp_size], where in the whole batch a rank's tokens are, in the rank's order."""
    bounds = cu_seqlens.tolist()
    assert cu_seqlens.dtype == torch.int32, cu_seqlens.dtype
    assert 0 <= rank < cp_size, (rank, cp_size)
    assert not [bound for bound in bounds if bound % (2 * cp_size)], (bounds, cp_size)
    refuse("padding behind the last sequence", bounds[-1] == total_tokens)
    own = []
    for start, end in pairwise(bounds):
        chunks = torch.arange(start, end).view(2 * cp_size, (end - start) // (2 * cp_size))
        own += [chunks[rank], chunks[2 * cp_size - 1 - rank]]
    return torch.cat(own)


def _half(cu_seqlens: Tensor, half: int) -> Tensor:
    """The places of each sequence's early (0) or late (1) tokens, among those of one rank."""
    assert cu_seqlens.dtype == torch.int32, cu_seqlens.dtype
    bounds = cu_seqlens.tolist()
    assert not [bound for bound in bounds if bound % 2], bounds
    return torch.cat(
        [torch.arange(*pair).chunk(2)[half] for pair in pairwise(bounds) if len({*pair}) > 1]
    )


@kernel
def thd_get_partitioned_indices(cu_seqlens, total_tokens, world_size, rank):
    """int32 [total_tokens / world_size]."""
    return _places(cu_seqlens, total_tokens, world_size, rank).int()


def _rank_after_rank(cu_seqlens: Tensor, total_tokens: int, cp_size: int) -> Tensor:
    """[t], where in the whole batch the tokens of all ranks are, in the order of ranks."""
    return torch.cat([_places(cu_seqlens, total_tokens, cp_size, rank) for rank in range(cp_size)])


@kernel
def thd_sequence_order_to_cp_rank_order(inp, cu_seqlens, cp_size, total_tokens):
    assert inp.shape[0] == total_tokens, (inp.shape, total_tokens)
    return inp[_rank_after_rank(cu_seqlens, total_tokens, cp_size)]


@kernel
def thd_cp_rank_order_to_sequence_order(inp, cu_seqlens, cp_size, total_tokens):
    assert inp.shape[0] == total_tokens, (inp.shape, total_tokens)
    out = torch.empty_like(inp)
    out[_rank_after_rank(cu_seqlens, total_tokens, cp_size)] = inp
    return out


@kernel
def thd_copy_valid_tokens_from_per_split_to_rank_local(out, inp, cu_seqlens_padded, cu_seqlens):
    """Copy each sequence's tokens, which begin at cu_seqlens_padded, without its padding."""
    assert out.shape == inp.shape and out.dtype == inp.dtype and out.is_contiguous()
    lengths = cu_seqlens.diff().tolist()
    for (start, end), length in zip(pairwise(cu_seqlens_padded.tolist()), lengths, strict=True):
        own = slice(start, min(start + length, end))
        out[own] = inp[own]


@kernel
def thd_read_half_tensor(tensor, cu_seqlens, half_idx):
    """Of [t, h, d] or [2, t, h, d]: t / 2 tokens."""
    at = tensor.dim() - 3
    assert tensor.dim() in (3, 4), tensor.shape
    half = torch.full_like(tensor.narrow(at, 0, tensor.shape[at] // 2), float("nan"))
    places = _half(cu_seqlens, half_idx)
    half.narrow(at, 0, len(places)).copy_(tensor.index_select(at, places))
    return half


@kernel
def thd_read_second_half_lse(lse, cu_seqlens, lse_packed, second_half_lse_seqlen):
    """Of the log-sum-exp [h, t]: [h, second_half_lse_seqlen]."""
    refuse("a log-sum-exp by sequence", lse_packed)
    assert lse.dtype == torch.float32 and second_half_lse_seqlen >= lse.shape[1] // 2
    half = torch.zeros(lse.shape[0], second_half_lse_seqlen)
    places = _half(cu_seqlens, 1)
    half[:, : len(places)] = lse[:, places]
    return half


@kernel
def thd_second_half_lse_correction(lse, lse_per_step, cu_seqlens, lse_packed):
    """Add the keys of another step to the log-sum-exp of each sequence's late tokens."""
    refuse("a log-sum-exp by sequence", lse_packed)
    assert lse.dtype == lse_per_step.dtype == torch.float32
    places = _half(cu_seqlens, 1)
    lse[:, places] = torch.logaddexp(lse[:, places], lse_per_step[:, : len(places)])


@kernel
def thd_out_correction(
    out, out_per_step, old_lse, lse, lse_per_step, cu_seqlens, only_second_half, lse_packed
):
    """Add the keys of another step to attention's output, [t, h, d].

    With the arguments that the caller gives, and as `flash_attn_fwd_incremental_out_correction`
    beside it does for whole batches: older sources of the kernel add steps to zeros instead.

    Args:
        out: of the steps before, whose log-sum-exp is `old_lse`; changed in place.
        out_per_step: of this step, with `lse_per_step`.
        lse: of all of them together, [h, t].
    """
    refuse("a log-sum-exp by sequence", lse_packed)
    assert out.dtype == out_per_step.dtype
    places = _half(cu_seqlens, 1) if only_second_half else torch.arange(int(cu_seqlens[-1]))

    def share(part: Tensor) -> Tensor:
        return (part - lse[:, places]).exp().T[..., None]

    before = out[places].float() * share(old_lse[:, places])
    added = out_per_step[: len(places)].float() * share(lse_per_step[:, : len(places)])
    out[places] = (before + added).to(out.dtype)


@kernel
def thd_grad_correction(grad, grad_per_step, cu_seqlens, first_half, second_half):
    """Take a step's gradient, [t, h, d] or of one half of the tokens, into the one of all steps.

    Args:
        first_half: "add" or "copy" to each sequence's early tokens, or "none", with which
            `grad_per_step` is of the late ones alone.
        second_half: the same of the late ones.
    """
    modes = {first_half, second_half}
    known = modes <= {"add", "copy", "none"} and len(modes) == 2
    refuse(f"thd_grad_correction with {first_half} and {second_half}", known)
    assert grad.dtype == grad_per_step.dtype
    refuse("thd_grad_correction of two tensors in one", grad.dim() == 3)
    for half, mode in enumerate((first_half, second_half)):
        places = _half(cu_seqlens, half)
        if mode == "none":
            continue
        own = grad_per_step[: len(places)] if "none" in modes else grad_per_step[places]
        grad[places] = own if mode == "copy" else grad[places] + own
