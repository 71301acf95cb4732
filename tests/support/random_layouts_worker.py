"""One rank of runs of one random model under several layouts: logits and gradients, each its part.

The run with one process is kept; the others are held against it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from support.gradient_worker import Run

type Found = dict[str, Any]


def main(hf_dir: str, reference: str, out: str, specs: str) -> None:
    """Run, and write what was found.

    Args:
        hf_dir: the weights.
        reference: the file of the run with one process, or "" to write it.
        out: that file, or the folder for each rank's differences from it.
        specs: JSON, for each layout the fields of `gradient_cases.Case`.
    """
    worst: dict[str, dict[str, float]] = {}
    for name, spec in json.loads(specs).items():
        # Of the layout before; a process starts without.
        parallel_state.destroy_model_parallel()
        run = Run(Path(hf_dir), spec)
        found: Found = {"logits": _logits(run)} | run.train(steps=1)
        if not reference:
            torch.save(found, out)
            return
        worst[name] = differences(run, found, torch.load(reference))
    rank = torch.distributed.get_rank()
    Path(out, f"{rank}.json").write_text(json.dumps(worst))
    torch.distributed.barrier()


def _logits(run: Run) -> list[torch.Tensor]:
    """[1, s, vocabulary] of each micro-batch, this rank's part; nothing but on the last stage."""
    batches = run.batches()

    def step(iterator: Any, model: torch.nn.Module) -> Any:
        batch = next(iterator)
        output = model(batch["tokens"], batch["position_ids"], None)
        return output, lambda logits, non_loss_data: logits.detach().clone()

    found = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=[iter(batches) for _ in run.chunks],
        model=run.chunks,
        num_microbatches=len(batches),
        seq_length=batches[0]["seq_length"],
        micro_batch_size=1,
        forward_only=True,
        collect_non_loss_data=True,
    )
    return list(found)


def differences(run: Run, found: Found, wanted: Found) -> dict[str, float]:
    """The largest of logits, gradients and logged losses, each of the largest value.

    Of logits it is -1 where this rank has none.
    """
    logged = found["logs"][0]
    apart = [abs(value / wanted["logs"][0][name] - 1) for name, value in logged.items()]
    # Where a gradient is zero but for rounding, as that of q and k of a window of one key, it is
    # held against the others.
    floor = 1e-2 * max(tensor.abs().max().item() for tensor in wanted["gradients"].values())
    return {
        "logits": max(map(_apart, found["logits"], _own_logits(run, found, wanted)), default=-1.0),
        "gradients": max(
            _apart(tensor, wanted["gradients"][name], floor)
            for name, tensor in found["gradients"].items()
        ),
        "losses": max(apart),
    }


def _apart(found: torch.Tensor, wanted: torch.Tensor, floor: float = 0.0) -> float:
    apart = ((found - wanted).abs().max() / max(wanted.abs().max().item(), floor)).item()
    return apart if apart == apart else float("inf")


def _own_logits(run: Run, found: Found, wanted: Found) -> list[torch.Tensor]:
    """The rows and columns of one process's that this rank has."""
    if not found["logits"]:
        return []
    samples = run.spec["samples"] // parallel_state.get_data_parallel_world_size()
    first = parallel_state.get_data_parallel_rank() * samples
    width = found["logits"][0].shape[-1]
    columns = slice(start := parallel_state.get_tensor_model_parallel_rank() * width, start + width)
    parts = []
    for whole in wanted["logits"][first : first + samples]:
        rows = run.share({"rows": torch.arange(whole.shape[1])[None], "tokens": whole[..., 0]})
        parts.append(whole[:, rows["rows"][0], columns])
    return parts
