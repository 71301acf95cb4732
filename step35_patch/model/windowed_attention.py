"""Causal attention on torch whose sliding windows cost s * window instead of s * s.

Masking s * s scores is what Megatron-Core's local attention does for a window. Here blocks of
queries meet only the band of keys that they can see, through `scaled_dot_product_attention`.

Shapes: s = queries = keys, b = batch, np = query heads, ng = key/value heads ("query groups"),
r = np / ng, hn = head dimension, t = tokens of a packed batch. Inside, g = b * ng: all pairs of a
sample and a key head.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


def windowed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window_left: int | None,
    softmax_scale: float,
    attention_mask: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """softmax(softmax_scale * q k^T) v over the keys that causality, window and mask leave.

    With a window, time and memory grow with s * window_left in forward and backward. Where torch
    has a fused kernel (all but dropout on the CPU), scores are not kept: memory grows with s alone,
    but for a mask that hides more than causality and window do, which takes about
    s * (window_left + 128) * np / ng numbers (s * s without a window).

    Args:
        query: [s, b, np, hn], floating point.
        key: [s, b, ng, hn] in the query's dtype; np is a multiple of ng, and query head h reads
            key head h // (np / ng).
        value: as key.
        window_left: query i sees keys j with 0 <= i - j <= window_left, so window_left + 1 keys.
            It is the left of window_size (left, 0) in Megatron-Core and flash-attention. None: all
            keys j <= i.
        softmax_scale: factor on the scores, usually hn ** -0.5.
        attention_mask: bool [1 or b, 1, s, s], True where a query may not see a key (the convention
            of Megatron-Core). A query that may see none gets zeros.
        dropout_p: share of the probabilities that are dropped, drawn from torch's generator of the
            query's device.

    Returns:
        [s, b, np * hn] in the query's dtype.

    Raises:
        ValueError: if shapes or the mask's dtype are not as above, or window_left is negative.
    """
    _check_inputs(query, key, value, window_left, attention_mask)
    if attention_mask is not None and attention_mask.size(0) > 1:
        # A mask for each sample would have to be repeated for each head to run as one batch.
        # split, not indexing: its backward is one concatenation.
        samples = zip(
            query.split(1, dim=1),
            key.split(1, dim=1),
            value.split(1, dim=1),
            attention_mask.split(1),
            strict=True,
        )
        outputs = [
            windowed_attention(
                q,
                k,
                v,
                window_left=window_left,
                softmax_scale=softmax_scale,
                attention_mask=mask,
                dropout_p=dropout_p,
            )
            for q, k, v, mask in samples
        ]
        return torch.cat(outputs, dim=1)

    s, b, num_heads, hn = query.shape
    g = b * key.size(2)
    q = query.reshape(s, g, -1, hn)
    k, v = key.reshape(s, g, hn), value.reshape(s, g, hn)
    mask = None if attention_mask is None else attention_mask[0, 0]
    if window_left is None or window_left >= s - 1:
        out = _causal(q, k, v, mask, softmax_scale, dropout_p)
    else:
        # The first W queries see all keys before them, the others a full window of W.
        window = window_left + 1
        q_first, q_rest = q.split([window, s - window])
        first_mask = None if mask is None else mask[:window, :window]
        first = _causal(q_first, k[:window], v[:window], first_mask, softmax_scale, dropout_p)
        rest = _banded(q_rest, k, v, window, mask, softmax_scale, dropout_p)
        out = torch.cat([first, rest])
    return out.reshape(s, b, num_heads * hn)


def attend_to_prefix(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    window_left: int | None,
    softmax_scale: float,
    attention_mask: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """`windowed_attention` of the last tokens of a sequence to all of them.

    With a window, as costly as windowed_attention of s + window_left tokens, of which one token
    alone takes the last row. With an attention_mask, and without a window, s * keys numbers are
    kept; with both, s * (s + window_left).

    Args:
        query: [s, b, np, hn], of the last s tokens.
        key: [keys, b, ng, hn], of all tokens; keys >= s. Those that no query sees are not read.
        value: as key.
        window_left: as in `windowed_attention`.
        softmax_scale: as there.
        attention_mask: bool [1 or b, 1, s, keys], True where a query may not see a key. A query
            that may see none gets zeros.
        dropout_p: as in `windowed_attention`.

    Returns:
        [s, b, np * hn] in the query's dtype.
    """
    s, keys = query.size(0), key.size(0)
    seen = keys if window_left is None else min(keys, s + window_left)
    key, value = key[keys - seen :], value[keys - seen :]
    if attention_mask is None and (seen == s or (window_left is not None and s > 1)):
        # Tokens before the first query get one that is dropped.
        return windowed_attention(
            F.pad(query, (0, 0, 0, 0, 0, 0, seen - s, 0)),
            key,
            value,
            window_left=window_left,
            softmax_scale=softmax_scale,
            dropout_p=dropout_p,
        )[seen - s :]
    positions = torch.arange(seen, device=query.device)
    apart = positions[seen - s :, None] - positions
    visible = (apart >= 0) if window_left is None else (apart >= 0) & (apart <= window_left)
    visible = visible[None, None]
    if attention_mask is not None:
        visible = visible & ~attention_mask[..., keys - seen :]
    r = query.size(2) // key.size(2)
    if s == 1:
        # The heads of a group become rows, so that what may be a long cache is not repeated.
        q, k, v = query[0].unflatten(1, (-1, r)), key, value
    else:
        q = query.permute(1, 2, 0, 3)
        k, v = (x.repeat_interleave(r, dim=2) for x in (key, value))
    out = _attend(
        q,
        k.permute(1, 2, 0, 3),
        v.permute(1, 2, 0, 3),
        visible,
        softmax_scale,
        dropout_p,
        may_be_blind=attention_mask is not None,
    )
    if s == 1:
        return out.flatten(1).unsqueeze(0)
    return out.permute(2, 0, 1, 3).flatten(2)


def packed_windowed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    cu_seqlens: Tensor,
    cu_seqlens_padded: Tensor | None = None,
    window_left: int | None,
    softmax_scale: float,
    attention_mask: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """`windowed_attention` within each sequence of a packed batch ("thd").

    The lengths are read on the host: on a GPU each call waits for the device.

    Args:
        query: [t, np, hn].
        key: [t, ng, hn].
        value: as key.
        cu_seqlens: integer [n + 1], from 0: sequence i has cu_seqlens[i+1] - cu_seqlens[i] tokens
            (0 is allowed). Without padding it starts at token cu_seqlens[i].
        cu_seqlens_padded: integer [n + 1] from 0 to t: sequence i starts at token
            cu_seqlens_padded[i], and what is left up to the next start is padding.
        window_left: as in `windowed_attention`.
        softmax_scale: as there.
        attention_mask: bool [1, 1, t, t], True where a query may not see a key.
        dropout_p: as in `windowed_attention`.

    Returns:
        [t, np * hn] in the query's dtype; zeros for padding.

    Raises:
        ValueError: if the lengths don't fit t or each other, or the inputs don't.
    """
    t = query.size(0)
    as_batch = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
    _check_inputs(*as_batch, window_left, attention_mask)
    bounds = sequence_bounds(cu_seqlens, cu_seqlens_padded, t)
    # Alternately a sequence and its padding; split, because its backward is one concatenation.
    sizes = [size for _, length, slot in bounds for size in (length, slot - length)]
    pieces = [x.split(sizes) for x in (query, key, value)]
    outputs = []
    for i, (start, length, slot) in enumerate(bounds):
        if length:
            q, k, v = (piece[2 * i].unsqueeze(1) for piece in pieces)
            own = slice(start, start + length)
            out = windowed_attention(
                q,
                k,
                v,
                window_left=window_left,
                softmax_scale=softmax_scale,
                attention_mask=(None if attention_mask is None else attention_mask[..., own, own]),
                dropout_p=dropout_p,
            )
            outputs.append(out.squeeze(1))
        if slot > length:
            outputs.append(torch.zeros_like(pieces[0][2 * i + 1]).flatten(1))
    return torch.cat(outputs)


def _check_inputs(
    query: Tensor, key: Tensor, value: Tensor, window_left: int | None, mask: Tensor | None
) -> None:
    if query.dim() != 4 or key.dim() != 4:
        raise ValueError(
            "query and key: expected [s, b, heads, hn], or [t, heads, hn] if packed (shown with a "
            f"batch of 1), found {tuple(query.shape)} and {tuple(key.shape)}."
        )
    if key.shape != value.shape:
        raise ValueError(
            f"value: expected the shape of key, {tuple(key.shape)}, found {tuple(value.shape)}."
        )
    if query.shape[:2] != key.shape[:2] or query.size(-1) != key.size(-1):
        raise ValueError(
            f"key: expected length, batch and head dimension of the query, {tuple(query.shape)}, "
            f"found {tuple(key.shape)}. A KV cache or cross attention is not supported: this "
            "attention is for training and evaluating whole sequences."
        )
    if query.size(2) % key.size(2):
        raise ValueError(
            f"query: expected a multiple of key's {key.size(2)} heads, found {query.size(2)}."
        )
    if window_left is not None and window_left < 0:
        raise ValueError(
            f"window_left: expected None or at least 0, found {window_left}. Use None for full "
            "causal attention."
        )
    if mask is not None:
        s, b = query.shape[:2]
        if mask.dtype != torch.bool or mask.shape not in ((1, 1, s, s), (b, 1, s, s)):
            raise ValueError(
                f"attention_mask: expected torch.bool [1 or {b}, 1, {s}, {s}], True where masked, "
                f"found {mask.dtype} {list(mask.shape)}."
            )


def sequence_bounds(
    cu_seqlens: Tensor, cu_seqlens_padded: Tensor | None, tokens: int
) -> list[tuple[int, int, int]]:
    """(first token, length, length with padding) of each sequence of a packed batch."""
    ends = cu_seqlens.tolist()
    name, starts = "cu_seqlens", ends
    if cu_seqlens_padded is not None:
        name, starts = "cu_seqlens_padded", cu_seqlens_padded.tolist()
    if len(starts) != len(ends) or len(ends) < 2:
        raise ValueError(
            "cu_seqlens and cu_seqlens_padded: expected the same number of entries, two or more, "
            f"found {len(ends)} and {len(starts)}."
        )
    lengths = [after - before for before, after in pairwise(ends)]
    slots = [after - before for before, after in pairwise(starts)]
    if starts[0] or ends[0] or starts[-1] != tokens or min(lengths + slots) < 0:
        raise ValueError(
            f"{name}: expected sums of sequence lengths, growing from 0 to the {tokens} tokens of "
            f"the batch, found {starts}. Give tokens at the end a sequence of their own."
        )
    for i, (length, slot) in enumerate(zip(lengths, slots, strict=True)):
        if length > slot:
            raise ValueError(
                f"cu_seqlens: expected at most {slot} tokens in sequence {i}, as many as "
                f"cu_seqlens_padded has room for, found {length}."
            )
    return list(zip(starts[:-1], lengths, slots, strict=True))


def _causal(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, softmax_scale: float, dropout_p: float
) -> Tensor:
    """Each query against all keys up to it: q [s, g, r, hn], k and v [s, g, hn], mask [s, s]."""
    visible = None
    # Megatron-Core's data loader hands out the plain causal mask. Noticing that it hides no key
    # that causality leaves halves the work, and saves the s * s floats that SDPA makes of a mask.
    if mask is not None and mask.tril().any():
        visible = (~mask).tril()[None, None]
    r = q.size(2)
    out = _attend(
        q.permute(1, 2, 0, 3),
        # Repeated by stride, not copied. SDPA's enable_gqa would do, but was slower on the CPU and
        # is unknown to the only fused CUDA kernel that takes fp32.
        k.unsqueeze(2).expand(-1, -1, r, -1).permute(1, 2, 0, 3),
        v.unsqueeze(2).expand(-1, -1, r, -1).permute(1, 2, 0, 3),
        visible,
        softmax_scale,
        dropout_p,
        may_be_blind=visible is not None,
    )
    return out.permute(2, 0, 1, 3)


def _banded(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    mask: Tensor | None,
    softmax_scale: float,
    dropout_p: float,
) -> Tensor:
    """All queries but the first `window`, each against itself and the window - 1 keys before it.

    The queries are cut into n blocks, and each block meets the window + block keys that it can see
    as one entry of a batch. Blocks share keys, so the bands overlap. `Tensor.unfold` gives them as
    one view, without a copy, and its backward adds all bands in one pass; slicing them one by one
    would make autograd allocate a gradient of full length for every slice. The r query heads of a
    key head become rows of its block, so that keys are neither repeated nor their gradients.

    Args:
        q: [s - window, g, r, hn].
        k: [s, g, hn].
        v: as k.
        window: keys that a query sees, itself included.
        mask: [s, s], of which only the bands are read.
        softmax_scale: factor on the scores.
        dropout_p: share of the probabilities that are dropped.

    Returns:
        [s - window, g, r, hn].
    """
    rows, _, r, _ = q.shape
    block = _block_size(window, r, q.device)
    n = -(-rows // block)
    tail = n * block - rows
    if tail:  # later than every real query, so that none sees the keys
        q = F.pad(q, (0, 0, 0, 0, 0, 0, 0, tail))
        k, v = (F.pad(x, (0, 0, 0, 0, 0, tail)) for x in (k, v))
    q = q.unflatten(0, (n, block)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # [n, g, r * block, hn]
    k, v = (x.unfold(0, window + block, block).transpose(2, 3) for x in (k, v))

    # Query i of a block and key j of its band are i + window - j apart.
    i = torch.arange(block, device=q.device).unsqueeze(1)
    j = torch.arange(window + block, device=q.device)
    visible = ((i < j) & (j <= i + window)).unsqueeze(0)  # [1 or n, block, window + block]
    may_be_blind = False
    if mask is not None:
        hidden = _mask_bands(mask, n, block, window)
        if (hidden & visible).any():
            may_be_blind, visible = True, visible & ~hidden
    visible = visible[:, None, None].expand(-1, -1, r, -1, -1).flatten(2, 3)

    out = _attend(q, k, v, visible, softmax_scale, dropout_p, may_be_blind=may_be_blind)
    by_query: Tensor = out.unflatten(2, (r, block)).permute(0, 3, 1, 2, 4).flatten(0, 1)
    return by_query[:rows]


def _block_size(window: int, heads: int, device: torch.device) -> int:
    """Queries in a block, of `heads` query heads to a key head.

    A query computes block + window scores, so small blocks waste less, but read keys and add up
    their gradients more often, which many heads share. On a CPU, for a window of 512 and heads of
    64 and 128, 64 was best from 12 heads on, 128 with few (fp32 and bf16), and 32 to 64 for windows
    of 5 to 128.
    On a GPU 128 makes the band of the published window 640 keys long, a multiple of 128: with a
    mask and other lengths, cuDNN's backward pass has returned NaN (pytorch issue 196678).
    """
    largest = 64 if device.type == "cpu" and heads >= 12 else 128
    return min(largest, max(32, window // 16 * 8))


def _mask_bands(mask: Tensor, n: int, block: int, window: int) -> Tensor:
    """The parts of an [s, s] mask for n blocks and their bands: [n, block, window + block]."""
    bands = mask.new_zeros(n, block, window + block)
    for c in range(n):
        start = c * block
        band = mask[start + window : start + window + block, start : start + window + block]
        bands[c, : band.size(0), : band.size(1)] = band
    return bands


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor | None,
    softmax_scale: float,
    dropout_p: float,
    *,
    may_be_blind: bool = False,
) -> Tensor:
    """SDPA with q [n, h, rows, hn]; visible is bool [1 or n, 1, rows, keys], or None for causal.

    A query that sees no key at all is possible only with `may_be_blind`: it gets zeros. What SDPA
    makes of it is not documented, and kernels for CUDA have returned NaN. So it gets to see every
    key, and its output is overwritten, which stops its gradient too.
    """
    blind = None
    if visible is not None and may_be_blind:
        blind = ~visible.any(-1, keepdim=True)
        visible = visible | blind
    out: Tensor = F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=visible,
        is_causal=visible is None,
        scale=softmax_scale,
        dropout_p=dropout_p,
    )
    if blind is not None:
        out = out.masked_fill(blind, 0.0)
    return out
