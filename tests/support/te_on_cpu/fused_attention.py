"""cuDNN's attention, which `install(cudnn=True)` offers.

Then Transformer Engine takes its FusedAttention backend, the only one here that knows context
parallelism (its unfused torch backend does not, and flash-attn is absent). fp32 is let in besides
fp16 and bf16. Refused, with a reason, by `get_fused_attn_backend`: dropout, bias, other softmaxes
than the plain one, FP8, and layouts with q, k and v interleaved.

Shapes: s, b, t sequence, batch, packed tokens; h, g heads of queries and of keys; d channels.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import textwrap
from collections.abc import Iterator

import torch
from torch import Tensor

from support.te_on_cpu import ring
from support.te_on_cpu.extension import CONTENTS, TORCH_DTYPES, kernel, plain, refuse

# Whether Transformer Engine finds it.
offered = False


def offer() -> None:
    """Let Transformer Engine, which is imported, find cuDNN's attention, for fp32 too."""
    global offered
    offered = True
    let_fp32_in()
    ring.wait_once()


@functools.cache
def let_fp32_in() -> None:
    """Let Transformer Engine's FusedAttention take fp32, which no kernel of a GPU does."""
    from transformer_engine.pytorch.attention.dot_product_attention import backends, utils

    original = utils.get_attention_backend

    def get_attention_backend(attention_params=None):
        if attention_params.qkv_dtype == torch.float32:
            attention_params = dataclasses.replace(attention_params, qkv_dtype=torch.bfloat16)
        return original(attention_params)

    utils.get_attention_backend = get_attention_backend
    # The one line that is changed in Transformer Engine's text: an assertion on the dtype.
    source = textwrap.dedent(inspect.getsource(backends.FusedAttention.forward))
    old, new = "[torch.float16, torch.bfloat16]", "[torch.float16, torch.bfloat16, torch.float32]"
    if source.count(old) != 1:
        raise RuntimeError(
            f"FusedAttention.forward: expected {old} once, found {source.count(old)}"
        )
    names: dict = {}
    exec(compile(source.replace(old, new), backends.__file__, "exec"), vars(backends), names)
    backends.FusedAttention.forward = names["forward"]


@kernel
def get_fused_attn_backend(p):
    """(backend, reason) for the attributes of csrc/extensions/attention.cpp."""
    backends = CONTENTS["NVTE_Fused_Attn_Backend"]
    if not offered:
        return backends.NVTE_No_Backend, "te_on_cpu has no cuDNN: install(cudnn=True)"
    layout = _formats(p.qkv_layout)
    reasons = {
        "FP8": int(p.qkv_dtype) not in TORCH_DTYPES,
        "dropout": p.dropout != 0,
        "a bias": p.bias_type.name != "NVTE_NO_BIAS",
        "that softmax": p.softmax_type.name != "NVTE_VANILLA_SOFTMAX",
        "the largest logit": p.return_max_logit,
        f"layout {p.qkv_layout.name}": layout is None,
        "other head dimensions of v": p.head_dim_qk != p.head_dim_v,
    }
    refused = [reason for reason, applies in reasons.items() if applies]
    if refused:
        return backends.NVTE_No_Backend, f"te_on_cpu does not know {', '.join(refused)}"
    return backends.NVTE_F16_arbitrary_seqlen, ""


def _formats(layout) -> tuple[str, str] | None:
    """("sbhd", "sbhd") of NVTE_SBHD_SBHD_SBHD; None for interleaved ones."""
    parts = layout.name.removeprefix("NVTE_").lower().split("_")
    known = len(parts) == 3 and parts[1] == parts[2] and {*parts} <= {"sbhd", "bshd", "thd"}
    return (parts[0], parts[1]) if known else None


def _slices(x: Tensor, layout: str, padding: bool, cu: Tensor, cu_padded: Tensor | None):
    """Views [s, h, d] of the sequences of x; with padding (or thd) without the padding."""
    lengths = (cu[1:] - cu[:-1]).tolist()
    if layout == "thd":
        starts = (cu if cu_padded is None else cu_padded).tolist()
        return [x[start : start + n] for start, n in zip(starts[:-1], lengths, strict=True)]
    sequences = x.unbind(1 if layout == "sbhd" else 0)
    return [s[:n] for s, n in zip(sequences, lengths, strict=True)] if padding else list(sequences)


def _visible(sq: int, sk: int, mask: str, window, bottom_right: bool) -> Tensor:
    """[sq, sk], True where a query sees a key.

    The window's diagonal may be another than causality's.
    """
    i, j = torch.arange(sq)[:, None], torch.arange(sk)
    seen = torch.ones(sq, sk, dtype=torch.bool)
    if "CAUSAL" in mask:
        seen &= j <= i + (sk - sq if "BOTTOM_RIGHT" in mask else 0)
    apart = j - i - (sk - sq if bottom_right else 0)
    left, right = window
    if left >= 0:
        seen &= apart >= -left
    if right >= 0:
        seen &= apart <= right
    return seen


def _heads(x: Tensor, repeat: int = 1) -> Tensor:
    """[s, g, d] -> [g * repeat, s, d] in fp32."""
    return x.transpose(0, 1).float().repeat_interleave(repeat, 0)


def _stats_of(stats: Tensor, layout: str, i: int, q: Tensor, start: int) -> Tensor:
    """The part [h, sq] of the log-sum-exp that belongs to sequence i: [t, h, 1] or [b, h, s, 1]."""
    if layout == "thd":
        return stats[start : start + q.shape[0], :, 0].T
    return stats[i, :, : q.shape[0], 0]


def _check_longest(layout: tuple[str, str], cu_q, max_seqlen_q, cu_kv, max_seqlen_kv) -> None:
    """A kernel leaves out what is beyond the longest sequence that it is told of."""
    for form, cu, longest in zip(layout, (cu_q, cu_kv), (max_seqlen_q, max_seqlen_kv), strict=True):
        assert form != "thd" or cu.diff().max() <= longest, (cu, longest)


def _sequences(layout, mask_type, q, k, v, cu_q, cu_kv, cu_q_padded, cu_kv_padded) -> Iterator:
    q_format, kv_format = layout
    padding = "PADDING" in mask_type.name
    starts = (cu_q if cu_q_padded is None else cu_q_padded).tolist()
    qs = _slices(q, q_format, padding, cu_q, cu_q_padded)
    ks, vs = (_slices(x, kv_format, padding, cu_kv, cu_kv_padded) for x in (k, v))
    for i, (qi, ki, vi) in enumerate(zip(qs, ks, vs, strict=True)):
        yield i, starts[i], qi, ki, vi


@kernel
def fused_attn_fwd(
    max_seqlen_q, max_seqlen_kv, is_training, attn_scale, dropout, set_zero, qkv_layout, o_format,
    qkv_scale_inv_format, bias_type, mask_type, softmax_type, window, bottom_right, cu_q, cu_kv,
    q, k, v, fake_dtype, cu_q_padded, cu_kv_padded, page_table_k, page_table_v, s_quantizer,
    o_quantizer, bias, softmax_offset, rng_gen, rng_elts_per_thread, return_max_logit, cuda_graph,
):  # fmt: skip
    """Returns (o, log-sum-exp, state of the generator)."""
    layout = _formats(qkv_layout)
    refuse(f"fused_attn_fwd of {qkv_layout.name}", layout is not None)
    unused = (bias, softmax_offset, page_table_k)
    simple = all(x is None for x in unused) and dropout == 0 and not return_max_logit
    refuse("fused_attn_fwd with these options", simple)
    refuse("fused_attn_fwd with FP8", s_quantizer is None and o_quantizer is None)
    assert o_format.name == f"NVTE_{layout[0].upper()}", (o_format, layout)
    q, k, v = (plain(x, "fused_attn_fwd's input") for x in (q, k, v))
    out = torch.zeros(q.shape, dtype=q.dtype)
    heads = q.shape[-2]
    if layout[0] == "thd":
        stats = torch.zeros(q.shape[0], heads, 1)
    else:
        batch = q.shape[1 if layout[0] == "sbhd" else 0]
        stats = torch.zeros(batch, heads, max_seqlen_q, 1)
    _check_longest(layout, cu_q, max_seqlen_q, cu_kv, max_seqlen_kv)
    sequences = _sequences(layout, mask_type, q, k, v, cu_q, cu_kv, cu_q_padded, cu_kv_padded)
    outs = _slices(out, layout[0], "PADDING" in mask_type.name, cu_q, cu_q_padded)
    for i, start, qi, ki, vi in sequences:
        repeat = heads // ki.shape[1]
        scores = _heads(qi) @ _heads(ki, repeat).transpose(1, 2) * attn_scale
        seen = _visible(qi.shape[0], ki.shape[0], mask_type.name, window, bottom_right)
        lse = scores.masked_fill_(~seen, float("-inf")).logsumexp(-1)
        p = (scores - lse.masked_fill(lse.isinf(), 0)[..., None]).exp()
        outs[i].copy_((p @ _heads(vi, repeat)).transpose(0, 1))
        _stats_of(stats, layout[0], i, qi, start).copy_(lse)
    return [out, stats, torch.zeros(2, dtype=torch.int64)]


@kernel
def fused_attn_bwd(
    max_seqlen_q, max_seqlen_kv, attn_scale, dropout, set_zero, qkv_layout, o_format, do_format,
    dqkv_layout, qkv_scale_inv_format, do_scale_inv_format, bias_type, mask_type, softmax_type,
    window, bottom_right, deterministic, cu_q, cu_kv, q, k, v, o, d_o, fake_dtype, aux,
    cu_q_padded, cu_kv_padded, s_quantizer, dp_quantizer, dqkv_quantizer, cuda_graph,
):  # fmt: skip
    """Returns (dq, dk, dv, None, None) from the given o and log-sum-exp, which under context
    parallelism are those of all steps."""
    layout = _formats(qkv_layout)
    same = layout is not None and dqkv_layout == qkv_layout and do_format == o_format
    refuse(f"fused_attn_bwd of {qkv_layout.name}", same)
    refuse("fused_attn_bwd with dropout or FP8", dropout == 0 and dqkv_quantizer is None)
    padding = "PADDING" in mask_type.name
    grads = [torch.zeros(x.shape, dtype=x.dtype) for x in (q, k, v)]
    bounds = [(cu_q, cu_q_padded), (cu_kv, cu_kv_padded), (cu_kv, cu_kv_padded)]
    parts = [
        _slices(g, form, padding, *b)
        for g, form, b in zip(grads, (*layout, layout[1]), bounds, strict=True)
    ]
    os, dos = (_slices(x, layout[0], padding, cu_q, cu_q_padded) for x in (o, d_o))
    _check_longest(layout, cu_q, max_seqlen_q, cu_kv, max_seqlen_kv)
    sequences = _sequences(layout, mask_type, q, k, v, cu_q, cu_kv, cu_q_padded, cu_kv_padded)
    for i, start, qi, ki, vi in sequences:
        groups = ki.shape[1]
        repeat = qi.shape[1] // groups
        q32, k32, v32, do = _heads(qi), _heads(ki, repeat), _heads(vi, repeat), _heads(dos[i])
        lse = _stats_of(aux[0], layout[0], i, qi, start)
        seen = _visible(qi.shape[0], ki.shape[0], mask_type.name, window, bottom_right)
        scores = q32 @ k32.transpose(1, 2) * attn_scale
        p = (scores - lse[..., None]).exp().masked_fill(~seen, 0)
        dp = do @ v32.transpose(1, 2) - (do * _heads(os[i])).sum(-1, keepdim=True)
        ds = p * dp * attn_scale
        by_head = ds.transpose(1, 2) @ q32, p.transpose(1, 2) @ do
        dk, dv = (x.unflatten(0, (groups, repeat)).sum(1) for x in by_head)
        for part, value in zip(parts, (ds @ k32, dk, dv), strict=True):
            part[i].copy_(value.transpose(0, 1))
    return [*grads, None, None]
