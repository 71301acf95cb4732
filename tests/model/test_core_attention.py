"""Core attention as Megatron-Core builds and calls it."""

import pytest
import torch
from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from support.attention import (
    assert_exact,
    document_mask,
    naive,
    naive_packed,
    random_packed,
    random_qkv,
    with_gradients,
)
from torch.utils.checkpoint import checkpoint

from step35_patch.model.core_attention import Step35DotProductAttention
from step35_patch.model.windowed_attention import windowed_attention

pytestmark = pytest.mark.megatron


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


@pytest.mark.parametrize(("window_size", "window_left"), [(None, None), ((20, 0), 20), ([7, 0], 7)])
def test_the_module_reads_its_layers_window(window_size, window_left):
    module = attention(window_size=window_size)
    mask = document_mask(100, 60, 40)
    for given in (None, mask):
        assert_exact(
            lambda q, k, v, mask=given: call(module, (q, k, v), mask, AttnMaskType.causal),
            lambda q, k, v, mask=given: naive(q, k, v, window_left, mask),
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
        assert_exact(
            lambda *x, module=module: call(module, x),
            lambda *x, scale=scale: naive(*x, 20, scale=scale),
            inputs,
        )


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
            lambda *x, kind=mask_type: call(
                attention(), x, mask_type=kind, packed_seq_params=params
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


def test_the_last_tokens_of_a_sequence_alone():
    """Keys that the window hides may be left out, while the mask has columns for all."""
    q, k, v = random_qkv(50, 1, 4, 2, 16)
    mask = document_mask(50, 20, 30)
    kind = AttnMaskType.causal_bottom_right
    for given in (None, mask):
        whole = call(attention(), (q, k, v), given)[-5:]
        own = None if given is None else given[:, :, -5:]
        for keys in (50, 25):
            last = call(attention(), (q[-5:], k[-keys:], v[-keys:]), own, kind)
            torch.testing.assert_close(last, whole, rtol=1e-5, atol=1e-6)


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
    for a, b in zip(kept, with_gradients(recomputed, inputs), strict=True):
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
    ("changes", "message"),
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
    ("arguments", "message"),
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
            r"local_cp_size and cp_group: expected None, .* found 2",
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
    with pytest.raises(ValueError, match=r"attn_mask_type: .*found causal_bottom_right"):
        call(module, inputs, mask_type=AttnMaskType.causal_bottom_right)
    with pytest.raises(ValueError, match=r"attention_mask: .*no-create-attention-mask"):
        call(module, inputs, mask=torch.zeros(1, 1, 8, 32, dtype=torch.bool))
    bounds = torch.tensor([0, 12, 32], dtype=torch.int32)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds)
    with pytest.raises(
        ValueError, match=r"expected a multiple of .* = 8 .* found 12 in document 0"
    ):
        call(module, [x.squeeze(1) for x in inputs], packed_seq_params=packed)
