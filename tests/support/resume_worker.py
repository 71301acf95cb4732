"""One rank of tests/checkpoint/test_other_implementation.py: train, save, go on with another one.

The run that goes on with its own modules and the one that takes its checkpoint over, built on the
other implementation of Megatron-Core's, have the same gradients, losses and changes of the weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from support import convert_worker

# isort: split
import torch
from megatron.core import dist_checkpointing

from support.gradient_worker import Run, difference

STEPS = 1


def main(hf_dir: str, folder: str, spec: str, first: str, second: str) -> None:
    """Write how far apart the two runs are to a file of `folder`, named by the rank.

    Args:
        hf_dir: the weights to start from.
        folder: for that and for the checkpoint.
        spec: JSON, the fields of `gradient_cases.Case`, and `sharding`: how a distributed
            optimizer is saved.
        first: JSON, the overrides of Step35ModelProvider that make the first run's implementation.
        second: the other's.
    """
    options, rank = json.loads(spec), torch.distributed.get_rank
    metadata = convert_worker.METADATA | options.pop("sharding", {})
    run = _run(hf_dir, options, first)
    run.train(STEPS)
    saved = Path(folder, "saved")
    if rank() == 0:
        saved.mkdir()
    torch.distributed.barrier()
    dist_checkpointing.save(_state(run, metadata), str(saved))
    wanted = run.train(STEPS)

    other = _run(hf_dir, options, second)
    state = dist_checkpointing.load(_state(other, metadata, is_loading=True), str(saved))
    for number, chunk in enumerate(other.chunks):
        chunk.module.load_state_dict(state[f"model{number}"], strict=True)
    with torch.no_grad():
        other.optimizer.load_state_dict(state["optimizer"])
    found = other.train(STEPS)
    apart = {
        what: {n: difference(t, wanted[what][n]) for n, t in found[what].items()}
        for what in ("gradients", "changes")
    }
    document = {**apart, "logs": found["logs"], "wanted logs": wanted["logs"]}
    Path(folder, f"{rank()}.json").write_text(json.dumps(document))
    torch.distributed.barrier()


def _run(hf_dir: str, options: dict[str, Any], implementation: str) -> Run:
    layout = options["layout"] | json.loads(implementation)
    return Run(Path(hf_dir), options | {"layout": layout})


def _state(run: Run, metadata: dict[str, Any], *, is_loading: bool = False) -> dict[str, Any]:
    """As Megatron's checkpointing makes it of a model and its optimizer."""
    state = convert_worker.sharded_state_dict([chunk.module for chunk in run.chunks])
    optimizer = run.optimizer.sharded_state_dict(state, is_loading=is_loading, metadata=metadata)
    return state | {"optimizer": optimizer}
