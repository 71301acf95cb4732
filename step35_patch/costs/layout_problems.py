"""What keeps a model from being laid out as a launch says."""

from __future__ import annotations

import math
from collections.abc import Iterator

from step35_patch.config.model import Step35Config
from step35_patch.config.problem import Problem
from step35_patch.costs.activations import RECOMPUTED_MODULES
from step35_patch.costs.launch import DTYPE_BYTES, Launch, LaunchError, stages
from step35_patch.costs.optimizer_state import OPTIMIZERS


def launch_problems(config: Step35Config, launch: Launch) -> list[Problem]:
    """Everything that is wrong with it; empty if it can be laid out."""
    sizes = [
        Problem(option, "a positive number", f"{value}", "change it")
        for option, value in _positive(launch).items()
        if value < 1
    ]
    if sizes:  # nothing can be divided by them
        return sizes
    problems = [
        *_world_problems(launch),
        *_model_problems(config, launch),
        *_batch_problems(launch),
        *_memory_problems(launch),
    ]
    try:
        found = stages(launch)
    except LaunchError as error:
        return [*problems, *error.problems]
    if any(stage.pp == 0 and stage.mtp_layers and not stage.embedding for stage in found):
        # Of `step35_patch.model.mtp.embedding_chunk_problems`.
        problems.append(
            Problem(
                "--pipeline-model-parallel-layout",
                "MTP layers beside the embedding or on another pipeline rank",
                "them on another virtual stage of the first rank",
                "move them: Megatron-Core sums the gradients of one copy of the embedding a rank",
            )
        )
    return problems


def _positive(launch: Launch) -> dict[str, int]:
    return {
        "--tensor-model-parallel-size": launch.tensor_model_parallel_size,
        "--pipeline-model-parallel-size": launch.pipeline_model_parallel_size,
        "--num-virtual-stages-per-pipeline-rank": launch.virtual_pipeline_model_parallel_size or 1,
        "--context-parallel-size": launch.context_parallel_size,
        "--expert-model-parallel-size": launch.expert_model_parallel_size,
        "--expert-tensor-parallel-size": launch.expert_tensor_parallel_size,
        "WORLD_SIZE": launch.world_size,
        "--seq-length": launch.seq_length,
        "--micro-batch-size": launch.micro_batch_size,
        "--global-batch-size": launch.global_batch_size,
        "--padded-vocab-size": launch.padded_vocab_size,
    }


def _world_problems(launch: Launch) -> Iterator[Problem]:
    tp, pp = launch.tensor_model_parallel_size, launch.pipeline_model_parallel_size
    for sizes in (
        {
            "--tensor-model-parallel-size": tp,
            "--pipeline-model-parallel-size": pp,
            "--context-parallel-size": launch.context_parallel_size,
        },
        {
            "--expert-model-parallel-size": launch.expert_model_parallel_size,
            "--expert-tensor-parallel-size": launch.expert_tensor_parallel_size,
            "--pipeline-model-parallel-size": pp,
        },
    ):
        needed = 1
        for size in sizes.values():
            needed *= size
        if launch.world_size % needed:
            yield Problem(
                ", ".join(sizes),
                f"a product that divides {launch.world_size} processes",
                f"{' x '.join(map(str, sizes.values()))} = {needed}",
                "change one of them, or the number of processes",
            )


def _model_problems(config: Step35Config, launch: Launch) -> Iterator[Problem]:
    tp, etp = launch.tensor_model_parallel_size, launch.expert_tensor_parallel_size
    mtp, ep = config.num_nextn_predict_layers, launch.expert_model_parallel_size
    if launch.num_layers != config.num_hidden_layers:
        yield Problem(
            "--num-layers", f"{config.num_hidden_layers}", f"{launch.num_layers}", "leave it out"
        )
    if not 0 <= launch.mtp_num_layers <= mtp:
        yield Problem("--mtp-num-layers", f"0 to {mtp}", f"{launch.mtp_num_layers}", "leave it out")
    divided = {
        "num_attention_groups": (config.num_attention_groups, tp, "--tensor-model-parallel-size"),
        "intermediate_size": (config.intermediate_size, tp, "--tensor-model-parallel-size"),
        "the padded vocabulary": (launch.padded_vocab_size, tp, "--tensor-model-parallel-size"),
    }
    if config.moe_layers_enum:
        divided |= {
            "share_expert_dim": (
                config.share_expert_dim or 0,
                tp,
                "--tensor-model-parallel-size",
            ),
            "moe_num_experts": (config.moe_num_experts or 0, ep, "--expert-model-parallel-size"),
            "moe_intermediate_size": (
                config.moe_intermediate_size or 0,
                etp,
                "--expert-tensor-parallel-size",
            ),
        }
    elif ep > 1:
        yield Problem(
            "--expert-model-parallel-size", "1 for a model without experts", f"{ep}", "leave it out"
        )
    for name, (whole, size, option) in divided.items():
        if whole % size:
            yield Problem(
                option,
                f"a divisor of {name}={whole}",
                f"{size}",
                "choose one; --expert-model-parallel-size and --pipeline-model-parallel-size are "
                "for more GPUs"
                if option == "--tensor-model-parallel-size"
                else "choose one",
            )
    if launch.padded_vocab_size < config.vocab_size:
        yield Problem(
            "--padded-vocab-size",
            f"at least vocab_size={config.vocab_size}",
            f"{launch.padded_vocab_size}",
            "leave it out",
        )
    if config.moe_layers_enum and tp > 1 and not launch.sequence_parallel:
        yield Problem(
            "--sequence-parallel",
            f"it with --tensor-model-parallel-size {tp} and experts, without which Megatron-Core "
            "does not train them",
            "none",
            "add it",
        )


def _batch_problems(launch: Launch) -> Iterator[Problem]:
    cp, dp = launch.context_parallel_size, launch.data_parallel_size
    cuts = {"2": 2, "--context-parallel-size": cp} if cp > 1 else {}
    if launch.sequence_parallel:
        cuts["--tensor-model-parallel-size"] = launch.tensor_model_parallel_size
    parts = math.prod(cuts.values())
    if launch.seq_length % parts:
        yield Problem(
            "--seq-length",
            f"a multiple of {' x '.join(cuts)} = {parts}",
            f"{launch.seq_length}",
            f"use {max(launch.seq_length // parts, 1) * parts}",
        )
    step = launch.micro_batch_size * dp
    if not step:
        return  # too few GPUs: said already
    if launch.global_batch_size % step:
        yield Problem(
            "--global-batch-size",
            f"a multiple of --micro-batch-size {launch.micro_batch_size} x {dp} data-parallel "
            "ranks",
            f"{launch.global_batch_size}",
            f"use {max(launch.global_batch_size // step, 1) * step}",
        )
        return
    if launch.virtual_pipeline_model_parallel_size is None:
        return
    pp, count = launch.pipeline_model_parallel_size, launch.num_microbatches
    if pp == 1:
        yield Problem(
            "--num-virtual-stages-per-pipeline-rank",
            "none without pipeline parallelism",
            f"{launch.virtual_pipeline_model_parallel_size}",
            "leave it out",
        )
    # Of `forward_backward_pipelining_with_interleaving`.
    group = launch.microbatch_group_size_per_vp_stage or pp
    if count < group or 0 < count % group < pp:
        yield Problem(
            "--global-batch-size",
            f"micro-batches in groups of {group} with virtual stages (what is left over: none, or "
            f"at least {pp})",
            f"{count} of them on each data-parallel rank",
            f"use {max(count // group, 1) * group * step}, or fewer pipeline stages",
        )


def _memory_problems(launch: Launch) -> Iterator[Problem]:
    for option, value, legal in (
        ("--optimizer", launch.optimizer, OPTIMIZERS),
        ("--main-params-dtype", launch.main_params_dtype, tuple(DTYPE_BYTES)),
        ("--exp-avg-dtype", launch.exp_avg_dtype, tuple(DTYPE_BYTES)),
        ("--exp-avg-sq-dtype", launch.exp_avg_sq_dtype, tuple(DTYPE_BYTES)),
    ):
        if value not in legal:
            yield Problem(
                option, " or ".join(legal), value, "nothing is known of its memory: choose one"
            )
    for module in launch.recompute_modules:
        if module not in RECOMPUTED_MODULES:
            yield Problem(
                "--recompute-modules", " or ".join(RECOMPUTED_MODULES), module, "choose of these"
            )
    aware = launch.use_precision_aware_optimizer
    if aware and not (launch.optimizer == "adam" and launch.use_distributed_optimizer):
        yield Problem(
            "--use-precision-aware-optimizer",
            "--optimizer adam --use-distributed-optimizer with it",
            f"--optimizer {launch.optimizer}"
            + " --use-distributed-optimizer" * launch.use_distributed_optimizer,
            "add them, or leave it out",
        )
