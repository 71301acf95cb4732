"""Sizes of a launch that must go into each other: ranks, heads, experts, sequences, batches.

Megatron-Core looks at most of them itself, one after the other and each with an assertion of its
own; here they come at once, with a way out. What is about Step-3.5 alone is in
`step35_patch.patch.arguments.layout_problems`, which a run looks at too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from step35_patch.config.model import Step35Config
from step35_patch.config.problem import Problem
from step35_patch.launch.command import TrainingCommand


def size_problems(
    args: Any, config: Step35Config, command: TrainingCommand, gpus: int | None
) -> Iterator[Problem]:
    """All sizes that do not go together.

    Args:
        args: Megatron's parsed arguments, with the config's shapes filled in; `world_size` is 0 if
            it is not known.
        config: the model.
        command: the launch.
        gpus: how many there are, if the user said so.
    """
    yield from _rank_problems(args, command, gpus)
    yield from _shape_problems(args, config)
    yield from _sequence_problems(args, config)
    yield from _batch_problems(args)


def _rank_problems(args: Any, command: TrainingCommand, gpus: int | None) -> Iterator[Problem]:
    if command.world_size is None and gpus is None:
        yield Problem(
            "--nnodes, --nproc-per-node",
            "a number of processes that is known",
            f"{command.nodes or 'no number'} x {command.processes_per_node or 'no number'}",
            "give --gpus N, or --set of the variables that they come from",
        )
    elif gpus is not None and command.world_size not in (None, gpus):
        yield Problem(
            "--nnodes, --nproc-per-node",
            f"{gpus} processes, one for each GPU (--gpus)",
            f"{command.nodes} x {command.processes_per_node} = {command.world_size}",
            "change one of the three",
        )
    world = args.world_size
    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    cp, ep = args.context_parallel_size, args.expert_model_parallel_size
    etp = args.expert_tensor_parallel_size or tp
    for option, size in (
        ("--tensor-model-parallel-size", tp),
        ("--pipeline-model-parallel-size", pp),
        ("--context-parallel-size", cp),
        ("--expert-model-parallel-size", ep),
        ("--expert-tensor-parallel-size", etp),
    ):
        if size < 1:
            yield Problem(option, "1 or more", f"{size}", "leave it out for 1")
    if not world or min(tp, pp, cp, ep, etp) < 1:
        return
    if world % (tp * pp * cp):
        yield Problem(
            "--tensor-model-parallel-size, --pipeline-model-parallel-size, --context-parallel-size",
            f"a product that divides {world} processes",
            f"{tp} x {pp} x {cp} = {tp * pp * cp}",
            "change one of them, or the number of processes",
        )
    if world % (etp * ep * pp):
        yield Problem(
            "--expert-model-parallel-size, --expert-tensor-parallel-size",
            f"a product, with --pipeline-model-parallel-size, that divides {world} processes",
            f"{ep} x {etp} x {pp} = {etp * ep * pp}",
            "give --expert-tensor-parallel-size 1, which is --tensor-model-parallel-size otherwise"
            if args.expert_tensor_parallel_size is None and tp > 1
            else "use fewer expert-parallel ranks",
        )


def _shape_problems(args: Any, config: Step35Config) -> Iterator[Problem]:
    tp = args.tensor_model_parallel_size
    etp = args.expert_tensor_parallel_size or tp
    cuts = [("--tensor-model-parallel-size", tp, "intermediate_size", config.intermediate_size)]
    if config.use_moe:
        cuts += [
            ("--tensor-model-parallel-size", tp, "share_expert_dim", config.share_expert_dim or 0),
            (
                "--expert-tensor-parallel-size",
                etp,
                "moe_intermediate_size",
                config.moe_intermediate_size or 0,
            ),
        ]
    for option, size, name, value in cuts:
        if size > 0 and value % size:
            yield Problem(option, f"a divisor of {name}={value}", f"{size}", "use fewer ranks")
    if config.use_moe and tp > 1 and not args.sequence_parallel:
        yield Problem(
            "--sequence-parallel",
            f"it with --tensor-model-parallel-size {tp} and experts, without which Megatron-Core "
            "does not train them",
            "none",
            "add it",
        )


def _sequence_problems(args: Any, config: Step35Config) -> Iterator[Problem]:
    length, cp = args.seq_length, args.context_parallel_size
    if length is None:
        yield Problem("--seq-length", "tokens of a sample", "none", "give it")
        return
    most = args.max_position_embeddings
    if most is not None and length > most:
        limit = config.max_position_embeddings
        yield Problem(
            "--seq-length",
            f"at most --max-position-embeddings {most}"
            + (", which the config has" if most == limit else ""),
            f"{length}",
            f"use at most {most}"
            if most >= limit
            else f"leave --max-position-embeddings out, the config has {limit}",
        )
    if cp > 1 and length % (2 * cp):
        yield Problem(
            "--seq-length",
            f"a multiple of 2 x --context-parallel-size = {2 * cp}",
            f"{length}",
            f"use {length // (2 * cp) * 2 * cp or 2 * cp}",
        )
    elif args.sequence_parallel and (each := length // cp) % args.tensor_model_parallel_size:
        tp = args.tensor_model_parallel_size
        yield Problem(
            "--seq-length",
            f"a multiple of --tensor-model-parallel-size {tp} on each context-parallel rank, with "
            "--sequence-parallel",
            f"{each}",
            f"use {each // tp * tp * cp or tp * cp}",
        )


def _batch_problems(args: Any) -> Iterator[Problem]:
    micro, whole = args.micro_batch_size, args.global_batch_size
    if micro is None or micro < 1:
        yield Problem("--micro-batch-size", "1 or more", f"{micro or 'none'}", "give it")
        return
    model = (
        args.tensor_model_parallel_size
        * args.pipeline_model_parallel_size
        * args.context_parallel_size
    )
    if whole is None or not args.world_size or model < 1 or args.world_size % model:
        return
    data = args.world_size // model
    if whole % (micro * data):
        yield Problem(
            "--global-batch-size",
            f"a multiple of --micro-batch-size {micro} x {data} data-parallel ranks",
            f"{whole}",
            f"use {max(whole // (micro * data), 1) * micro * data}",
        )
        return
    count, pp = whole // (micro * data), args.pipeline_model_parallel_size
    group = args.microbatch_group_size_per_vp_stage or pp
    interleaved = _is_interleaved(args)
    if interleaved and (count < group or 0 < count % group < pp):
        yield Problem(
            "--global-batch-size",
            f"a multiple of {group} micro-batches on each data-parallel rank, with virtual stages "
            f"on {pp} pipeline ranks",
            f"{count}",
            f"use {max(count // group, 1) * group * micro * data}",
        )


def _is_interleaved(args: Any) -> bool:
    """Whether a pipeline rank has several stages, by any of the arguments that ask for it."""
    layout = args.pipeline_model_parallel_layout
    if layout is not None:
        from megatron.core.transformer.pipeline_parallel_layer_layout import (
            PipelineParallelLayerLayout,
        )

        try:
            count = PipelineParallelLayerLayout.get_num_stages_from_str(layout)
        except (AssertionError, ValueError):
            return False  # the layout is a problem of its own
        return bool(count > args.pipeline_model_parallel_size)
    return (
        args.num_layers_per_virtual_pipeline_stage is not None
        or (args.num_virtual_stages_per_pipeline_rank or 1) > 1
    )
