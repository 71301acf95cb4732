"""Attention on torch: exact with and without windows, masks and packing, and linear in s."""

import itertools

import pytest
import torch
from support.attention import (
    assert_exact,
    causal_mask,
    document_mask,
    naive,
    naive_packed,
    ours,
    packed,
    random_packed,
    random_qkv,
    with_gradients,
)
from torch.utils._python_dispatch import TorchDispatchMode

from step35_patch.model.windowed_attention import attend_to_prefix, windowed_attention

# --- Windows --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("window", "s"),
    [
        (window, s)
        for window in (1, 2, 5, 32, 100)
        for s in sorted(
            {1, window - 1, window, window + 1, 2 * window, window + 32, window + 33, 400} - {0}
        )
    ],
)
def test_every_length_around_the_window_and_the_blocks_is_exact(window, s):
    inputs = random_qkv(s, 2, 4, 2, 16)
    assert_exact(ours(window - 1), lambda q, k, v: naive(q, k, v, window - 1), inputs)


@pytest.mark.parametrize(("heads", "groups"), [(1, 1), (4, 4), (4, 2), (3, 1), (12, 1), (24, 2)])
@pytest.mark.parametrize("window_left", [None, 40])
def test_every_grouping_of_heads_is_exact(heads, groups, window_left):
    inputs = random_qkv(333, 2, heads, groups, 16)
    assert_exact(ours(window_left), lambda q, k, v: naive(q, k, v, window_left), inputs)


def test_published_window_and_head_dimension_are_exact():
    inputs = random_qkv(1200, 1, 12, 1, 128)
    assert_exact(ours(511, hn=128), lambda q, k, v: naive(q, k, v, 511), inputs)


@pytest.mark.parametrize("window_left", [None, 40])
def test_strided_inputs_are_exact(window_left):
    # Megatron-Core hands over slices of the projection's output, interleaved by group.
    s, b, groups, r, hn = 200, 2, 2, 3, 16
    mixed = torch.randn(s, b, groups, (r + 2) * hn, generator=torch.Generator().manual_seed(2))
    q, k, v = mixed.split([r * hn, hn, hn], dim=3)
    inputs = [q.reshape(s, b, groups * r, hn).requires_grad_(), k.requires_grad_(), v]
    inputs[2] = v.requires_grad_()
    assert not v.is_contiguous()
    assert_exact(ours(window_left), lambda q, k, v: naive(q, k, v, window_left), inputs)


@pytest.mark.parametrize("window_left", [None, 40])
def test_bf16_is_as_good_as_its_inputs(window_left):
    inputs = random_qkv(400, 1, 6, 1, 64, dtype=torch.bfloat16)
    assert_exact(
        ours(window_left, hn=64), lambda q, k, v: naive(q, k, v, window_left), inputs, 1e-2
    )


def test_a_key_outside_the_window_has_no_influence():
    s, window_left = 300, 63
    query, key, value = random_qkv(s, 1, 4, 2, 16)
    with torch.no_grad():
        before = ours(window_left)(query, key, value)
        key[100] += 1.0
        value[100] += 1.0
        changed = (ours(window_left)(query, key, value) != before).any(-1).squeeze(1)
    assert changed.nonzero().squeeze(1).tolist() == list(range(100, 100 + window_left + 1))


# --- Masks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("window_left", [None, 4, 40, 250])
@pytest.mark.parametrize("samples", [1, 3])
def test_masks_are_combined_with_causality_and_window(window_left, samples):
    s = 200
    mask = torch.rand(samples, 1, s, s, generator=torch.Generator().manual_seed(3)) < 0.4
    inputs = random_qkv(s, 3, 6, 2, 16)
    assert_exact(ours(window_left, mask), lambda q, k, v: naive(q, k, v, window_left, mask), inputs)


@pytest.mark.parametrize("window_left", [None, 40])
def test_document_masks_are_exact(window_left):
    s = 200
    mask = torch.cat([document_mask(s, 90, 110), document_mask(s, 3, 150, 47)])
    inputs = random_qkv(s, 2, 6, 2, 16)
    assert_exact(ours(window_left, mask), lambda q, k, v: naive(q, k, v, window_left, mask), inputs)


@pytest.mark.parametrize("window_left", [None, 40])
def test_the_plain_causal_mask_changes_nothing(window_left):
    inputs = random_qkv(200, 2, 4, 2, 16)
    mask = causal_mask(200).expand(2, -1, -1, -1)
    for bare, masked in zip(
        with_gradients(ours(window_left), inputs),
        with_gradients(ours(window_left, mask), inputs),
        strict=True,
    ):
        torch.testing.assert_close(masked, bare, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("window_left", [None, 40])
def test_queries_that_see_nothing_get_zeros_and_give_no_gradient(window_left):
    s, blind = 200, [0, 5, 41, 120, 199]
    mask = causal_mask(s).clone()
    mask[..., blind, :] = True
    inputs = random_qkv(s, 1, 4, 2, 16)
    out, query_grad, *_ = with_gradients(ours(window_left, mask), inputs)
    assert not out[blind].any() and not query_grad[blind].any()
    assert_exact(ours(window_left, mask), lambda q, k, v: naive(q, k, v, window_left, mask), inputs)


# --- Packed sequences -----------------------------------------------------------------------------


@pytest.mark.parametrize("window_left", [None, 0, 20, 63])
def test_packed_sequences_do_not_see_each_other(window_left):
    cu_seqlens = [0, 1, 21, 21, 85, 150, 300]
    bounds = [(a, b - a, b - a) for a, b in itertools.pairwise(cu_seqlens)]
    assert_exact(
        packed(window_left, cu_seqlens), naive_packed(window_left, bounds), random_packed(300)
    )


@pytest.mark.parametrize("window_left", [None, 20])
def test_padding_between_packed_sequences_is_left_out(window_left):
    bounds = [(0, 30, 32), (32, 64, 64), (96, 0, 4), (100, 75, 100)]
    function = packed(window_left, [0, 30, 94, 94, 169], [0, 32, 96, 100, 200])
    inputs = random_packed(200)
    assert_exact(function, naive_packed(window_left, bounds), inputs)
    for x in with_gradients(function, inputs):
        assert not x[30:32].any() and not x[96:100].any() and not x[175:].any()


def test_a_mask_over_packed_sequences_counts():
    mask = torch.rand(1, 1, 150, 150, generator=torch.Generator().manual_seed(4)) < 0.4
    bounds = [(0, 50, 50), (50, 100, 100)]
    assert_exact(
        packed(20, [0, 50, 150], mask=mask), naive_packed(20, bounds, mask), random_packed(150)
    )


@pytest.mark.parametrize(
    ("cu_seqlens", "cu_seqlens_padded", "message"),
    [
        ([0, 60], None, r"cu_seqlens: expected .* 100 tokens of the batch, found \[0, 60\]"),
        ([0, 60, 120], None, r"cu_seqlens: .*found \[0, 60, 120\]"),
        ([1, 100], None, r"cu_seqlens: .*found \[1, 100\]"),
        ([0, 60, 50, 100], None, r"cu_seqlens: .*found \[0, 60, 50, 100\]"),
        ([0], None, "two or more, found 1"),
        ([0, 10, 20], [0, 100], "the same number of entries, two or more, found 3 and 2"),
        ([0, 10, 20], [0, 50, 90], r"cu_seqlens_padded: expected .*found \[0, 50, 90\]"),
        ([0, 60, 70], [0, 50, 100], "cu_seqlens: expected at most 50 tokens in sequence 0"),
    ],
)
def test_lengths_that_do_not_fit_are_errors(cu_seqlens, cu_seqlens_padded, message):
    with pytest.raises(ValueError, match=message):
        packed(None, cu_seqlens, cu_seqlens_padded)(*random_packed(100))


# --- Cost -----------------------------------------------------------------------------------------


class Allocations(TorchDispatchMode):
    """Counts the bytes of every new tensor, in forward and backward."""

    def __init__(self):
        super().__init__()
        self.largest = self.total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        # A view shares its storage with an argument.
        known = {x.untyped_storage().data_ptr() for x in args if isinstance(x, torch.Tensor)}
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in known:
                self.largest = max(self.largest, x.untyped_storage().nbytes())
                self.total += x.untyped_storage().nbytes()
        return out


def allocations(s, function):
    inputs = random_qkv(s, 1, 4, 1, 16)
    with Allocations() as counted:
        with_gradients(function, inputs)
    return counted


def dropped_out(q, k, v):
    return windowed_attention(q, k, v, window_left=63, softmax_scale=0.25, dropout_p=0.1)


@pytest.mark.parametrize("case", ["plain", "dropout", "mask"])
def test_memory_of_a_window_grows_with_the_length_and_not_its_square(case):
    def run(s):
        documents = document_mask(s, *[s // 4] * 4) if case == "mask" else None
        return allocations(s, dropped_out if case == "dropout" else ours(63, documents))

    short, long = run(2048), run(4096)
    assert long.largest <= 2.1 * short.largest
    assert long.total <= 2.1 * short.total
    if case == "plain":  # 13 queries' worth in all; one head's s * s scores alone are 64
        query = 4096 * 4 * 16 * 4
        assert long.largest <= query and long.total <= 15 * query


def test_packed_memory_does_not_grow_with_the_number_of_sequences():
    def run(n):
        def function(q, k, v):
            inputs = (x.squeeze(1) for x in (q, k, v))
            return packed(63, list(range(0, 4097, 4096 // n)))(*inputs)

        return allocations(4096, function).total

    assert run(32) <= 1.5 * run(2)


# --- Dropout --------------------------------------------------------------------------------------


@pytest.mark.parametrize("window_left", [None, 20])
def test_dropout_keeps_the_mean_and_drops_the_asked_share(window_left):
    s, p = 64, 0.25
    query, key, _ = random_qkv(s, 1, 2, 1, 16)
    value = torch.eye(s)[:, None, None, :]  # the output is the probabilities
    query, key = (torch.nn.functional.pad(x.detach(), (0, s - 16)) for x in (query, key))

    def run(dropout_p):
        return windowed_attention(
            query,
            key,
            value,
            window_left=window_left,
            softmax_scale=0.25,
            dropout_p=dropout_p,
        )

    torch.manual_seed(5)
    exact, draws = run(0.0), torch.stack([run(p) for _ in range(400)])
    seen = exact > 0
    kept = (draws[:, seen] > 0).float().mean()
    assert abs(kept - (1 - p)) < 0.01
    assert (draws.mean(0) - exact).abs().max() < 0.15
    torch.testing.assert_close(draws.amax(0)[seen], exact[seen] / (1 - p))


# --- Inputs that don't fit ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shapes", "window_left", "mask", "message"),
    [
        ([(8, 1, 4, 16), (9, 1, 2, 16)], None, None, "key: expected .* KV cache"),
        ([(8, 1, 4, 16), (8, 1, 3, 16)], None, None, "a multiple of key's 3 heads, found 4"),
        ([(8, 4, 16), (8, 2, 16)], None, None, "query and key: expected"),
        ([(8, 1, 4, 16), (8, 1, 2, 16)], -1, None, "window_left: expected None or at least 0"),
        ([(8, 1, 4, 16), (8, 1, 2, 16)], None, torch.zeros(1, 1, 8, 8), "attention_mask.*bool"),
        ([(8, 1, 4, 16), (8, 1, 2, 16)], None, causal_mask(9), r"attention_mask.*\[1, 1, 9, 9\]"),
        ([(8, 1, 4, 16), (8, 1, 2, 16)], 2, causal_mask(8)[0], r"attention_mask.*\[1, 8, 8\]"),
    ],
)
def test_inputs_that_do_not_fit_are_errors(shapes, window_left, mask, message):
    query, key = (torch.zeros(shape) for shape in shapes)
    with pytest.raises(ValueError, match=message):
        windowed_attention(
            query, key, key, window_left=window_left, softmax_scale=1.0, attention_mask=mask
        )


def test_key_and_value_of_different_shapes_are_an_error():
    query, key, value = random_qkv(8, 1, 2, 2, 16)
    with pytest.raises(ValueError, match="value: expected the shape of key"):
        ours(None)(query, key, value[:, :, :1])


# --- Prefixes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("window_left", [None, 0, 5, 20, 100])
@pytest.mark.parametrize(("s", "keys"), [(8, 8), (8, 9), (8, 40), (40, 48), (1, 30)])
def test_the_last_tokens_attend_as_in_the_whole_sequence(s, keys, window_left):
    q, k, v = random_qkv(keys, 2, 6, 2, 16)
    options = dict(window_left=window_left, softmax_scale=0.3)
    whole = windowed_attention(q, k, v, **options)[keys - s :]
    last = attend_to_prefix(q[keys - s :], k, v, **options)
    torch.testing.assert_close(last, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("window_left", [None, 0, 5, 20])
@pytest.mark.parametrize("s", [1, 8])
def test_the_last_tokens_attend_by_a_mask_too(s, window_left):
    """Another one for each sample; the first hides all keys that the last query sees."""
    mask = torch.cat([causal_mask(30), document_mask(30, 20, 10)])
    mask[0, 0, -1] = True
    q, k, v = random_qkv(30, 2, 6, 2, 16)
    last = attend_to_prefix(
        q[30 - s :],
        k,
        v,
        window_left=window_left,
        softmax_scale=0.25,
        attention_mask=mask[:, :, 30 - s :],
    )
    whole = naive(q.double(), k.double(), v.double(), window_left, mask)[30 - s :].float()
    torch.testing.assert_close(last, whole, rtol=1e-5, atol=1e-6)
