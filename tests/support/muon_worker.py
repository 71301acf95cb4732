"""One rank of tests/training/test_muon.py: a step of Megatron-Core's Muon against our own.

The reference makes the update of each published matrix from its gradient, whole, or with
`muon_tp_mode` blockwise from the block that each rank has.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from support import gradient_worker

# isort: split
import torch
from safetensors.torch import load_file
from torch import Tensor

from step35_patch import Step35Config
from step35_patch.tensors.table import Cut, tensor_table
from support.gradient_worker import WEIGHT_DECAY
from support.reference_muon import is_muons, update


def main(hf_dir: str, spec: str, out: str) -> None:
    """Write each Muon's tensor's error to a file of `out`, named by the rank.

    Args:
        hf_dir: the weights to start from.
        spec: JSON, the fields of `gradient_cases.Case`.
        out: a folder.
    """
    options = json.loads(spec)
    run = gradient_worker.Run(Path(hf_dir), options)
    if options.get("stock"):
        for part in run.optimizer.chained_optimizers:
            vars(part.optimizer).pop("orthogonalize", None)
    found = run.train(steps=1)
    blocks = _blocks(Step35Config.from_pretrained(hf_dir), options)
    weights = load_file(Path(hf_dir) / "model.safetensors")
    errors = {}
    learning_rate = options["optimizer"]["lr"]
    for name, gradient in found["gradients"].items():
        if not is_muons(name, gradient):
            continue
        count, dim = blocks[name]
        parts = [update(part) for part in gradient.chunk(count, dim)]
        wanted = torch.cat(parts, dim) + WEIGHT_DECAY * weights[name].double()
        errors[name] = _error(found["changes"][name].double() / -learning_rate, wanted)
    rank = torch.distributed.get_rank()
    Path(out, f"{rank}.json").write_text(json.dumps(errors))
    torch.distributed.barrier()


def _blocks(config: Step35Config, options: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """The number of blocks of each published tensor, and the dimension that they divide."""
    layout = options["layout"]
    blockwise = options["optimizer"]["muon_tp_mode"] == "blockwise"
    sizes = layout.get("tensor_model_parallel_size", 1)
    expert_sizes = layout.get("expert_tensor_parallel_size", sizes)
    blocks = {}
    for row in tensor_table(config, layout.get("gate_layout", "headwise")):
        count = expert_sizes if row.is_expert else sizes
        if row.cut is Cut.WHOLE or not blockwise:
            count = 1
        for published in row.published:
            blocks[published.name] = count, -1 if row.cut is Cut.COLUMNS else -2
    return blocks


def _error(found: Tensor, wanted: Tensor) -> float:
    """The norm of the difference, of the norm of what is wanted; of the worst expert."""
    apart = (found - wanted).flatten(-2).norm(dim=-1)
    norm = wanted.flatten(-2).norm(dim=-1)
    return (apart / norm.clamp_min(1e-12)).max().item()
