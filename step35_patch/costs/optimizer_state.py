"""Bytes of weights, gradients and optimizer state of a rank, by Megatron-Core's optimizers.

Without what buffers are padded with, and without what a step makes for a moment.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

from step35_patch.costs.launch import DTYPE_BYTES, Launch
from step35_patch.costs.weights import Kind, Weight

_FP32 = 4
# Optimizers whose state is known here; Megatron-Core has others.
OPTIMIZERS = ("adam", "sgd", "lion", "muon", "dist_muon")


class ModelBytes(NamedTuple):
    """What a rank holds from the first step on.

    Attributes:
        weights: In the model's precision.
        gradients: Of all weights, in DistributedDataParallel's buffers.
        optimizer: Weights in fp32, if the model's are narrower, and moments.
    """

    weights: int
    gradients: int
    optimizer: int


def model_bytes(weights: Iterable[Weight], launch: Launch) -> ModelBytes:
    """What the weights of a rank take up.

    With a distributed optimizer the optimizer's part is the most that a rank of the group has.

    Raises:
        ValueError: The optimizer is none of `OPTIMIZERS`.
    """
    if launch.optimizer not in OPTIMIZERS:
        raise ValueError(
            f"--optimizer: expected {', '.join(OPTIMIZERS)}, found {launch.optimizer!r}"
        )
    weights = list(weights)
    elements = sum(weight.total for weight in weights)
    gradient = _FP32 if launch.accumulate_allreduce_grads_in_fp32 else _size(launch.precision)
    return ModelBytes(
        weights=elements * _size(launch.precision),
        gradients=elements * gradient,
        optimizer=_optimizer(weights, launch),
    )


def _size(dtype: str) -> int:
    return DTYPE_BYTES[dtype]


def _optimizer(weights: list[Weight], launch: Launch) -> int:
    is_muon = "muon" in launch.optimizer
    is_layer_wise = is_muon and launch.is_distributed
    total = 0
    for is_expert in (False, True):
        own = [weight for weight in weights if (weight.kind is Kind.EXPERT) == is_expert]
        ranks = launch.expert_data_parallel_size if is_expert else launch.dense_data_parallel_size
        kinds = (Kind.MATRIX, Kind.EXPERT) if is_muon else ()
        matrices = [weight for weight in own if weight.kind in kinds]
        scalar = sum(weight.total for weight in own if weight.kind not in kinds)
        share = -(-scalar // ranks) if launch.is_distributed else scalar
        total += share * _bytes_of_scalar(launch)
        held = sum(weight.total for weight in matrices)
        if is_layer_wise and ranks > 1:
            held = _fullest(matrices, ranks)
        total += held * (_main(launch) + _FP32)  # momentum
    return total


def _main(launch: Launch) -> int:
    """Bytes of a weight in fp32 besides the model's."""
    return 0 if launch.precision == "fp32" else _FP32


def _bytes_of_scalar(launch: Launch) -> int:
    """Of a weight that is stepped element by element."""
    if launch.optimizer in ("sgd", "lion"):
        return _main(launch) + _FP32
    if not launch.use_precision_aware_optimizer:
        return _main(launch) + 2 * _FP32
    main = _size(launch.main_params_dtype)
    if launch.precision == "bf16" and main == _FP32 and launch.store_param_remainders:
        main = 2  # of each weight, what its bf16 lacks
    if launch.precision == "fp32":
        main = 0
    return main + _size(launch.exp_avg_dtype) + _size(launch.exp_avg_sq_dtype)


def _fullest(matrices: list[Weight], ranks: int) -> int:
    """Elements on the fullest rank if whole matrices are dealt out, the largest first.

    As `LayerWiseDistributedOptimizer` does within each bucket of gradients: each goes to the rank
    that has the least.
    """
    counts: Counter[int] = Counter()
    for weight in matrices:
        counts[weight.elements] += weight.count
    return _fullest_of(tuple(sorted(counts.items(), reverse=True)), ranks)


@lru_cache(maxsize=4096)  # a search asks for the same ones again and again
def _fullest_of(counts: tuple[tuple[int, int], ...], ranks: int) -> int:
    """The same of how many matrices there are of each size, the largest first."""
    loads = [0] * ranks
    for size, count in counts:
        left = count
        if max(loads) == loads[0]:  # all ranks are alike: whole rounds go to each
            rounds, left = divmod(count, ranks)
            loads = [load + rounds * size for load in loads]
        for _ in range(left):
            heapq.heapreplace(loads, loads[0] + size)
    return max(loads)
