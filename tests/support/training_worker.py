"""One rank of tests/checkpoint/test_training_layouts.py: load, train and save as Megatron trains.

The model is wrapped in Float16Module and DistributedDataParallel and has its optimizer when it is
loaded. What is saved, by the package and by Megatron-Core itself, is left for the test to compare.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from support import convert_worker, distributed_worker

# isort: split
import torch
from megatron.core import dist_checkpointing
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.transformer.module import Float16Module

from step35_patch import Step35Config
from step35_patch.checkpoint import load_hf_weights, save_hf_weights
from step35_patch.model.description import runtime_for
from step35_patch.model.live_weights import entries_of
from step35_patch.storage.hf_folder import HfFolder
from support.ours import make_optimizer

BF16 = {"bf16": True, "params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16}


def wrap(
    bare: list[torch.nn.Module], *, overlap_param_gather: bool = False, **options: object
) -> tuple[list[torch.nn.Module], MegatronOptimizer]:
    """As megatron.training does: the wrapped chunks, and an optimizer with fp32 masters.

    Args:
        bare: GPTModels in bf16.
        overlap_param_gather: with the distributed optimizer, and overlap_grad_reduce.
        options: more of OptimizerConfig's.
    """
    config, distributed = bare[0].config, overlap_param_gather
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=distributed,
        overlap_grad_reduce=distributed,
        overlap_param_gather=distributed,
        bucket_size=4_000,  # many buckets, as large models have
        grad_reduce_in_fp32=True,
    )
    chunks: list[torch.nn.Module] = [
        DistributedDataParallel(config, ddp, Float16Module(config, chunk)) for chunk in bare
    ]
    optimizer = make_optimizer(
        OptimizerConfig(
            lr=0.0,
            bf16=True,
            params_dtype=torch.bfloat16,
            use_distributed_optimizer=distributed,
            overlap_param_gather=distributed,
            **({"optimizer": "adam"} | options),
        ),
        chunks,
    )
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    if distributed:
        no_sync = [chunk.no_sync for chunk in chunks]
        config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    return chunks, optimizer


def step(
    chunks: list[torch.nn.Module],
    optimizer: MegatronOptimizer,
    lr: float,
    *,
    gather_before: bool = False,
) -> None:
    """A training step of two micro-batches.

    Args:
        chunks: the model.
        optimizer: its optimizer.
        lr: learning rate.
        gather_before: begin to gather parameters before they are updated. Megatron does so for
            the first chunk's experts with overlap_param_gather_with_optimizer_step.
    """
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    distributed_worker.mean_loss(chunks)
    for group in optimizer.param_groups:
        group["lr"] = lr
    if gather_before:
        for chunk in chunks:
            chunk.start_param_sync()
            for group in chunk.bucket_groups + chunk.expert_parallel_bucket_groups:
                group.param_gather_handle.wait()  # Gloo writes this rank's own part too
    done, _, _ = optimizer.step()
    assert done


def save_by_megatron(chunks: list[torch.nn.Module], folder: Path) -> None:
    """A checkpoint as megatron.training saves one, its `force_param_sync` included."""
    for chunk in chunks:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)
    iteration = folder / "iter_0000001"
    if torch.distributed.get_rank() == 0:
        iteration.mkdir(parents=True)
        (folder / "latest_checkpointed_iteration.txt").write_text("1")
    torch.distributed.barrier()
    bare = [chunk.module.module for chunk in chunks]
    dist_checkpointing.save(convert_worker.sharded_state_dict(bare), str(iteration))


def wrong_masters(
    chunks: list[torch.nn.Module], optimizer: MegatronOptimizer, folder: Path
) -> list[str]:
    """The rows whose masters on this rank are not what a folder of fp32 weights has for them."""
    owners = {
        id(parameter): part
        for part in getattr(optimizer, "chained_optimizers", [optimizer])
        if isinstance(part, DistributedOptimizer)
        for group in part.model_float16_groups
        for parameter in group
    }
    wrong = []
    for number, chunk in enumerate(chunks):
        bare = chunk.module.module
        runtime = runtime_for(bare.config)
        weights = HfFolder(folder, Step35Config.from_pretrained(folder))
        names = {id(parameter): name for name, parameter in bare.named_parameters()}
        for entry in entries_of(bare, runtime):
            if entry.parameter.dtype == torch.float32:
                continue
            found, wanted = entry.load(weights), entry.parameter.main_param
            if wanted is None:  # all of it on other data-parallel ranks
                continue
            if part := owners.get(id(entry.parameter)):
                place = part._get_model_param_range_map(entry.parameter)["param"]
                found = found.reshape(-1)[place.start : place.end]
            if not torch.equal(found, wanted.data):
                wrong.append(f"{number}: {names[id(entry.parameter)]}")
    return wrong


def main(hf_dir: str, out: str, layout: str, options: str) -> None:
    """What is saved goes to folders in `out`.

    Args:
        hf_dir: what to load.
        out: a folder.
        layout: JSON, overrides of Step35ModelProvider.
        options: JSON, arguments of `wrap`, and `gather_before` of `step`.
    """
    top = Path(out)
    fixed = BF16 | {"moe_router_bias_update_rate": 0.0}
    bare = distributed_worker.build_chunks(Path(hf_dir), fixed | json.loads(layout))
    arguments = json.loads(options)
    gather_before = arguments.pop("gather_before", False)
    chunks, optimizer = wrap(bare, **arguments)
    load_hf_weights(chunks, hf_dir, optimizer=optimizer)
    save_hf_weights(chunks, top / "loaded")
    save_by_megatron(chunks, top / "megatron loaded")
    step(chunks, optimizer, 0.0)
    save_hf_weights(chunks, top / "after a step at learning rate 0")
    step(chunks, optimizer, 1e-2, gather_before=gather_before)
    # Before Megatron-Core gathers; and unwrapped, as a framework may hand it over.
    save_hf_weights(bare, top / "trained", optimizer=optimizer)
    save_by_megatron(chunks, top / "megatron trained")
    save_hf_weights(chunks, top / "masters", optimizer=optimizer, masters=True)
    wrong = wrong_masters(chunks, optimizer, top / "masters")
    assert wrong == [], wrong
    # One write, because the ranks share the pipe.
    sys.stdout.write(f"rank {torch.distributed.get_rank()} ok\n")
    sys.stdout.flush()
    torch.distributed.barrier()
