"""Megatron's printed numbers for a Step-3.5 model: TFLOP/s and the theoretical memory report.

These functions answer for Megatron's of the same names. They take its parsed and validated
arguments, from which each pipeline stage's layers are worked out; no process group is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from step35_patch.costs.accounting import (
    Parameters,
    layer_activation_bytes,
    stage_parameters,
    training_flops,
)
from step35_patch.model.description import Step35Runtime

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig

_MEGABYTE = 1024**2


def num_floating_point_operations(
    runtime: Step35Runtime,
    args: Any,
    batch_size: int,
    seqlen_squared_sum_in_batch: float | None = None,
    total_real_tokens_in_batch: float | None = None,
) -> float:
    """Operations of one global batch, forward and backward (`training_flops`).

    Args:
        runtime: the model.
        args: Megatron's arguments.
        batch_size: samples of `args.seq_length` tokens.
        seqlen_squared_sum_in_batch: sum of the squared lengths of the sequences in it; given (by
            Megatron-Core 0.18 and later) if they are packed.
        total_real_tokens_in_batch: sum of their lengths; given likewise.
    """
    tokens = total_real_tokens_in_batch
    if tokens is None:
        tokens = batch_size * args.seq_length
    squared = seqlen_squared_sum_in_batch
    if squared is None:
        squared = batch_size * args.seq_length**2
    return training_flops(
        runtime.config,
        tokens=tokens,
        squared_lengths=squared,
        vocab_size=args.padded_vocab_size,
        mtp_layers=args.mtp_num_layers or 0,
        window=runtime.window,
    )


@dataclass(frozen=True)
class _Stage:
    """What one pipeline stage has of the model.

    Attributes:
        chunks: absolute indices of its decoder layers, by virtual stage.
        mtp_layers: MTP layers behind those of its last virtual stage.
        is_first: whether it has the embedding.
        is_last: whether it has the output layer, and the MTP layers' own output matrices.
    """

    chunks: tuple[tuple[int, ...], ...]
    mtp_layers: int
    is_first: bool
    is_last: bool


def _core_config(args: Any) -> TransformerConfig:
    from megatron.training.arguments import core_transformer_config_from_args

    return core_transformer_config_from_args(args)


def _stages(core: TransformerConfig) -> list[_Stage]:
    """The pipeline's stages, as Megatron-Core divides the layers."""
    size = core.pipeline_model_parallel_size
    layout, stages = core.pipeline_model_parallel_layout, []
    for stage in range(size):
        is_last = stage == size - 1
        if layout is None:
            chunks, mtp_layers = _even_chunks(core, stage), is_last * (core.mtp_num_layers or 0)
        else:
            chunks, mtp_layers = _custom_chunks(layout.layout, stage)
        stages.append(_Stage(chunks, mtp_layers, is_first=stage == 0, is_last=is_last))
    return stages


def _even_chunks(core: TransformerConfig, stage: int) -> tuple[tuple[int, ...], ...]:
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    virtual = core.virtual_pipeline_model_parallel_size
    chunks = []
    for vp_stage in [None] if virtual is None else range(virtual):
        first = get_transformer_layer_offset(core, vp_stage, stage)
        chunks.append(tuple(range(first, first + get_num_layers_to_build(core, vp_stage, stage))))
    return tuple(chunks)


def _custom_chunks(
    layout: list[list[list[Any]]], stage: int
) -> tuple[tuple[tuple[int, ...], ...], int]:
    """Of --pipeline-model-parallel-layout, by stage and virtual stage.

    Its own counting functions ask the process groups whether there are virtual stages.
    """
    from megatron.core.transformer.enums import LayerType

    first, chunks = 0, []
    for vp_stage in range(len(layout[0])):
        for of_stage, parts in enumerate(layout):
            count = parts[vp_stage].count(LayerType.decoder)
            if of_stage == stage:
                chunks.append(tuple(range(first, first + count)))
            first += count
    return tuple(chunks), sum(part.count(LayerType.mtp) for part in layout[stage])


def _parameters(runtime: Step35Runtime, args: Any, stage: _Stage, **parallel: int) -> Parameters:
    return stage_parameters(
        runtime.config,
        [index for chunk in stage.chunks for index in chunk],
        embedding=stage.is_first,
        output_matrices=stage.is_last * (1 + (args.mtp_num_layers or 0)),
        mtp_layers=stage.mtp_layers,
        vocab_size=args.padded_vocab_size,
        gate_layout=runtime.gate_layout,
        **parallel,
    )


def rank_parameters(runtime: Step35Runtime, args: Any) -> list[Parameters]:
    """The parameters of a rank of each pipeline stage, under Megatron's arguments.

    Router biases are buffers, and not counted. What is whole on every tensor-parallel rank (norms,
    routers) counts on each; the stage with the MTP layers has a copy of the embedding.
    """
    parallel = {
        "tensor": args.tensor_model_parallel_size,
        "expert": args.expert_model_parallel_size,
        "expert_tensor": args.expert_tensor_parallel_size,
    }
    return [_parameters(runtime, args, stage, **parallel) for stage in _stages(_core_config(args))]


class _WithoutMtp(list[int]):
    """A `moe_layer_freq` to whose sum the number of MTP layers can be added."""


def leave_mtp_layers_out(call: dict[str, Any]) -> None:
    """Change the arguments of Megatron's report on MoE layers so that MTP layers count as dense.

    It divides what all layers have summed up by the sum of `moe_layer_freq` and `mtp_num_layers`.
    The second is also the size of what the ranks exchange, and stays. A second call for the same
    arguments changes nothing.

    Args:
        call: the arguments by name.
    """
    frequency, mtp_layers = call.get("moe_layer_freq"), call.get("mtp_num_layers")
    if isinstance(frequency, _WithoutMtp) or not mtp_layers:
        return
    if isinstance(frequency, int):
        frequency = [int(layer % frequency == 0) for layer in range(call["num_layers"])]
    if frequency is not None:
        call["moe_layer_freq"] = _WithoutMtp([*frequency, -mtp_layers])


def compute_weight_and_optimizer_memory(
    runtime: Step35Runtime, args: Any, verbose: bool = False
) -> float:
    """Bytes of weights, gradients and optimizer state of the most loaded rank.

    Megatron's bytes a parameter: 18, or with the distributed optimizer 6 and 12 over the ranks
    that share its state. These are the data- and context-parallel ones, and for the experts
    all ranks of a pipeline stage that have the same ones.
    """
    experts_over = args.expert_tensor_parallel_size * args.expert_model_parallel_size

    def size(replicas: int) -> float:
        return 6 + 12 / replicas if args.use_distributed_optimizer else 18

    dense_size = size(args.data_parallel_size * args.context_parallel_size)
    expert_size = size(args.world_size // (args.pipeline_model_parallel_size * experts_over))
    stages = rank_parameters(runtime, args)
    sizes = [p.dense * dense_size + p.expert * expert_size for p in stages]
    if verbose:
        _print_totals(runtime, args)
        most = stages[sizes.index(max(sizes))]
        print(
            "Number of parameters in most loaded shard in billions: "
            f"{(most.dense + most.expert) / 1e9:.4f}"
        )
        for stage, (parameters, bytes_) in enumerate(zip(stages, sizes, strict=True)):
            print(
                f"Step-3.5 pipeline stage {stage}: {parameters.dense / 1e9:.4f} B parameters and "
                f"{parameters.expert / 1e9:.4f} B of experts on a rank, {bytes_ / _MEGABYTE:.1f} MB"
            )
    return max(sizes)


def _print_totals(runtime: Step35Runtime, args: Any) -> None:
    """The model's parameters, in the words of Megatron's report."""
    config, mtp_layers = runtime.config, args.mtp_num_layers or 0
    layers = (tuple(range(config.num_hidden_layers)),)
    block = _parameters(runtime, args, _Stage(layers, 0, is_first=False, is_last=False))
    model = _parameters(runtime, args, _Stage(layers, mtp_layers, is_first=True, is_last=True))
    embeddings = (2 + mtp_layers) * args.padded_vocab_size * config.hidden_size
    total, in_block = model.dense + model.expert, block.dense + block.expert
    idle = 0
    if config.moe_num_experts and config.moe_top_k:
        idle = block.expert - block.expert * config.moe_top_k // config.moe_num_experts
    lines = {
        "Number of parameters in transformer block": in_block,
        "Number of active parameters in transformer block": in_block - idle,
        "Number of parameters in mtp block": total - in_block - embeddings,
        "Number of parameters in embedding layers": embeddings,
        "Total number of parameters": total,
        "Total number of active parameters": total - idle,
    }
    if not mtp_layers:
        del lines["Number of parameters in mtp block"]
    for text, number in lines.items():
        print(f"{text} in billions: {number / 1e9:.2f}")


def _micro_batches_held(core: TransformerConfig, stage: int, num_microbatches: int | None) -> float:
    """Forward passes that a stage has done ahead of their backward, in micro-batches, at most.

    Megatron-Core's schedules do one for each stage behind it before the first backward; the
    interleaved one, which counts by virtual stage, two, and a group for each of the other chunks.
    """
    behind = core.pipeline_model_parallel_size - 1 - stage
    chunks = core.virtual_pipeline_model_parallel_size or 1
    held: int = behind + 1
    if chunks > 1:
        held = 2 * behind + (chunks - 1) * core.microbatch_group_size_per_vp_stage + 1
    if num_microbatches is not None:
        held = min(held, chunks * num_microbatches)
    return float(held / chunks)


def compute_activation_memory(
    runtime: Step35Runtime,
    args: Any,
    num_microbatches: int | None,
    verbose: bool = False,
) -> float:
    """Bytes of activations of the most loaded rank at the peak of the schedule, in bf16.

    Of fused kernels, as in Megatron's formula: the layers on torch (--transformer-impl local) keep
    up to 2.5 times as much, most of it copies in fp32 around norms and intermediate results of
    SwiGLU. Full recomputation keeps the inputs of what is recomputed; selective recomputation
    counts as none, which is exact for core_attn and too much for other modules.

    Args:
        runtime: the model.
        args: Megatron's arguments.
        num_microbatches: of an iteration; None: enough to fill the pipeline.
        verbose: print each stage's share.
    """
    core = _core_config(args)
    tokens = args.seq_length * args.micro_batch_size // args.context_parallel_size
    stages, tensor = _stages(core), args.tensor_model_parallel_size
    sizes: list[float] = []
    for number, stage in enumerate(stages):
        held = _micro_batches_held(core, number, num_microbatches)
        size = held * _stage_bytes(runtime, args, stage, tokens)
        if stage.is_last:  # one micro-batch's logits, and their softmax in fp32
            outputs = 1 + (args.mtp_num_layers or 0)
            size += outputs * tokens * args.padded_vocab_size * (2 + 4) / tensor
        sizes.append(size)
        if verbose:
            print(
                f"Step-3.5 pipeline stage {number}: {held:.2f} micro-batches in flight, "
                f"{size / _MEGABYTE:.1f} MB of activations"
            )
    return max(sizes)


def _stage_bytes(runtime: Step35Runtime, args: Any, stage: _Stage, tokens: int) -> float:
    """What a rank of a stage keeps of the layers for the backward of a micro-batch of `tokens`."""
    config = runtime.config

    def layer(index: int) -> float:
        return layer_activation_bytes(
            config,
            runtime.layers[index],
            tokens,
            tensor=args.tensor_model_parallel_size,
            expert_tensor=args.expert_tensor_parallel_size,
            sequence_parallel=args.sequence_parallel,
        )

    first_mtp = config.num_hidden_layers
    mtp = [layer(index) for index in range(first_mtp, first_mtp + stage.mtp_layers)]
    chunks = [[layer(index) for index in chunk] for chunk in stage.chunks]
    if args.recompute_granularity != "full":
        return sum(map(sum, chunks)) + sum(mtp)
    layer_input: float = 2 * tokens * config.hidden_size
    if args.sequence_parallel:
        layer_input /= args.tensor_model_parallel_size
    group: int = args.recompute_num_layers
    if args.recompute_method == "uniform":  # of each group of layers, its input
        inputs = sum(-(-len(chunk) // group) for chunk in chunks)
        return (inputs + len(mtp)) * layer_input
    # "block": each chunk's first layers; of MTP layers Megatron-Core recomputes none then.
    inputs = sum(min(group, len(chunk)) for chunk in chunks)
    return inputs * layer_input + sum(sum(chunk[group:]) for chunk in chunks) + sum(mtp)
