"""When a pipeline rank runs which forward and backward pass, in Megatron-Core's schedules."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from step35_patch.costs.launch import Launch

# More micro-batches are in flight in no group than in the first of these.
_GROUPS = 6


class Pass(NamedTuple):
    """One pass of a micro-batch through one virtual stage.

    Attributes:
        is_forward: Forward, or backward.
        chunk: The virtual stage on this rank.
    """

    is_forward: bool
    chunk: int


def passes(launch: Launch, pp: int) -> Iterator[Pass]:
    """What pipeline rank `pp` does in a step, in its order; of many equal groups, a few.

    1F1B (`forward_backward_pipelining_without_interleaving`), and with virtual stages the
    interleaved schedule, of `get_pp_rank_microbatches` and `get_schedule_table`.
    """
    chunks = launch.virtual_pipeline_model_parallel_size or 1
    size = launch.pipeline_model_parallel_size
    group = launch.microbatch_group_size_per_vp_stage or size
    # In between, groups of micro-batches are alike.
    count = launch.num_microbatches
    count -= max(count // group - _GROUPS, 0) * group
    order = _order(count, chunks, group)
    behind = size - 1 - pp
    ahead = behind
    if chunks > 1:
        ahead = 2 * behind + (chunks - 1) * group
    ahead = min(ahead, len(order))
    for chunk in order[:ahead]:
        yield Pass(is_forward=True, chunk=chunk)
    for number, chunk in enumerate(order):
        if ahead + number < len(order):
            yield Pass(is_forward=True, chunk=order[ahead + number])
        yield Pass(is_forward=False, chunk=chunks - 1 - chunk)


def _order(num_microbatches: int, chunks: int, group: int) -> list[int]:
    """The virtual stages of all forward passes."""
    order: list[int] = []
    for first in range(0, num_microbatches, group):
        # What is left at the end is no group of its own, but a smaller one.
        for chunk in range(chunks):
            order += [chunk] * min(group, num_microbatches - first)
    return order


def held(launch: Launch, pp: int) -> float:
    """Forward passes that are done ahead of their backward on a rank, at most, in micro-batches."""
    ahead = most = 0
    for one in passes(launch, pp):
        ahead += 1 if one.is_forward else -1
        most = max(most, ahead)
    return most / (launch.virtual_pipeline_model_parallel_size or 1)
