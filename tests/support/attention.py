"""Attention by all of its scores, random inputs for it, and the comparison with ours."""

import torch

from step35_patch.model.windowed_attention import packed_windowed_attention, windowed_attention
from support.figures import record


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
    for name, ours, exact in zip(names, found, with_gradients(reference, doubles), strict=True):
        assert ours.isfinite().all(), name
        # clamp: a softmax over a single key has no gradient but rounding.
        error = (ours.double() - exact).abs().max() / exact.abs().max().clamp(min=1.0)
        assert error < tolerance, f"{name}: {error:.1e}"
        record(f"attention in {str(ours.dtype).removeprefix('torch.')}", error.item())


def ours(window_left, mask=None, hn=16):
    return lambda q, k, v: windowed_attention(
        q, k, v, window_left=window_left, softmax_scale=hn**-0.5, attention_mask=mask
    )


def causal_mask(s):
    return torch.ones(s, s, dtype=torch.bool).triu(1)[None, None]


def document_mask(s, *lengths):
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    assert len(document) == s
    return causal_mask(s) | (document.unsqueeze(1) != document)


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
