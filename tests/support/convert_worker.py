"""One rank of tests/convert/test_convert_layouts.py: a converted checkpoint through Megatron-Core.

Loads a release with Megatron-Core's dist_checkpointing into a model under a layout, compares its
logits on the tokens of seed 1 with those in a file, and saves it again with Megatron-Core.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from support import distributed_worker

# isort: split
import torch
from megatron.core import dist_checkpointing
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

from support.reference import WINDOW, random_tokens

# What Megatron hands down when it saves and loads.
METADATA = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}


def sharded_state_dict(chunks: list[torch.nn.Module]) -> dict:
    return {
        f"model{number}": chunk.sharded_state_dict(metadata=METADATA)
        for number, chunk in enumerate(chunks)
    }


def load(chunks: list[torch.nn.Module], folder: Path) -> None:
    state = dist_checkpointing.load(sharded_state_dict(chunks), str(folder))
    for number, chunk in enumerate(chunks):
        chunk.load_state_dict(state[f"model{number}"], strict=True)


def logits(chunks: list[torch.nn.Module]) -> torch.Tensor | None:
    """[b, s, vocabulary] on the last stage, else None; a micro-batch for each sample."""
    length = 3 * WINDOW
    tokens, _ = random_tokens(1, 2, length)

    def step(iterator, model):
        sample = tokens[next(iterator)][None]
        output = model(sample, torch.arange(length)[None], None)
        return output, lambda output, non_loss_data: output

    with torch.no_grad():
        found = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=[iter(range(2)) for _ in chunks],
            model=chunks,
            num_microbatches=2,
            seq_length=length,
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
    return gather_from_tensor_model_parallel_region(torch.cat(found)) if found else None


def main(hf_dir: str, checkpoint: str, wanted: str, out: str, layout: str) -> None:
    """`layout` is JSON: overrides of Step35ModelProvider."""
    chunks = distributed_worker.build_chunks(Path(hf_dir), json.loads(layout))
    for chunk in chunks:
        for parameter in chunk.parameters():  # none may keep its random start
            torch.nn.init.constant_(parameter, float("nan"))
    load(chunks, Path(checkpoint) / "release")
    found = logits(chunks)
    if found is not None:
        expected = torch.load(wanted)
        difference = (found - expected).abs().max() / expected.abs().max()
        assert difference < 2e-5, f"logits differ by {difference:.3g} of their largest"
    folder = Path(out) / "iter_0000003"
    if torch.distributed.get_rank() == 0:
        folder.mkdir(parents=True)
        (Path(out) / "latest_checkpointed_iteration.txt").write_text("3")
    torch.distributed.barrier()
    dist_checkpointing.save(sharded_state_dict(chunks), str(folder))
    # One write, because the ranks share the pipe.
    sys.stdout.write(f"rank {torch.distributed.get_rank()} ok\n")
    sys.stdout.flush()
    torch.distributed.barrier()
