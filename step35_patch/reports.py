"""Megatron's printed numbers for a Step-3.5 model: TFLOP/s and the theoretical memory report.

These functions answer for Megatron's of the same names. They take its parsed arguments, from which
the stages' layers are worked out with Megatron-Core's own rules.
"""

from __future__ import annotations

from typing import Any

from step35_patch.accounting import (
    Parameters,
    layer_activation_bytes,
    stage_parameters,
    training_flops,
)
from step35_patch.runtime import Step35Runtime

_MEGABYTE = 1024**2


def num_floating_point_operations(
    runtime: Step35Runtime,
    args: Any,
    batch_size: int,
    seqlen_squared_sum_in_batch: float | None = None,
    total_real_tokens_in_batch: int | None = None,
) -> float:
    """Operations of one global batch; the last two are given for packed sequences."""
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


def _stage_layers(args: Any) -> list[tuple[list[int], int]]:
    """The decoder layers (absolute indices) and the number of MTP layers of each stage."""
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
    from megatron.training.arguments import core_transformer_config_from_args

    config = core_transformer_config_from_args(args)
    chunks = config.virtual_pipeline_model_parallel_size
    stages = []
    for stage in range(config.pipeline_model_parallel_size):
        layers, mtp_layers = [], 0
        for vp_stage in [None] if chunks is None else range(chunks):
            where = {"vp_stage": vp_stage, "pp_rank": stage}
            if (layout := config.pipeline_model_parallel_layout) is not None:
                layers += layout.get_layer_id_list(layer_type=LayerType.decoder, **where)
                mtp_layers += layout.get_num_layers_to_build(layer_type=LayerType.mtp, **where)
            else:
                offset = get_transformer_layer_offset(config, **where)
                count = get_num_layers_to_build(config, **where)
                layers += range(offset, offset + count)
        last = stage == config.pipeline_model_parallel_size - 1
        if last and config.pipeline_model_parallel_layout is None:
            mtp_layers = config.mtp_num_layers or 0
        stages.append((layers, mtp_layers))
    return stages


def _parameters_by_stage(runtime: Step35Runtime, args: Any) -> list[Parameters]:
    stages = _stage_layers(args)
    return [
        stage_parameters(
            runtime.config,
            layers,
            embedding=stage == 0,
            output=stage == len(stages) - 1,
            mtp_layers=mtp_layers,
            vocab_size=args.padded_vocab_size,
            gate_layout=runtime.gate_layout,
            tensor=args.tensor_model_parallel_size,
            expert=args.expert_model_parallel_size,
            expert_tensor=args.expert_tensor_parallel_size or args.tensor_model_parallel_size,
        )
        for stage, (layers, mtp_layers) in enumerate(stages)
    ]


def compute_weight_and_optimizer_memory(
    runtime: Step35Runtime, args: Any, verbose: bool = False
) -> float:
    """Bytes of weights, gradients and optimizer state of the most loaded rank.

    Megatron's bytes a parameter: 18, or 6 and 12 over the data-parallel size with the distributed
    optimizer; experts are replicated over their own, smaller, data-parallel size.
    """
    expert_tensor = args.expert_tensor_parallel_size or args.tensor_model_parallel_size
    model = args.pipeline_model_parallel_size * expert_tensor * args.expert_model_parallel_size

    def size(replicas: float) -> float:
        return 6 + 12 / replicas if args.use_distributed_optimizer else 18

    stages = _parameters_by_stage(runtime, args)
    sizes = [
        parameters.dense * size(args.data_parallel_size * args.context_parallel_size)
        + parameters.expert * size(max(1, args.world_size // model))
        for parameters in stages
    ]
    if verbose:
        for stage, (parameters, bytes_) in enumerate(zip(stages, sizes)):
            print(
                f"Step-3.5 pipeline stage {stage}: {parameters.dense / 1e9:.4f} B parameters and "
                f"{parameters.expert / 1e9:.4f} B of experts on a rank, {bytes_ / _MEGABYTE:.1f} MB"
            )
    return max(sizes)


def compute_activation_memory(
    runtime: Step35Runtime,
    args: Any,
    num_microbatches: int | None,
    verbose: bool = False,
    *,
    sequence_parallel: bool = True,
) -> float:
    """Bytes of activations of the most loaded rank at the peak of the schedule, in bf16.

    Stage i of n holds n - i micro-batches (fewer if there are fewer), and with virtual stages
    Megatron's share more. Full recomputation keeps a layer's input alone. Without sequence
    parallelism the layers' inputs, four of hidden size a token, are whole on every rank.
    """
    config = runtime.config
    tokens = args.seq_length * args.micro_batch_size // args.context_parallel_size
    tensor, stages = args.tensor_model_parallel_size, _stage_layers(args)
    whole = 0 if sequence_parallel else 2 * tokens * 4 * config.hidden_size

    def layer(index: int) -> float:
        if args.recompute_granularity == "full":
            return 2 * tokens * config.hidden_size / (tensor if sequence_parallel else 1)
        split = layer_activation_bytes(config, runtime.layers[index], tokens) - whole
        return whole + split / tensor

    sizes = []
    for stage, (layers, mtp_layers) in enumerate(stages):
        first_mtp = config.num_hidden_layers
        indices = [*layers, *range(first_mtp, first_mtp + mtp_layers)]
        in_flight = len(stages) - stage
        if num_microbatches is not None:
            in_flight = min(in_flight, num_microbatches)
        if (virtual := args.virtual_pipeline_model_parallel_size) is not None:
            in_flight *= 1 + (len(stages) - 1) / (len(stages) * virtual)
        size = in_flight * sum(map(layer, indices))
        if stage == len(stages) - 1:  # logits, and their gradient in fp32, one at a time
            size += (1 + mtp_layers) * tokens * args.padded_vocab_size * (2 + 4) / tensor
        sizes.append(size)
        if verbose:
            print(
                f"Step-3.5 pipeline stage {stage}: {in_flight:.2f} micro-batches in flight, "
                f"{size / _MEGABYTE:.1f} MB of activations"
            )
    return max(sizes)
