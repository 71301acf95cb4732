"""Bytes that a layer's keys and values travel under context parallelism on torch.

Compared, for the rank that receives most: what `Step35DotProductAttention` fetches (the rows that
a rank's queries see and that it lacks), and gathering all of them, which each rank would do with
Megatron-Core's `gather_from_sequence_parallel_region`. Counted in the forward pass; the backward
pass sends the gradients of the same rows back.

Rows with `counted` True are of a real run: processes with gloo, forward and backward, in which the
bytes that are handed to torch.distributed for other ranks are counted. The others, of the
published shapes, are calculated by the plan that these runs follow.

Nothing is timed, and nothing here is about Transformer Engine, which sends in its own ways.

    python benchmarks/context_parallel.py            # a minute; writes results/context_parallel.csv
    python benchmarks/context_parallel.py --quick    # one run of processes only; writes no file
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import paired
import torch

RESULTS = paired.RESULTS / "context_parallel.csv"
GROUPS, HEAD_DIM, WINDOW = 8, 128, 512
# Of keys and values of one token: bf16 where it is calculated, fp32 where it is run.
BF16, FP32 = (2 * GROUPS * HEAD_DIM * size for size in (2, 4))
# (tokens, ranks, length of a document)
PUBLISHED = ((131072, 8, 131072), (131072, 8, 4096), (131072, 2, 131072), (8192, 2, 8192))
RUNS = ((4096, 2, 4096), (4096, 4, 4096), (4096, 4, 1024))


def fetched_rows(tokens: int, ranks: int, document: int, window: int | None) -> int:
    """What the rank that receives most receives."""
    from step35_patch.model.context_parallel import plan

    documents = ((document, document),) * (tokens // document)
    left = None if window is None else window - 1
    return max(
        sum(plan(documents, rank, ranks, left, "cpu").receive_counts) for rank in range(ranks)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Count bytes; see the docstring.")
    parser.add_argument("--quick", action="store_true", help="one run of processes; no file")
    quick = parser.parse_args().quick

    from step35_patch import cpu

    cpu.install()
    about = paired.about("megatron-core", threads=1)
    rows = [about | row for row in (*_calculated(), *_counted(RUNS[:1] if quick else RUNS))]
    if not quick:
        paired.write(RESULTS, rows)
    for row in rows:
        print(*row.values())


def _calculated() -> Iterator[dict[str, Any]]:
    for tokens, ranks, document in PUBLISHED:
        for window in (WINDOW, None):
            fetched = fetched_rows(tokens, ranks, document, window) * BF16
            yield _row(tokens, ranks, document, window, False, fetched, BF16)


def _counted(runs: Iterable[tuple[int, int, int]]) -> Iterator[dict[str, Any]]:
    for tokens, ranks, document in runs:
        for window in (WINDOW, None):
            context = torch.multiprocessing.get_context("spawn")
            queue = context.Queue()
            port = 29000 + torch.randint(900, ()).item()
            processes = [
                context.Process(
                    target=_rank, args=(r, ranks, port, tokens, document, window, queue)
                )
                for r in range(ranks)
            ]
            for process in processes:
                process.start()
            counts = [queue.get(timeout=300) for _ in processes]
            for process in processes:
                process.join()
            forward = max(received for received, _ in counts)
            # Each rank sends back what it has fetched.
            assert forward == max(sent_back for _, sent_back in counts)
            assert forward == fetched_rows(tokens, ranks, document, window) * FP32
            yield _row(tokens, ranks, document, window, True, forward, FP32)


def _rank(
    rank: int, ranks: int, port: int, tokens: int, document: int, window: int | None, queue: Any
) -> None:
    from step35_patch import cpu

    cpu.install()
    from megatron.core.packed_seq_params import PackedSeqParams
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from step35_patch.model.core_attention import Step35DotProductAttention

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks
    )
    received: list[int] = []
    sent: list[int] = []
    all_to_all = torch.distributed.all_to_all_single

    def counting(output: Any, given: Any, *, group: Any, **splits: Any) -> Any:
        for sums, tensor, name in (
            (received, output, "output_split_sizes"),
            (sent, given, "input_split_sizes"),
        ):
            own = splits[name][rank]
            sums.append((len(tensor) - own) * tensor[:1].nbytes)
        return all_to_all(output, given, group=group, **splits)

    torch.distributed.all_to_all_single = counting
    config = TransformerConfig(
        num_layers=1,
        hidden_size=GROUPS * HEAD_DIM,
        num_attention_heads=GROUPS,
        context_parallel_size=ranks,
        window_size=None if window is None else (window - 1, 0),
        attention_dropout=0.0,
    )
    groups = SimpleNamespace(cp=torch.distributed.group.WORLD)
    module = Step35DotProductAttention(config, 1, AttnMaskType.causal, "self", pg_collection=groups)
    shape = (tokens // ranks, GROUPS, HEAD_DIM)
    query, key, value = (torch.randn(shape, requires_grad=True) for _ in range(3))
    bounds = torch.arange(0, tokens + 1, document, dtype=torch.int32)
    packed = PackedSeqParams(qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds)
    module(query, key, value, None, packed_seq_params=packed).sum().backward()
    queue.put((received[0], sent[1]))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _row(
    tokens: int,
    ranks: int,
    document: int,
    window: int | None,
    counted: bool,
    fetched: int,
    size: int,
) -> dict[str, Any]:
    gathered = (tokens - tokens // ranks) * size
    return {
        "tokens": tokens,
        "context_parallel_size": ranks,
        "document": document,
        "window": "none" if window is None else window,
        "counted": counted,
        "fetched_bytes": fetched,
        "gathered_bytes": gathered,
        "gathered_over_fetched": f"{gathered / fetched:.2f}",
    }


if __name__ == "__main__":
    main()
