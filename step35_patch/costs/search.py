"""Which layouts of a model fit on some GPUs, in the order of a stated rule.

The rule is a score in seconds a step, to compare layouts with and for nothing else: the busiest
pipeline rank's operations at `_OPERATIONS` a second, longer by the pipeline's bubble and by what is
recomputed; and what a rank sends, at `_WITHIN` bytes a second among the `_GPUS_OF_NODE` GPUs of a
node and `_BETWEEN` beyond, none of it hidden behind computation.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from step35_patch.config.model import Step35Config
from step35_patch.costs.accounting import stage_flops
from step35_patch.costs.estimate import memory_of_ranks
from step35_patch.costs.launch import Launch, stages
from step35_patch.costs.layout_problems import launch_problems
from step35_patch.costs.messages import sent_by_rank

# Of an H100 in bf16, with what large products reach of its 989 TFLOP/s; of NVLink 4 and of one
# InfiniBand adapter of 400 Gbit/s a GPU, in one direction.
_OPERATIONS, _WITHIN, _BETWEEN = 0.4 * 989e12, 0.8 * 450e9, 0.8 * 50e9
_GPUS_OF_NODE = 8
# Tensor parallelism beyond it sends too much; more stages than layers are not looked at.
_MOST_TENSOR, _MOST_VIRTUAL = 8, 6

# What is tried one after the other, each on top of those before it, until a layout fits.
_SAVINGS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("--use-distributed-optimizer", {"use_distributed_optimizer": True}),
    (
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 1",
        {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
            "recompute_modules": (),
        },
    ),
    (
        "--cross-entropy-loss-fusion --cross-entropy-fusion-impl te",
        {"cross_entropy_loss_fusion": True, "cross_entropy_fusion_impl": "te"},
    ),
    ("--grad-reduce-in-bf16", {"accumulate_allreduce_grads_in_fp32": False}),
)
OPTIONS = tuple(option for option, _ in _SAVINGS)


@dataclass(frozen=True, kw_only=True)
class Found:
    """A layout that fits.

    Attributes:
        launch: The layout, with the options that it needs.
        needs: Options that were added so that it fits.
        memory: Bytes of the fullest rank.
        score: Seconds of the rule; less is better.
    """

    launch: Launch
    needs: tuple[str, ...]
    memory: int
    score: float


def search(config: Step35Config, launch: Launch, *, gpus: int, memory: int) -> list[Found]:
    """Every layout that fits, best first.

    Options that save memory are added one by one, until a layout fits.

    Args:
        config: The model.
        launch: Batch, precision, optimizer and everything else; its layout is not used, and what
            `_SAVINGS` would add may be on already.
        gpus: How many there are.
        memory: Bytes of each.
    """
    found = [
        one
        for sizes in _candidates(config, launch, gpus)
        for candidate in _with_stages(sizes)
        if not launch_problems(config, candidate)
        and (one := _fitting(config, candidate, memory)) is not None
    ]
    return sorted(found, key=lambda one: one.score)


def best_of_sizes(found: Sequence[Found]) -> list[Found]:
    """Of layouts that differ in their virtual stages alone, the first."""
    best: dict[tuple[int, ...], Found] = {}
    for one in found:
        sizes = (
            one.launch.tensor_model_parallel_size,
            one.launch.pipeline_model_parallel_size,
            one.launch.context_parallel_size,
            one.launch.expert_model_parallel_size,
            one.launch.expert_tensor_parallel_size,
        )
        best.setdefault(sizes, one)
    return list(best.values())


def _fitting(config: Step35Config, launch: Launch, memory: int) -> Found | None:
    """The layout with the first savings that make it fit."""
    added: list[str] = []
    tried = [("", {}), *_SAVINGS]
    frugal = launch
    for _, fields in _SAVINGS:
        frugal = replace(frugal, **_allowed(frugal, fields))
    if max(memory_of_ranks(config, frugal)) > memory:
        return None
    for option, fields in tried:
        allowed = _allowed(launch, fields)
        if option and not allowed:
            continue
        launch = replace(launch, **allowed)
        added += [option] * bool(option)
        if (most := max(memory_of_ranks(config, launch))) <= memory:
            return Found(
                launch=launch, needs=tuple(added), memory=most, score=_score(config, launch)
            )
    return None


def _allowed(launch: Launch, fields: dict[str, Any]) -> dict[str, Any]:
    """The fields of a saving, or nothing if they change or save nothing in this launch."""
    alone = launch.dense_data_parallel_size == launch.expert_data_parallel_size == 1
    if "use_distributed_optimizer" in fields and alone:
        return {}
    if "accumulate_allreduce_grads_in_fp32" in fields and launch.precision != "bf16":
        return {}
    if "recompute_granularity" in fields and launch.recompute_granularity == "full":
        return {}
    if all(getattr(launch, name) == value for name, value in fields.items()):
        return {}
    return fields


def _candidates(config: Step35Config, launch: Launch, gpus: int) -> Iterator[Launch]:
    """Layouts with sizes that divide the GPUs, whether the model allows them or not."""
    divisors = _divisors(gpus)
    experts = config.moe_num_experts if config.use_moe else 1
    for pp in divisors:
        stage = gpus // pp
        for tp in (size for size in divisors if size <= _MOST_TENSOR and stage % size == 0):
            for cp in (size for size in divisors if stage % (tp * size) == 0):
                for etp in sorted({1, tp}):
                    for ep in divisors:
                        if stage % (etp * ep) or (experts or 1) % ep:
                            continue
                        yield replace(
                            launch,
                            world_size=gpus,
                            tensor_model_parallel_size=tp,
                            sequence_parallel=tp > 1,
                            pipeline_model_parallel_size=pp,
                            context_parallel_size=cp,
                            expert_model_parallel_size=ep,
                            expert_tensor_parallel_size=etp,
                        )


def _divisors(number: int) -> list[int]:
    """All of them, in their order."""
    small = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return sorted({*small, *(number // size for size in small)})


def _with_stages(launch: Launch) -> Iterator[Launch]:
    """With each number of virtual stages."""
    pp = launch.pipeline_model_parallel_size
    for virtual in range(1, _MOST_VIRTUAL + 1) if pp > 1 else (1,):
        letters = None
        if pp > 1:
            letters = _letters(launch, pp * virtual)
            if letters is None:
                return
        yield replace(
            launch,
            virtual_pipeline_model_parallel_size=None if virtual == 1 else virtual,
            pipeline_model_parallel_layout=letters,
        )


def _letters(launch: Launch, count: int) -> str | None:
    """A layout in `count` stages of equal work: MTP layers and the loss are as much as two layers.

    Where layers are left over, the first stages have one more. None if there are too few.
    """
    layers, mtp = launch.num_layers, launch.mtp_num_layers
    of_last = max(round((layers + 2) / count) - 2, 0)
    least, more = divmod(layers - of_last, count - 1)
    if least + (more == count - 1) < 1:
        return None
    parts = ["t" * (least + (number < more)) for number in range(count - 1)]
    return "|".join(["E" + parts[0], *parts[1:], "t" * of_last + "m" * mtp + "L"])


def _score(config: Step35Config, launch: Launch) -> float:
    """Seconds of a step by the rule at the top of this module."""
    found = stages(launch)
    tp, pp, cp = (
        launch.tensor_model_parallel_size,
        launch.pipeline_model_parallel_size,
        launch.context_parallel_size,
    )
    chunks = launch.virtual_pipeline_model_parallel_size or 1
    by_rank = [0.0] * pp
    for stage in found:
        by_rank[stage.pp] += stage_flops(config, launch, stage)
    again = 4 / 3 if launch.recompute_granularity == "full" else 1.0
    tokens = launch.micro_batch_size * launch.seq_length
    seconds = max(by_rank) * tokens * again / (tp * cp) / _OPERATIONS
    seconds *= launch.num_microbatches + (pp - 1) / chunks
    # Ranks that talk to each other stand next to each other in Megatron's order: tensor, context,
    # data, pipeline; of experts: tensor, expert, data, pipeline.
    spans = {
        "tensor": tp,
        "context": tp * cp,
        "expert": launch.expert_tensor_parallel_size * launch.expert_model_parallel_size,
        "data": tp * cp * launch.data_parallel_size,
        "pipeline": launch.world_size,
        "embedding": launch.world_size,
    }
    busiest = max(
        sum(
            sent / (_WITHIN if spans[kind] <= _GPUS_OF_NODE else _BETWEEN)
            for kind, sent in sent_by_rank(config, launch, found, pp_rank)._asdict().items()
        )
        for pp_rank in range(pp)
    )
    return float(seconds + busiest)
