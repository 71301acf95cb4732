"""Core attention on torch: exact with and without windows, masks and packing, and linear in s."""

import itertools

import pytest
import torch
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from step35_patch.model.core_attention import Step35DotProductAttention
from step35_patch.model.windowed_attention import (
    attend_to_prefix,
    packed_windowed_attention,
    windowed_attention,
)

pytestmark = pytest.mark.megatron


def naive(query, key, value, window_left, mask=None, scale=None):
    """All s * s scores in float64; a query that sees nothing gets zeros."""
    s, b, heads, hn = query.shape
    key, value = (x.repeat_interleave(heads // key.size(2), dim=2) for x in (key, value))
    scores = torch.einsum("ibnh,jbnh->bnij", query, key) * (scale or hn**-0.5)
    distance = torch.arange(s).unsqueeze(1) - torch.arange(s)
    hidden = (distance < 0) | (distance > (s if window_left is None else window_left))
    if mask is not None:
        hidden = hidden | mask
    weights = torch.where(hidden, 0.0, (scores - scores.amax(-1, keepdim=True)).exp())
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-300)
    return torch.einsum("bnij,jbnh->ibnh", weights, value).reshape(s, b, heads * hn)


def random_qkv(s, b, heads, groups, hn, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(s, b, n, hn, generator=generator).to(dtype).requires_grad_()
        for n in (heads, groups, groups)
    ]


def with_gradients(function, inputs):
    """The output, and the gradients of a fixed random projection of it."""
    out = function(*inputs)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, inputs, weight)]


def assert_exact(function, reference, inputs, tolerance=3e-6):
    """Output and gradients, relative to the largest value of each."""
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    names = ("output", "query.grad", "key.grad", "value.grad")
    found = with_gradients(function, inputs)
    for name, ours, exact in zip(names, found, with_gradients(reference, doubles)):
        assert ours.isfinite().all(), name
        # clamp: a softmax over a single key has no gradient but rounding.
        error = (ours.double() - exact).abs().max() / exact.abs().max().clamp(min=1.0)
        assert error < tolerance, f"{name}: {error:.1e}"


def ours(window_left, mask=None, hn=16):
    return lambda q, k, v: windowed_attention(
        q, k, v, window_left=window_left, softmax_scale=hn**-0.5, attention_mask=mask
    )


# --- Windows --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "window,s",
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


@pytest.mark.parametrize("heads,groups", [(1, 1), (4, 4), (4, 2), (3, 1), (12, 1), (24, 2)])
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


def causal_mask(s):
    return torch.ones(s, s, dtype=torch.bool).triu(1)[None, None]


def document_mask(s, *lengths):
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    assert len(document) == s
    return causal_mask(s) | (document.unsqueeze(1) != document)


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
        with_gradients(ours(window_left), inputs), with_gradients(ours(window_left, mask), inputs)
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


def packed(window_left, cu_seqlens, cu_seqlens_padded=None, mask=None):
    return lambda q, k, v: packed_windowed_attention(
        q,
        k,
        v,
        cu_seqlens=torch.tensor(cu_seqlens, dtype=torch.int32),
        cu_seqlens_padded=(
            None
            if cu_seqlens_padded is None
            else torch.tensor(cu_seqlens_padded, dtype=torch.int32)
        ),
        window_left=window_left,
        softmax_scale=0.25,
        attention_mask=mask,
    )


def naive_packed(window_left, bounds, mask=None):
    """`naive` for each (start, length, length with padding), zeros for padding."""

    def function(q, k, v):
        outputs = []
        for start, length, slot in bounds:
            own = slice(start, start + length)
            part = None if mask is None else mask[..., own, own]
            if length:
                x = (y[own].unsqueeze(1) for y in (q, k, v))
                outputs.append(naive(*x, window_left, part).squeeze(1))
            outputs.append(torch.zeros(slot - length, q.size(1) * q.size(2), dtype=q.dtype))
        return torch.cat(outputs)

    return function


def random_packed(t, heads=6):
    return [x.detach().squeeze(1).requires_grad_() for x in random_qkv(t, 1, heads, 2, 16)]


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
    "cu_seqlens,cu_seqlens_padded,message",
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
    "shapes,window_left,mask,message",
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


# --- Megatron-Core's interface --------------------------------------------------------------------


def config(**changes):
    values = dict(
        num_layers=1,
        hidden_size=64,
        num_attention_heads=4,
        num_query_groups=2,
        kv_channels=16,
        attention_dropout=0.0,
        window_size=(20, 0),
    )
    return TransformerConfig(**(values | changes))


def attention(mask_type=AttnMaskType.causal, pg_collection=None, softmax_scale=None, **changes):
    """Built with the arguments that Megatron-Core's attention passes."""
    return Step35DotProductAttention(
        config=config(**changes),
        layer_number=3,
        attn_mask_type=mask_type,
        attention_type="self",
        cp_comm_type="p2p",
        softmax_scale=softmax_scale,
        pg_collection=pg_collection,
    )


def call(module, inputs, mask=None, mask_type=None, bias=None, packed_seq_params=None):
    """Called as Megatron-Core's attention does."""
    return module(
        *inputs,
        mask,
        attn_mask_type=mask_type,
        attention_bias=bias,
        packed_seq_params=packed_seq_params,
    )


@pytest.mark.parametrize("window_size,window_left", [(None, None), ((20, 0), 20), ([7, 0], 7)])
def test_the_module_reads_its_layers_window(window_size, window_left):
    module = attention(window_size=window_size)
    mask = document_mask(100, 60, 40)
    for given in (None, mask):
        assert_exact(
            lambda q, k, v: call(module, (q, k, v), given, AttnMaskType.causal),
            lambda q, k, v: naive(q, k, v, window_left, given),
            random_qkv(100, 2, 4, 2, 16),
        )


def test_the_module_takes_the_heads_of_its_tensor_parallel_rank():
    inputs = random_qkv(100, 2, 4, 2, 16)
    whole = call(attention(), inputs).unflatten(2, (2, -1))
    for rank in range(2):
        own = [x.unflatten(2, (2, -1))[:, :, rank] for x in inputs]
        torch.testing.assert_close(call(attention(), own), whole[:, :, rank])


def test_the_softmax_scale_is_the_configs_or_that_of_the_head_dimension():
    inputs = random_qkv(50, 1, 4, 2, 16)
    by_default, given = attention(), attention(softmax_scale=0.7)
    for module, scale in ((by_default, 0.25), (given, 0.7)):
        assert_exact(lambda *x: call(module, x), lambda *x: naive(*x, 20, scale=scale), inputs)


@pytest.mark.parametrize("padded", [False, True])
def test_packed_sequences_through_the_module(padded):
    cu_seqlens = torch.tensor([0, 30, 100], dtype=torch.int32)
    cu_seqlens_padded = torch.tensor([0, 40, 120], dtype=torch.int32) if padded else None
    params = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens.clone(),
        cu_seqlens_q_padded=cu_seqlens_padded,
        cu_seqlens_kv_padded=cu_seqlens_padded,
        max_seqlen_q=70,
        max_seqlen_kv=70,
    )
    bounds = [(0, 30, 40), (40, 70, 80)] if padded else [(0, 30, 30), (30, 70, 70)]
    for mask_type in (None, AttnMaskType.causal, AttnMaskType.padding_causal):
        assert_exact(
            lambda q, k, v: call(
                attention(), (q, k, v), mask_type=mask_type, packed_seq_params=params
            ),
            naive_packed(20, bounds),
            random_packed(sum(bounds[-1][::2]), heads=4),
        )


def test_sbhd_packed_seq_params_change_nothing():
    inputs = random_qkv(50, 2, 4, 2, 16)
    params = PackedSeqParams(qkv_format="sbhd")
    assert torch.equal(
        call(attention(), inputs, packed_seq_params=params), call(attention(), inputs)
    )


def test_padding_causal_with_a_mask_is_causal_with_that_mask():
    mask = document_mask(50, 20, 30)
    inputs = random_qkv(50, 1, 4, 2, 16)
    module = attention(AttnMaskType.padding_causal)
    assert torch.equal(call(module, inputs, mask), call(attention(), inputs, mask))


def dropping_attention(**changes):
    # Sequence parallelism: without it dropout asks Megatron-Core's CUDA generators.
    parallel = dict(tensor_model_parallel_size=2, sequence_parallel=True)
    return attention(**(parallel | dict(attention_dropout=0.3) | changes))


def test_dropout_is_the_configs_and_for_training_only():
    inputs = random_qkv(50, 1, 4, 2, 16)
    module = dropping_attention()
    torch.manual_seed(6)
    drawn = call(module, inputs)
    torch.manual_seed(6)
    expected = windowed_attention(*inputs, window_left=20, softmax_scale=0.25, dropout_p=0.3)
    assert torch.equal(drawn, expected)
    assert torch.equal(call(module.eval(), inputs), call(attention(), inputs))


def test_dropout_without_sequence_parallelism_draws_from_megatrons_generators():
    tracker = tensor_parallel.get_cuda_rng_tracker()
    states = tracker.get_states()
    tracker.reset()
    try:
        with pytest.raises(Exception, match="rng state model-parallel-rng is not added"):
            call(attention(attention_dropout=0.3), random_qkv(50, 1, 4, 2, 16))
    finally:
        tracker.set_states(states)


@pytest.mark.parametrize("window_size", [None, (20, 0)])
def test_recomputation_gives_the_same_gradients(window_size):
    inputs = random_qkv(100, 2, 4, 2, 16)
    module = dropping_attention(window_size=window_size)

    def recomputed(q, k, v):
        return checkpoint(lambda *x: call(module, x), q, k, v, use_reentrant=False)

    torch.manual_seed(7)
    kept = with_gradients(lambda *x: call(module, x), inputs)
    torch.manual_seed(7)
    for a, b in zip(kept, with_gradients(recomputed, inputs)):
        assert torch.equal(a, b)


def process_groups(**sizes):
    groups = ProcessGroupCollection()
    for name, size in sizes.items():
        setattr(groups, name, torch.distributed.ProcessGroup(0, size))
    return groups


def test_nothing_is_kept_in_checkpoints():
    module = attention(pg_collection=process_groups(tp=1, cp=1))
    assert module.state_dict() == {}
    metadata = {"dp_cp_group": torch.distributed.ProcessGroup(0, 1)}
    assert module.sharded_state_dict("core_attention.", (), metadata) == {}


@pytest.mark.parametrize(
    "changes,message",
    [
        (dict(window_size=(20, 1)), r"window_size: .*found \(20, 1\)"),
        (dict(window_size=(-1, 0)), r"window_size: .*found \(-1, 0\)"),
        (dict(window_attn_skip_freq=4), "window_attn_skip_freq: expected None .*found 4"),
        (dict(softmax_type="learnable"), "softmax_type: expected 'vanilla', found 'learnable'"),
        (dict(softmax_type="off-by-one"), "softmax_type: .*found 'off-by-one'"),
        (dict(apply_query_key_layer_scaling=True), "apply_query_key_layer_scaling: .*found True"),
        (dict(qk_clip=True), "qk_clip: expected False, found True"),
        (dict(log_max_attention_logit=True), "log_max_attention_logit: expected False"),
        (dict(fp8_dot_product_attention=True), "fp8_dot_product_attention: expected False"),
        (dict(fp8_multi_head_attention=True), "fp8_multi_head_attention: expected False"),
        (dict(mask_type=AttnMaskType.arbitrary), "attn_mask_type: .*AttnMaskType.arbitrary"),
        (dict(mask_type=AttnMaskType.padding), "attn_mask_type: .*AttnMaskType.padding"),
    ],
)
def test_what_it_does_not_do_is_an_error_when_it_is_built(changes, message):
    with pytest.raises(ValueError, match="Layer 3: " + message):
        attention(**changes)


def test_cross_attention_is_an_error():
    with pytest.raises(ValueError, match="attention_type: expected 'self', found 'cross'"):
        Step35DotProductAttention(config(), 1, AttnMaskType.causal, "cross")


@pytest.mark.parametrize(
    "arguments,message",
    [
        (dict(bias=torch.zeros(1, 4, 8, 8)), r"attention_bias: expected None, found .*\[1, 4, 8"),
        (dict(mask_type=AttnMaskType.no_mask), "attn_mask_type: .*found AttnMaskType.no_mask"),
        (dict(mask_type=AttnMaskType.padding_causal), "attention_mask: expected a mask"),
        (
            dict(packed_seq_params=PackedSeqParams(qkv_format="bshd")),
            "qkv_format: expected 'thd' or 'sbhd', found 'bshd'",
        ),
        (
            dict(packed_seq_params=PackedSeqParams(qkv_format="sbhd", local_cp_size=2)),
            "local_cp_size: expected None or 1, found 2",
        ),
        (dict(packed_seq_params=PackedSeqParams(qkv_format="thd")), "cu_seqlens_q: .*found None"),
        (
            dict(
                packed_seq_params=PackedSeqParams(
                    qkv_format="thd",
                    cu_seqlens_q=torch.tensor([0, 8]),
                    cu_seqlens_kv=torch.tensor([0, 4, 8]),
                )
            ),
            r"cu_seqlens_kv: expected cu_seqlens_q, \[0, 8\], found \[0, 4, 8\]",
        ),
    ],
)
def test_what_it_does_not_do_is_an_error_when_it_is_called(arguments, message):
    with pytest.raises(ValueError, match=message):
        call(attention(), random_qkv(8, 1, 4, 2, 16), **arguments)


def test_what_context_parallelism_cannot_do_is_an_error():
    module = attention(pg_collection=process_groups(tp=1, cp=4))
    inputs = random_qkv(8, 1, 4, 2, 16)
    with pytest.raises(ValueError, match="attention_mask: .*no-create-attention-mask"):
        call(module, inputs, mask=torch.zeros(1, 1, 8, 32, dtype=torch.bool))
    with pytest.raises(ValueError, match="qkv_format: expected 'sbhd' under context"):
        call(module, inputs, packed_seq_params=PackedSeqParams(qkv_format="thd"))


@pytest.mark.parametrize("window_left", [None, 0, 5, 20, 100])
@pytest.mark.parametrize("s,keys", [(8, 8), (8, 9), (8, 40), (40, 48), (1, 30)])
def test_the_last_tokens_attend_as_in_the_whole_sequence(s, keys, window_left):
    q, k, v = random_qkv(keys, 2, 6, 2, 16)
    options = dict(window_left=window_left, softmax_scale=0.3)
    whole = windowed_attention(q, k, v, **options)[keys - s :]
    last = attend_to_prefix(q[keys - s :], k, v, **options)
    torch.testing.assert_close(last, whole, rtol=1e-5, atol=1e-6)
