"""Numbers of a launch that no layout has: its processes, and the sample that it trains on.

What must go into each other for the layout is in `step35_patch.costs.layout_problems`; what a run
looks at too, in `step35_patch.patch.arguments.layout_problems`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from step35_patch.config.model import Step35Config
from step35_patch.config.problem import Problem
from step35_patch.launch.command import TrainingCommand


def number_problems(command: TrainingCommand, gpus: int | None) -> Iterator[Problem]:
    """Whether the launch starts as many processes as there are GPUs.

    Args:
        command: the launch.
        gpus: how many there are, if the user said so.
    """
    option = "--nnodes, --nproc-per-node"
    if command.world_size is None and gpus is None:
        yield Problem(
            option,
            "a number of processes that is known",
            f"{command.nodes or 'no number'} x {command.processes_per_node or 'no number'}",
            "give --gpus N, or --set of the variables that they come from",
        )
    elif gpus is not None and command.world_size not in (None, gpus):
        yield Problem(
            option,
            f"{gpus} processes, one for each GPU (--gpus)",
            f"{command.nodes} x {command.processes_per_node} = {command.world_size}",
            "change one of the three",
        )


def sample_problems(args: Any, config: Step35Config) -> Iterator[Problem]:
    """Whether there is a sample, and no longer one than the model is for.

    Args:
        args: Megatron's parsed arguments, with the config's shapes filled in.
        config: the model.
    """
    micro = args.micro_batch_size
    if micro is None or micro < 1:
        yield Problem(
            "--micro-batch-size", "1 or more", "none" if micro is None else f"{micro}", "give it"
        )
    length, most = args.seq_length, args.max_position_embeddings
    if length is None:
        yield Problem("--seq-length", "tokens of a sample", "none", "give it")
    elif most is not None and length > most:
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
