"""What context parallelism by "p2p" asks of torch.distributed and gloo does not do.

In its backward pass Transformer Engine waits twice for the same sends and receives: at the end of a
step, and at the start of the next one. With NCCL the second wait returns at once. With gloo it is
for another message, which never comes.
"""

from __future__ import annotations

import functools
from typing import Any

import torch


class _Request:
    """A send or receive that is waited for once."""

    def __init__(self, work: torch.distributed.Work):
        self.work: torch.distributed.Work | None = work

    def wait(self) -> None:
        work, self.work = self.work, None
        if work is not None:
            work.wait()


@functools.cache
def wait_once() -> None:
    """Let Transformer Engine, which is imported, wait for its sends and receives once each."""
    from transformer_engine.pytorch.attention.dot_product_attention import context_parallel

    original = context_parallel.flash_attn_p2p_communicate

    def flash_attn_p2p_communicate(*args: Any) -> list[_Request]:
        return [_Request(work) for work in original(*args)]

    context_parallel.flash_attn_p2p_communicate = flash_attn_p2p_communicate
