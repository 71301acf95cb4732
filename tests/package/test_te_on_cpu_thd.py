"""The stand-in's kernels of packed sequences under context parallelism, against plain torch."""

from __future__ import annotations

import pytest
import torch
from support.implementation import ON_TRANSFORMER_ENGINE
from torch import Tensor

pytestmark = pytest.mark.transformer_engine(only=True)

if ON_TRANSFORMER_ENGINE:
    import transformer_engine_torch as tex

# Multiples of 2 x 4 ranks; one is empty, as Megatron's data sets fill up their bounds.
LENGTHS = (8, 24, 0, 16)
TOKENS, HEADS, CHANNELS = sum(LENGTHS), 3, 8


def bounds(*lengths: int) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def halves() -> list[list[Tensor]]:
    """The tokens of each sequence of one rank, the early and the late ones."""
    return [
        [*torch.arange(start, start + length).chunk(2)]
        for start, length in zip(bounds(*LENGTHS).tolist(), LENGTHS, strict=False)
        if length
    ]


EARLY, LATE = (torch.cat(half) for half in zip(*halves(), strict=True))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_what_each_rank_has(size):
    """Chunk r and chunk 2N - 1 - r of each sequence, and back from all ranks' tokens."""
    cu_seqlens = bounds(*LENGTHS)
    sequences = torch.arange(TOKENS).split(LENGTHS)
    expected = [
        torch.cat(
            [s.chunk(2 * size)[n] for s in sequences if len(s) for n in (r, 2 * size - 1 - r)]
        )
        for r in range(size)
    ]
    for rank, own in enumerate(expected):
        found = tex.thd_get_partitioned_indices(cu_seqlens, TOKENS, size, rank)
        assert found.dtype == torch.int32
        assert found.tolist() == own.tolist()
    x = torch.randn(TOKENS, HEADS, CHANNELS)
    by_rank = tex.thd_sequence_order_to_cp_rank_order(x, cu_seqlens, size, TOKENS)
    assert torch.equal(by_rank, torch.cat([x[own] for own in expected]))
    back = tex.thd_cp_rank_order_to_sequence_order(by_rank, cu_seqlens, size, TOKENS)
    assert torch.equal(back, x)


def test_lengths_that_cannot_be_cut_are_refused():
    with pytest.raises(AssertionError):
        tex.thd_get_partitioned_indices(bounds(8, 6), 14, 2, 0)
    with pytest.raises(NotImplementedError, match="padding behind the last sequence"):
        tex.thd_get_partitioned_indices(bounds(8, 8), 24, 2, 0)


def test_halves():
    cu_seqlens, x = bounds(*LENGTHS), torch.randn(TOKENS, HEADS, CHANNELS)
    for half, places in enumerate((EARLY, LATE)):
        assert torch.equal(tex.thd_read_half_tensor(x, cu_seqlens, half), x[places])
        both = tex.thd_read_half_tensor(torch.stack([x, -x]), cu_seqlens, half)
        assert torch.equal(both, torch.stack([x, -x])[:, places])
    lse = torch.randn(HEADS, TOKENS)
    found = tex.thd_read_second_half_lse(lse, cu_seqlens, True, TOKENS // 2)
    assert torch.equal(found, lse[:, LATE])


@pytest.mark.parametrize("late_only", [False, True])
def test_attention_in_two_steps_is_attention_to_all_keys(late_only):
    """Scores of some keys, then of others, which all tokens see or the late ones alone."""
    cu_seqlens = bounds(*LENGTHS)
    seen = LATE if late_only else torch.arange(TOKENS)
    first, second = torch.randn(HEADS, TOKENS, 5), torch.randn(HEADS, len(seen), 7)
    values = torch.randn(2, HEADS, 7, CHANNELS)

    def attend(scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """[t, h, d] and [h, t]."""
        return (scores.softmax(-1) @ values).transpose(0, 1).contiguous(), scores.logsumexp(-1)

    out, lse = attend(first, values[0, :, :5])
    out_per_step, lse_per_step = attend(second, values[1])
    expected, expected_lse = out.clone(), lse.clone()
    together = torch.cat([first[:, seen], second], -1), torch.cat([values[0, :, :5], values[1]], 1)
    expected[seen], expected_lse[:, seen] = attend(*together)

    old_lse = lse.clone()
    if late_only:
        tex.thd_second_half_lse_correction(lse, lse_per_step, cu_seqlens, True)
    else:  # which Transformer Engine does itself
        lse = torch.logaddexp(lse, lse_per_step)
    torch.testing.assert_close(lse, expected_lse)
    tex.thd_out_correction(
        out, out_per_step, old_lse, lse, lse_per_step, cu_seqlens, late_only, True
    )
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("add", "none"),
        ("copy", "none"),
        ("none", "add"),
        ("none", "copy"),
        ("add", "copy"),
        ("copy", "add"),
    ],
)
def test_gradients_of_a_step(first, second):
    before = torch.randn(TOKENS, HEADS, CHANNELS)
    step = torch.randn(TOKENS, HEADS, CHANNELS)
    expected = before.clone()
    for mode, places in ((first, EARLY), (second, LATE)):
        if mode != "none":
            expected[places] = step[places] + (before[places] if mode == "add" else 0)
    if "none" in (first, second):
        step = step[EARLY if second == "none" else LATE]
    found = before.clone()
    tex.thd_grad_correction(found, step, bounds(*LENGTHS), first, second)
    assert torch.equal(found, expected)


def test_valid_tokens_are_copied():
    """Padding behind a sequence stays as it was, and so does what is before the first."""
    out, x = torch.zeros(24, HEADS), torch.randn(24, HEADS)
    starts = torch.tensor([4, 12, 24]).int()  # of a late half's, whose early one is not there
    tex.thd_copy_valid_tokens_from_per_split_to_rank_local(out, x, starts, bounds(3, 8))
    expected = torch.zeros_like(x)
    expected[4:7], expected[12:20] = x[4:7], x[12:20]
    assert torch.equal(out, expected)


def test_what_no_kernel_does_is_refused():
    x = torch.randn(TOKENS, HEADS, CHANNELS)
    with pytest.raises(NotImplementedError, match="zero and copy"):
        tex.thd_grad_correction(x, x, bounds(*LENGTHS), "zero", "copy")
    lse = torch.randn(len(LENGTHS), HEADS, 24)
    with pytest.raises(NotImplementedError, match="log-sum-exp by sequence"):
        tex.thd_read_second_half_lse(lse, bounds(*LENGTHS), False, 12)
