"""Which keys and values context-parallel ranks fetch from each other, and the fetching.

A document of length L in a slot of S tokens (S = L if nothing is padded) is cut into 2N chunks of
S / 2N tokens for N ranks; rank r has chunks r and 2N - 1 - r. A rank's tokens are, document after
document, its early and its late chunk, as Megatron-Core and Transformer Engine deal them out. A
whole sequence is one document.

A chunk's queries see tokens before it: all of the document's without a window, else the
`window_left` ones before the chunk. Every rank can tell which rows that makes for every rank, so
that one all-to-all brings each rank the rows that it lacks, and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from megatron.core import tensor_parallel
from torch import Tensor
from torch.distributed import ProcessGroup

# (tokens, tokens with the padding behind them) of a document.
Document = tuple[int, int]

# Full and sliding layers of the micro-batches that a pipeline has in flight.
_PLANS_KEPT = 64


@dataclass(frozen=True)
class Chunk:
    """A chunk on this rank.

    Args:
        queries: its tokens that are no padding; they come first.
        keys: tokens of the document that they see, which end with the last query; 0 if there are no
            queries.
        padding: its other tokens.
    """

    queries: int
    keys: int
    padding: int


@dataclass(frozen=True)
class Plan:
    """What one rank sends, receives and attends to. Rows are its own tokens, then the fetched ones.

    Args:
        chunks: in the order of the rank's tokens, two of each document.
        sent: own rows, by the rank that gets them.
        send_counts: how many each rank gets.
        receive_counts: how many come from each rank.
        keys: the rows of all chunks' keys, one chunk after the other.
    """

    chunks: tuple[Chunk, ...]
    sent: Tensor
    send_counts: list[int]
    receive_counts: list[int]
    keys: Tensor


def documents_of(bounds: list[tuple[int, int, int]], size: int) -> tuple[Document, ...]:
    """The documents of a packed batch, for `size` ranks.

    Args:
        bounds: (first token, length, length with padding) of each.
        size: of the context-parallel group.

    Raises:
        ValueError: a document can't be cut into 2 * size chunks of one length.
    """
    for number, (_, _, slot) in enumerate(bounds):
        if slot % (2 * size):
            raise ValueError(
                "cu_seqlens_q_padded (cu_seqlens_q without it): expected a multiple of "
                f"2 * context_parallel_size = {2 * size} tokens in each document, found {slot} in "
                f"document {number}. Pad each document, and give the padded sums as "
                "cu_seqlens_q_padded, or use --context-parallel-size 1."
            )
    return tuple((length, slot) for _, length, slot in bounds)


@lru_cache(maxsize=_PLANS_KEPT)
def plan(
    documents: tuple[Document, ...], rank: int, size: int, window_left: int | None, device: str
) -> Plan:
    """The plan of a rank.

    Args:
        documents: each slot is a multiple of 2 * size.
        rank: in the context-parallel group.
        size: of that group.
        window_left: as in `step35_patch.model.windowed_attention.windowed_attention`.
        device: of the plan's tensors.
    """
    tokens = sum(slot for _, slot in documents)
    # Tokens are numbered as they lie in the batch that is not cut.
    owned = [_owned(documents, owner, size) for owner in range(size)]
    owners, rows = torch.empty(2, tokens, dtype=torch.long)
    for owner, own in enumerate(owned):
        owners[own], rows[own] = owner, torch.arange(len(own))

    sent, received = [], []
    for reader in range(size):
        seen = torch.zeros(tokens, dtype=torch.bool)
        for first, end, _ in _seen(documents, reader, size, window_left):
            seen[first:end] = True
        if reader == rank:
            fetched = [(seen & (owners == owner)).nonzero()[:, 0] for owner in range(size)]
            fetched[rank] = fetched[rank][:0]
            received = fetched
            sent.append(fetched[rank])
        else:
            sent.append(rows[(seen & (owners == rank)).nonzero()[:, 0]])

    here = torch.cat([owned[rank], *received])
    place = torch.empty(tokens, dtype=torch.long)
    place[here] = torch.arange(len(here))
    chunks = _seen(documents, rank, size, window_left)
    keys = torch.cat([place[first:end] for first, end, _ in chunks])
    return Plan(
        tuple(
            Chunk(queries, end - first, chunk - queries)
            for (first, end, queries), chunk in zip(
                chunks, [slot // (2 * size) for _, slot in documents for _ in range(2)], strict=True
            )
        ),
        torch.cat(sent).to(device),
        [len(part) for part in sent],
        [len(part) for part in received],
        keys.to(device),
    )


def fetch(key: Tensor, value: Tensor, plan: Plan, group: ProcessGroup) -> list[tuple[Tensor, ...]]:
    """The keys and values that each chunk of this rank sees, in its document's order.

    In the backward pass the gradients of fetched rows go back to the ranks that have them.

    Args:
        key: [tokens of this rank, ...].
        value: as key.
        plan: of this rank.
        group: the context-parallel group.

    Returns:
        For each chunk of the plan (key, value), [its keys, ...].
    """
    # One tensor, so that they travel together.
    own = torch.stack([key, value], dim=1)
    fetched = tensor_parallel.all_to_all(
        group, own[plan.sent], plan.receive_counts, plan.send_counts
    )
    rows = torch.cat([own, fetched])[plan.keys]
    # split, because its backward is one concatenation.
    return [part.unbind(1) for part in rows.split([chunk.keys for chunk in plan.chunks])]


def _chunks(rank: int, size: int) -> tuple[int, int]:
    return rank, 2 * size - 1 - rank


def _owned(documents: tuple[Document, ...], rank: int, size: int) -> Tensor:
    """The tokens that a rank has, in its order."""
    parts, start = [], 0
    for _, slot in documents:
        chunk = slot // (2 * size)
        for number in _chunks(rank, size):
            first = start + number * chunk
            parts.append(torch.arange(first, first + chunk))
        start += slot
    return torch.cat(parts)


def _seen(
    documents: tuple[Document, ...], rank: int, size: int, window_left: int | None
) -> list[tuple[int, int, int]]:
    """For each chunk of a rank: the tokens that its queries see, (first, end), and the queries."""
    seen, start = [], 0
    for length, slot in documents:
        chunk = slot // (2 * size)
        for number in _chunks(rank, size):
            first = number * chunk
            queries = max(0, min(chunk, length - first))
            visible = 0 if window_left is None else max(0, first - window_left)
            if queries:
                seen.append((start + visible, start + first + queries, queries))
            else:
                seen.append((start, start, 0))
        start += slot
    return seen
