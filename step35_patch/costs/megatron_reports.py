"""Megatron's printed numbers for a Step-3.5 model: TFLOP/s and the theoretical memory report.

These functions answer for Megatron's of the same names. They take its parsed and validated
arguments, from which each pipeline stage's layers are worked out; no process group is needed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from step35_patch.costs.accounting import training_flops
from step35_patch.costs.estimate import peak_activations, weights_of_rank, whole_model
from step35_patch.costs.launch import Launch, Stage, from_arguments, stages
from step35_patch.costs.optimizer_state import model_bytes
from step35_patch.costs.schedule import held
from step35_patch.costs.weights import Parameters, stage_weights
from step35_patch.model.description import Step35Runtime

_MEGABYTE = 1024**2


def _launch(runtime: Step35Runtime, args: Any) -> Launch:
    """What the arguments ask for, of a model that may have been described without them."""
    asked = from_arguments(args)
    return replace(asked, gate_layout=runtime.gate_layout, window=runtime.window)


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


def rank_parameters(runtime: Step35Runtime, args: Any) -> list[Parameters]:
    """The parameters of a rank of each pipeline stage, under Megatron's arguments.

    Router biases are buffers, and not counted. What is whole on every tensor-parallel rank (norms,
    routers) counts on each; a stage with the MTP layers has a copy of the embedding.
    """
    launch = _launch(runtime, args)
    found = stages(launch)
    return [
        Parameters.of(weights_of_rank(runtime.config, launch, found, pp))
        for pp in range(launch.pipeline_model_parallel_size)
    ]


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
    """Bytes of weights, gradients and optimizer state of the most loaded rank (`model_bytes`)."""
    launch = _launch(runtime, args)
    found, sizes, ranks = stages(launch), [], []
    for pp in range(launch.pipeline_model_parallel_size):
        weights = list(weights_of_rank(runtime.config, launch, found, pp))
        ranks.append(Parameters.of(weights))
        sizes.append(sum(model_bytes(weights, launch)))
    if verbose:
        _print_totals(runtime, args)
        most = ranks[sizes.index(max(sizes))]
        print(f"Number of parameters in most loaded shard in billions: {most.total / 1e9:.4f}")
        for pp, (parameters, size) in enumerate(zip(ranks, sizes, strict=True)):
            print(
                f"Step-3.5 pipeline stage {pp}: {parameters.dense / 1e9:.4f} B parameters and "
                f"{parameters.expert / 1e9:.4f} B of experts on a rank, {size / _MEGABYTE:.1f} MB"
            )
    return float(max(sizes))


def _print_totals(runtime: Step35Runtime, args: Any) -> None:
    """The model's parameters, in the words of Megatron's report."""
    config, launch = runtime.config, whole_model(_launch(runtime, args))
    mtp_layers = launch.mtp_num_layers
    [stage] = stages(launch)
    of_block = Stage(pp=0, decoder_layers=stage.decoder_layers)
    model = Parameters.of(stage_weights(config, launch, stage))
    block = Parameters.of(stage_weights(config, launch, of_block))
    embeddings = (2 + mtp_layers) * launch.padded_vocab_size * config.hidden_size
    idle = 0
    if config.moe_num_experts and config.moe_top_k:
        idle = block.expert - block.expert * config.moe_top_k // config.moe_num_experts
    lines = {
        "Number of parameters in transformer block": block.total,
        "Number of active parameters in transformer block": block.total - idle,
        "Number of parameters in mtp block": model.total - block.total - embeddings,
        "Number of parameters in embedding layers": embeddings,
        "Total number of parameters": model.total,
        "Total number of active parameters": model.total - idle,
    }
    if not mtp_layers:
        del lines["Number of parameters in mtp block"]
    for text, number in lines.items():
        print(f"{text} in billions: {number / 1e9:.2f}")


def compute_activation_memory(
    runtime: Step35Runtime,
    args: Any,
    num_microbatches: int | None,
    verbose: bool = False,
) -> float:
    """Bytes of activations of the most loaded rank at the peak of the schedule.

    Counted as by `step35-patch estimate`: by what Transformer Engine's modules keep with fused
    attention, or those of the local implementation on a CPU.

    Args:
        runtime: the model.
        args: Megatron's arguments.
        num_microbatches: of an iteration; None: enough to fill the pipeline.
        verbose: print each stage's share.
    """
    launch = _launch(runtime, args)
    if num_microbatches is None:
        # No stage is further ahead than two micro-batches for each that is behind it.
        num_microbatches = 3 * launch.pipeline_model_parallel_size
    batch = num_microbatches * launch.micro_batch_size * launch.data_parallel_size
    launch = replace(launch, global_batch_size=batch)
    found, sizes = stages(launch), []
    for pp in range(launch.pipeline_model_parallel_size):
        own = tuple(stage for stage in found if stage.pp == pp)
        sizes.append(peak_activations(runtime.config, launch, own))
        if verbose:
            print(
                f"Step-3.5 pipeline stage {pp}: {held(launch, pp):.2f} micro-batches in flight, "
                f"{sizes[-1] / _MEGABYTE:.1f} MB of activations"
            )
    return max(sizes)
