"""Bytes that a rank sends to others in a step, by kind of parallelism.

Of ring algorithms: a collective over n ranks sends (n - 1) / n of what it gathers or scatters, and
an all-reduce twice that. Backward sends what forward sends, and what is gathered again for the
gradients of weights; full recomputation sends forward's once more. Not counted: losses and norms,
the tokens of each expert, checkpoints, data.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from step35_patch.config.layer_plan import LayerPlan
from step35_patch.config.model import Step35Config
from step35_patch.costs.launch import DTYPE_BYTES, Launch, Stage, layer_plans
from step35_patch.costs.weights import Kind, stage_weights


class Sent(NamedTuple):
    """Bytes a step, of one rank.

    Attributes:
        tensor: Hidden states between tensor-parallel ranks, around attention, MLPs and outputs.
        context: Keys and values, or heads, between context-parallel ranks.
        expert: Tokens to their experts and back; over expert-tensor-parallel ranks too.
        pipeline: Hidden states and their gradients between stages.
        data: Gradients, and weights with a distributed optimizer.
        embedding: Gradients of the embedding and its copy.
    """

    tensor: float = 0.0
    context: float = 0.0
    expert: float = 0.0
    pipeline: float = 0.0
    data: float = 0.0
    embedding: float = 0.0


def sent_by_rank(config: Step35Config, launch: Launch, stages: Iterable[Stage], pp: int) -> Sent:
    """What a rank of pipeline stage `pp` sends in a step of all its micro-batches.

    Args:
        config: The model.
        launch: The layout.
        stages: All of `step35_patch.costs.launch.stages`.
        pp: The pipeline rank.
    """
    stages = list(stages)
    own = [stage for stage in stages if stage.pp == pp]
    plans = layer_plans(config, launch.window)
    layers = [plans[index] for stage in own for index in stage.layers]
    micro_batches = launch.num_microbatches
    return Sent(
        tensor=micro_batches * _tensor(config, launch, layers, own),
        context=micro_batches * sum(_context(plan, launch) for plan in layers),
        expert=micro_batches * sum(_expert(config, launch) for plan in layers if plan.is_moe),
        pipeline=micro_batches * _pipeline(config, launch, stages, pp),
        data=_data(config, launch, own),
        embedding=_embedding(config, launch, stages, own),
    )


def _ring(size: int) -> float:
    """The share of a whole that a rank sends, gathering or scattering it over `size` ranks."""
    return (size - 1) / size


def _hidden(config: Step35Config, launch: Launch) -> int:
    """Bytes of the hidden states of a micro-batch, whole over tensor-parallel ranks."""
    return launch.tokens_of_microbatch * config.hidden_size * DTYPE_BYTES[launch.precision]


def _forwards(launch: Launch) -> int:
    """How often a layer's forward pass runs for one backward pass."""
    return 2 if launch.recompute_granularity == "full" else 1


def _tensor(
    config: Step35Config, launch: Launch, layers: list[LayerPlan], own: list[Stage]
) -> float:
    whole = _hidden(config, launch) * _ring(launch.tensor_model_parallel_size)
    # Forward gathers what goes into a pair of matrices and scatters what comes out. Backward does
    # so once in the other direction, and gathers what went in again. Without sequence parallelism
    # there is one all-reduce, of twice the size, in each direction.
    forward = 2
    backward = 3 if launch.sequence_parallel else 2
    of_pair = forward * _forwards(launch) + backward
    # A layer has two pairs, attention and its MLP or shared expert; an MTP layer has eh_proj, too,
    # whose output is gathered and scattered.
    pairs = sum(3 if plan.is_mtp else 2 for plan in layers)
    outputs = sum(1 + launch.mtp_num_layers for stage in own if stage.output)
    # An output matrix gathers its input, twice with the backward pass, and scatters its gradient.
    ends = 3 * outputs + 2 * sum(stage.embedding or bool(stage.mtp_layers) for stage in own)
    return whole * (pairs * of_pair + ends)


def _context(plan: LayerPlan, launch: Launch) -> float:
    size = launch.context_parallel_size
    bytes_of_head = plan.kv_channels * DTYPE_BYTES[launch.precision] * launch.tokens_of_microbatch
    bytes_of_head //= launch.tensor_model_parallel_size
    heads, groups = plan.num_attention_heads, plan.num_query_groups
    if plan.window_size is not None and groups % (size * launch.tensor_model_parallel_size) == 0:
        # a2a: q, k and v for other heads, and the output back.
        heads_around = _ring(size) * (2 * heads + 2 * groups) * bytes_of_head
        return heads_around * (_forwards(launch) + 1)
    # p2p, where attention is full, and all_gather: keys and values go to all ranks; backward, they
    # do so again, and their gradients come back.
    forward = (size - 1) * 2 * groups * bytes_of_head
    return forward * (_forwards(launch) + 2)


def _expert(config: Step35Config, launch: Launch) -> float:
    tokens = _hidden(config, launch)
    if launch.sequence_parallel:
        tokens //= launch.tensor_model_parallel_size
    copies = tokens * (config.moe_top_k or 0)
    over = launch.expert_tensor_parallel_size
    # Sent to their ranks; gathered by each that has a part of an expert, and scattered.
    once = copies * (_ring(launch.expert_model_parallel_size) + over - 1)
    return 2 * once * (_forwards(launch) + 1)


def _pipeline(config: Step35Config, launch: Launch, stages: list[Stage], pp: int) -> float:
    if launch.pipeline_model_parallel_size == 1:
        return 0.0
    state = _hidden(config, launch)
    if launch.sequence_parallel:
        state //= launch.tensor_model_parallel_size
    # Behind the MTP layers their states go along with the decoder's.
    first_mtp = next((i for i, stage in enumerate(stages) if stage.mtp_layers), len(stages))
    sent = 0
    for number, stage in enumerate(stages):
        if stage.pp == pp:
            widths = [1 + launch.mtp_num_layers * (at >= first_mtp) for at in (number - 1, number)]
            sent += widths[1] * (number < len(stages) - 1)  # states, forward
            sent += widths[0] * (number > 0)  # their gradients, backward
    return state * sent


def _data(config: Step35Config, launch: Launch, own: list[Stage]) -> float:
    gradient = 4 if launch.accumulate_allreduce_grads_in_fp32 else DTYPE_BYTES[launch.precision]
    # With a distributed optimizer gradients are scattered and weights gathered; else gradients are
    # scattered and gathered.
    both = gradient * 2
    if launch.is_distributed:
        both = gradient + DTYPE_BYTES[launch.precision]
    sent = 0.0
    for weight in (weight for stage in own for weight in stage_weights(config, launch, stage)):
        is_expert = weight.kind is Kind.EXPERT
        ranks = launch.expert_data_parallel_size if is_expert else launch.dense_data_parallel_size
        sent += weight.total * both * _ring(ranks)
    return sent


def _embedding(
    config: Step35Config, launch: Launch, stages: list[Stage], own: list[Stage]
) -> float:
    holders = {stage.pp for stage in stages if stage.embedding or stage.mtp_layers}
    if len(holders) == 1 or own[0].pp not in holders:
        return 0.0
    rows = launch.padded_vocab_size // launch.tensor_model_parallel_size
    gradient = 4 if launch.accumulate_allreduce_grads_in_fp32 else DTYPE_BYTES[launch.precision]
    return 2 * _ring(len(holders)) * rows * config.hidden_size * gradient
