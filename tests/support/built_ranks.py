"""Every rank of some layouts, built by Megatron-Core in one process, beside what is estimated.

Run as a script, it plays all ranks in turn, on torch's fake process group, and prints one line of
JSON for each of `CASES`: what `step35-patch estimate` says of its arguments, Megatron's own report,
and by rank what was built.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.layout_runs import layout_config

ROOT = Path(__file__).parents[2]
LENGTH = 64
_WORDS = f"""
    --seq-length {LENGTH} --micro-batch-size 1 --train-iters 1 --lr 1e-3 --mock-data
    --transformer-impl local --tokenizer-type NullTokenizer --no-persist-layer-norm
    --no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-rope-fusion
    --no-bias-swiglu-fusion --use-cpu-initialization
    """
TENSOR = "--tensor-model-parallel-size {} --sequence-parallel"
EXPERT = "--expert-model-parallel-size {} --expert-tensor-parallel-size {}"


@dataclass(frozen=True)
class Case:
    """One launch.

    Attributes:
        words: Megatron's arguments.
        ranks: How many there are.
        batch: Micro-batches of a step on each data-parallel rank.
        published: Of the published model, on the meta device; else of `layout_config`.
        with_optimizer: Whether gradients and the optimizer's state are made too.
    """

    words: str
    ranks: int = 1
    batch: int = 1
    published: bool = False
    with_optimizer: bool = False


def _pipeline(size: int, layout: str) -> str:
    return f"--pipeline-model-parallel-size {size} --pipeline-model-parallel-layout {layout}"


# By what is special about them.
CASES = {
    "tp": Case(TENSOR.format(2), 2),
    "tp, ep, etp 1, expanded gate": Case(
        f"{TENSOR.format(4)} {EXPERT.format(2, 1)} --step35-gate-layout expanded", 4
    ),
    "tp, etp, padded vocabulary": Case(
        f"{TENSOR.format(2)} {EXPERT.format(1, 2)} --padded-vocab-size 288", 2
    ),
    "tp, pp, ep, etp": Case(
        f"{TENSOR.format(2)} {EXPERT.format(2, 2)} --pipeline-model-parallel-size 2", 8
    ),
    "pp, one MTP layer": Case("--pipeline-model-parallel-size 2 --mtp-num-layers 1", 2),
    "pp 3": Case("--pipeline-model-parallel-size 3", 3, batch=8),
    "pp 2, vpp 3": Case(
        "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 3", 2, batch=8
    ),
    "pp 3, vpp 2": Case(
        "--pipeline-model-parallel-size 3 --num-virtual-stages-per-pipeline-rank 2", 3, batch=3
    ),
    "pp, vpp by layers": Case(
        "--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1", 2, batch=6
    ),
    "uneven pp": Case(
        "--pipeline-model-parallel-size 2 --decoder-first-pipeline-num-layers 4 "
        "--decoder-last-pipeline-num-layers 2",
        2,
    ),
    "embedding and loss as layers": Case(
        "--pipeline-model-parallel-size 4 --account-for-embedding-in-pipeline-split "
        "--account-for-loss-in-pipeline-split --num-virtual-stages-per-pipeline-rank 2",
        4,
        batch=4,
    ),
    "MTP layers away from the output layer": Case(_pipeline(3, "Ettt|tttmm|L"), 3),
    "virtual stages of unequal length": Case(_pipeline(2, "Et|tt|t|ttmmL"), 2, batch=4),
    "no decoder layer at the end, no MTP": Case(
        f"{_pipeline(3, 'Ettt|ttt|L')} --mtp-num-layers 0", 3
    ),
}
# Gradients and optimizers, by what they are.
OPTIMIZERS = {
    "adam fp32": Case("", with_optimizer=True),
    "adam bf16": Case("--bf16", with_optimizer=True),
    "adam bf16, bf16 gradients": Case("--bf16 --grad-reduce-in-bf16", with_optimizer=True),
    "adam bf16, distributed": Case(
        f"--bf16 --use-distributed-optimizer {EXPERT.format(2, 1)}", 4, with_optimizer=True
    ),
    "adam fp32, distributed": Case("--use-distributed-optimizer", 2, with_optimizer=True),
    "sgd bf16": Case("--bf16 --optimizer sgd", with_optimizer=True),
    "muon bf16": Case("--bf16 --optimizer muon", with_optimizer=True),
    "muon fp32, tp": Case(f"--optimizer muon {TENSOR.format(2)}", 2, with_optimizer=True),
}
PUBLISHED = {
    "the authors' layout": Case(
        f"{_pipeline(8, 'Ett|(tt|)*21t|mmmL')} {EXPERT.format(8, 1)} --context-parallel-size 8 "
        "--no-create-attention-mask-in-dataloader --bf16",
        64,
        batch=8,
        published=True,
    )
}


def parse(config: Path, words: str = "", world_size: int = 1, batch: int | None = None) -> Any:
    """Megatron's arguments, parsed and validated with a config active."""
    from megatron.training.arguments import parse_args, validate_args

    import step35_patch

    step35_patch.activate()  # forgets the gate layout and window of the last one
    before = sys.argv, os.environ.get("WORLD_SIZE")
    sys.argv = ["pretrain_gpt.py", "--step35-config", str(config), *words.split(), *_WORDS.split()]
    if batch is not None:
        sys.argv += ["--global-batch-size", str(batch)]
    os.environ["WORLD_SIZE"] = str(world_size)
    try:
        args = parse_args()
        validate_args(args)
    finally:
        sys.argv = before[0]
        os.environ.pop("WORLD_SIZE")
        if before[1] is not None:
            os.environ["WORLD_SIZE"] = before[1]
    return args


def build_chunks(args: Any, rank: int) -> list[Any]:
    """A rank's model chunks, on the fake process group, which is made for it."""
    import torch
    from megatron.core import parallel_state
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
    from megatron.training.arguments import core_transformer_config_from_args
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from step35_patch.model.mtp import embedding_ranks

    torch.distributed.init_process_group(
        "fake", store=FakeStore(), rank=rank, world_size=args.world_size
    )
    virtual = args.virtual_pipeline_model_parallel_size
    config = core_transformer_config_from_args(args)
    parallel_state.initialize_model_parallel(
        args.tensor_model_parallel_size,
        args.pipeline_model_parallel_size,
        virtual,
        context_parallel_size=args.context_parallel_size,
        expert_model_parallel_size=args.expert_model_parallel_size,
        expert_tensor_parallel_size=args.expert_tensor_parallel_size,
        create_gloo_process_groups=False,
        get_embedding_ranks=lambda pp_ranks, *_: embedding_ranks(pp_ranks, config),
    )
    model_parallel_cuda_manual_seed(1)
    chunks = []
    for vp_stage in [None] if virtual is None else range(virtual):
        how = {"use_transformer_engine": False, "vp_stage": vp_stage}
        spec = gpt_layer_specs.get_gpt_decoder_block_spec(config, **how, normalization="RMSNorm")
        at = {"ignore_virtual": False, "vp_stage": vp_stage}
        mtp = None
        if args.mtp_num_layers:
            mtp = gpt_layer_specs.get_gpt_mtp_block_spec(
                config, gpt_layer_specs.get_gpt_layer_local_spec(normalization="RMSNorm"), **how
            )
        chunks.append(
            GPTModel(
                config=config,
                transformer_layer_spec=spec,
                mtp_block_spec=mtp,
                vocab_size=args.padded_vocab_size,
                max_sequence_length=LENGTH,
                pre_process=parallel_state.is_pipeline_first_stage(**at),
                post_process=parallel_state.is_pipeline_last_stage(**at),
                share_embeddings_and_output_weights=False,
                position_embedding_type="rope",
                vp_stage=vp_stage,
            )
        )
    return chunks


def forget_groups() -> None:
    """The rank's process groups."""
    import torch
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def _held(args: Any, batch: int) -> float:
    """Micro-batches that Megatron-Core's schedule has in flight on this rank, at most."""
    from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches

    chunks = args.virtual_pipeline_model_parallel_size or 1
    total, _, warmup, _ = get_pp_rank_microbatches(batch, chunks, args.pipeline_model_parallel_size)
    return min(warmup + 1, total) / chunks


def _optimizer_bytes(args: Any, chunks: list[Any]) -> dict[str, int]:
    """Bytes of what DistributedDataParallel and the optimizer make of a rank's chunks."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.transformer.module import Float16Module
    from megatron.training.training import get_megatron_optimizer_config

    from support.ours import make_optimizer

    config = chunks[0].config
    if args.bf16:
        chunks = [Float16Module(config, chunk) for chunk in chunks]
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=args.accumulate_allreduce_grads_in_fp32,
        use_distributed_optimizer=args.use_distributed_optimizer,
    )
    wrapped = [DistributedDataParallel(config, ddp, chunk) for chunk in chunks]
    buffers = [
        buffer for chunk in wrapped for buffer in [*chunk.buffers, *chunk.expert_parallel_buffers]
    ]
    optimizer_config, overrides = get_megatron_optimizer_config(args)
    optimizer = make_optimizer(
        optimizer_config, wrapped, config_overrides=overrides, use_gloo_process_groups=False
    )
    return {
        "gradients": sum(buffer.grad_data.nbytes for buffer in buffers),
        "optimizer": _state_bytes(optimizer, wrapped),
    }


def _state_bytes(optimizer: Any, chunks: list[Any]) -> int:
    """What its torch optimizers hold beside the model's own weights, after a step's set-up."""
    import torch

    own = {p.untyped_storage().data_ptr() for chunk in chunks for p in chunk.parameters()}
    storages: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> None:
        if tensor.untyped_storage().data_ptr() not in own:
            storages[tensor.untyped_storage().data_ptr()] = tensor.numel() * tensor.element_size()

    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for group in part.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        part.optimizer.step()
        for parameter, state in part.optimizer.state.items():
            count(parameter)
            for value in state.values():
                if isinstance(value, torch.Tensor) and value.dim():
                    count(value)
    return sum(storages.values())


def play(case: Case, config: Path) -> dict[str, Any]:
    """What is estimated and what is built."""
    import torch
    from megatron.core import parallel_state

    from step35_patch import settings
    from step35_patch.commands.estimate import as_json
    from step35_patch.costs import megatron_reports as reports
    from step35_patch.costs.estimate import estimate
    from step35_patch.costs.launch import from_arguments
    from step35_patch.model.description import from_settings

    printed = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()):
        args = parse(config, case.words, case.ranks)
        args.global_batch_size = case.batch * args.data_parallel_size * args.micro_batch_size
    runtime = from_settings(settings.active())
    with contextlib.redirect_stdout(printed):  # before there are groups
        reports.compute_activation_memory(runtime, args, case.batch, verbose=True)
    ranks = []
    # On the meta device one rank of each stage will do.
    step = case.ranks // args.pipeline_model_parallel_size if case.published else 1
    for rank in range(0, case.ranks, step):
        with torch.device("meta") if case.published else contextlib.nullcontext():
            chunks = build_chunks(args, rank)
        ranks.append(
            {
                "pp": parallel_state.get_pipeline_model_parallel_rank(),
                "parameters": sum(p.numel() for chunk in chunks for p in chunk.parameters()),
                "expert_parameters": sum(
                    p.numel()
                    for chunk in chunks
                    for name, p in chunk.named_parameters()
                    if ".experts." in name
                ),
                "held": round(_held(args, case.batch), 3),
                **(_optimizer_bytes(args, chunks) if case.with_optimizer else {}),
            }
        )
        forget_groups()
    return {
        "estimate": as_json(estimate(runtime.config, from_arguments(args)), None),
        "reported": printed.getvalue(),
        "ranks": ranks,
    }


def compare(found: dict[str, Any], names: dict[str, str]) -> set[int]:
    """Assert that each built rank is as its stage is estimated; returns the stages.

    Args:
        found: What `play` returned.
        names: Of what is compared, among what is built and in the estimate.
    """
    estimated = {rank["pp"]: rank for rank in found["estimate"]["ranks"]}
    for rank in found["ranks"]:
        of_stage = estimated[rank["pp"]]
        for built, ours in names.items():
            assert of_stage[ours] == rank[built], (rank["pp"], built)
    return {rank["pp"] for rank in found["ranks"]}


def make(folder: Path) -> None:
    """Play `CASES` and `OPTIMIZERS` in a process of its own; what it finds goes to built.json."""
    _run(folder, "CASES", "OPTIMIZERS")


def make_published(folder: Path) -> None:
    """The same of `PUBLISHED`."""
    _run(folder, "PUBLISHED")


def _run(folder: Path, *groups: str) -> None:
    (folder / "config.json").write_text(json.dumps(layout_config()))
    search = [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(search),
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "ignore",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    }
    result = subprocess.run(
        [sys.executable, __file__, str(folder), *groups],
        capture_output=True,
        text=True,
        env=environment,
        timeout=900,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]


def _main(folder: Path, groups: list[str]) -> None:
    import torch

    from step35_patch import cpu
    from step35_patch.config import packaged_config_path

    cpu.install()
    # The stand-in makes Gloo of every group; the fake one has no peers to meet.
    for name in ("init_process_group", "new_group"):
        original = getattr(torch.distributed, name).__wrapped__
        setattr(torch.distributed, name, original)
        setattr(torch.distributed.distributed_c10d, name, original)
    found = {}
    for group in groups:
        for name, case in globals()[group].items():
            config = packaged_config_path() if case.published else folder / "config.json"
            found[name] = play(case, config)
    (folder / "built.json").write_text(json.dumps(found))


if __name__ == "__main__":
    _main(Path(sys.argv[1]), sys.argv[2:])
