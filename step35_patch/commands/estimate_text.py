"""What a person reads of `step35-patch estimate`: tables on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from step35_patch.commands.tables import print_table
from step35_patch.costs.search import OPTIONS, best_of_sizes

if TYPE_CHECKING:
    from step35_patch.costs.estimate import Estimate
    from step35_patch.costs.search import Found

_GIB = 2**30


def print_estimate(found: Estimate, gpu_memory: float | None) -> None:
    """Print all of it on standard output."""
    launch = found.launch
    print(
        f"parameters {found.total_parameters} of the model, and {found.router_biases} router biases"
    )
    sizes = {
        "TP": launch.tensor_model_parallel_size,
        "PP": launch.pipeline_model_parallel_size,
        "VPP": launch.virtual_pipeline_model_parallel_size or 1,
        "CP": launch.context_parallel_size,
        "EP": launch.expert_model_parallel_size,
        "ETP": launch.expert_tensor_parallel_size,
        "DP": launch.data_parallel_size,
    }
    print(
        f"{launch.world_size} GPUs: {', '.join(f'{name} {n}' for name, n in sizes.items())}; "
        f"{launch.num_microbatches} micro-batches of {launch.micro_batch_size} x "
        f"{launch.seq_length} tokens; {launch.precision}, {launch.optimizer}"
    )
    columns = (
        *("stage", "layers", "parameters", "weights", "grads", "optim.", "activ.", "all"),
        "in flight",
    )
    rows = []
    for rank in found.ranks:
        layers = ", ".join(_range(stage.layers) for stage in rank.stages)
        held = (rank.weights, rank.gradients, rank.optimizer, rank.activations, rank.memory)
        rows.append(
            (
                f"{rank.pp}",
                layers,
                f"{rank.parameters.total}",
                *(f"{size / _GIB:.2f}" for size in held),
                f"{rank.micro_batches:.2f}",
            )
        )
    print_table(
        "a rank of each pipeline stage: memory in GiB, micro-batches in flight",
        columns,
        rows,
    )
    total = sum(found.flops_per_token.values())
    print_table(
        "operations of a token, forward and backward",
        ("part", "GFLOP", "share"),
        [
            *(
                (part.replace("_", " "), f"{count / 1e9:.2f}", f"{count / total:.1%}")
                for part, count in found.flops_per_token.items()
            ),
            ("all", f"{total / 1e9:.2f}", "100.0%"),
        ],
    )
    kinds = found.ranks[0].sent._fields
    print_table(
        "sent by a rank in a step, in GiB",
        ("stage", *kinds),
        [(f"{rank.pp}", *(f"{sent / _GIB:.2f}" for sent in rank.sent)) for rank in found.ranks],
    )
    if gpu_memory is not None:
        free = gpu_memory - found.memory / _GIB
        words = (
            f"fits, {free:.1f} GiB are left"
            if free >= 0
            else f"does not fit: {-free:.1f} GiB too much"
        )
        print(f"{gpu_memory:g} GiB: {words}; not counted are fragmentation, NCCL, workspaces, CUDA")


def _range(layers: Sequence[int]) -> str:
    if not layers:
        return "-"
    return f"{layers[0]}" if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"


def print_search(fitting: Sequence[Found], gpus: int, gpu_memory: float, limit: int | None) -> None:
    """Print the best layouts, or that there is none."""
    if not fitting:
        print(
            f"no layout fits on {gpus} GPUs of {gpu_memory:g} GiB, with full recomputation, a "
            "distributed optimizer and bf16 gradients: use more GPUs, or a shorter --seq-length"
        )
        return
    every, fitting = len(fitting), best_of_sizes(fitting)
    used = [option for option in OPTIONS if any(option in one.needs for one in fitting)]
    for number, option in enumerate(used, 1):
        print(f"needs {number}: {option}")
    columns = ("", "TP", "PP", "VPP", "CP", "EP", "ETP", "DP", "GiB", "score", "needs", "layout")
    rows = []
    for number, one in enumerate(fitting[:limit], 1):
        launch = one.launch
        rows.append(
            (
                f"{number}",
                f"{launch.tensor_model_parallel_size}",
                f"{launch.pipeline_model_parallel_size}",
                f"{launch.virtual_pipeline_model_parallel_size or 1}",
                f"{launch.context_parallel_size}",
                f"{launch.expert_model_parallel_size}",
                f"{launch.expert_tensor_parallel_size}",
                f"{launch.data_parallel_size}",
                f"{one.memory / _GIB:.1f}",
                f"{one.score:.2f}",
                " ".join(f"{used.index(option) + 1}" for option in one.needs) or "-",
                launch.pipeline_model_parallel_layout or "-",
            )
        )
    print_table(
        f"{every} layouts fit on {gpus} GPUs: {len(fitting)} sizes with their best VPP, best first",
        columns,
        rows,
    )
