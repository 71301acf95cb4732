"""A launch held against a config: every problem at once, before a GPU is booked.

What a run would refuse or fill in at its start is asked of the same functions
(`step35_patch.patch.parse_args.complete`, Megatron's parser, Megatron's own checks). What comes on
top is what a run finds out later, or one by one.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from step35_patch import settings as process
from step35_patch.arguments import megatron_options
from step35_patch.config.model import Step35Config
from step35_patch.config.plain_file import read_plain
from step35_patch.config.problem import Problem
from step35_patch.costs.estimate import Estimate, estimate
from step35_patch.costs.launch import (
    Launch,
    LaunchError,
    Stage,
    fewest_ranks,
    from_arguments,
    stages,
)
from step35_patch.costs.layout_problems import launch_problems
from step35_patch.launch.command import TrainingCommand
from step35_patch.launch.parsing import read_arguments, without_options
from step35_patch.launch.recipe import recipe_notes
from step35_patch.launch.shell import Call
from step35_patch.launch.sizes import number_problems, sample_problems
from step35_patch.launch.upstream import upstream_problems
from step35_patch.launch.values import shown, unknowns
from step35_patch.patch.activation import activate
from step35_patch.patch.arguments import given_on, installed_problems
from step35_patch.patch.parse_args import YAML, complete

_GIB = 2**30
_LARGEST_PROGRAM = 4 * 2**20


@dataclass
class Report:
    """What was found.

    Attributes:
        problems: what cannot stay as it is; the launch is right if there is none.
        notes: what is legal, and was perhaps not meant.
        command: the launch.
        launch: how it is laid out; None if it cannot be.
        estimate: what it costs, likewise.
        stages: which layers are where, in the order of the pipeline; empty if it could not be said.
    """

    command: TrainingCommand
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    launch: Launch | None = None
    estimate: Estimate | None = None
    stages: list[Stage] = field(default_factory=list)


def check(
    config: Step35Config,
    command: TrainingCommand,
    *,
    gpus: int | None = None,
    gpu_memory: float | None = None,
    loose: Sequence[Call] = (),
) -> Report:
    """Hold a launch against a config.

    Megatron is imported, with the stand-in for CUDA; no process group is made and no model built.

    Args:
        config: the model.
        command: the launch.
        gpus: how many there are; None if the command says so.
        gpu_memory: GiB of each; None if it does not matter.
        loose: what stands in the script as a command of its own, and begins with an option.
    """
    report = Report(command)
    report.problems += [
        Problem(
            call.words[0],
            "an argument of the command before it",
            f"a command of its own ({call.place})",
            "take away the comment, the empty line or the missing backslash before it",
        )
        for call in loose
    ]
    report.problems += _activation_problems(command)
    parsed = read_arguments(command.arguments)
    report.problems += parsed.problems
    report.notes += parsed.notes
    args = parsed.args
    args.rank, args.world_size = 0, gpus or command.world_size or 0
    given = given_on(parsed.parser, parsed.words)
    if "yaml_cfg" in given:
        report.problems.append(YAML)
        return report
    settings, problems = _settings(config, command, args)
    report.problems += problems
    problems = complete(args, given, settings, parsed.parser)
    report.problems += problems
    contradicting = {problem.argument for problem in problems} & megatron_options(config).keys()
    if contradicting:  # the rest is held against what the config has in their place
        parsed = without_options(parsed, contradicting)
        args, given = parsed.args, given_on(parsed.parser, parsed.words)
        args.rank, args.world_size = 0, gpus or command.world_size or 0
        complete(args, given, settings, parsed.parser)
    report.notes += [f"in this environment: {problem}" for problem in installed_problems(args)]
    report.problems += [*number_problems(command, gpus), *sample_problems(args, config)]
    report.notes += recipe_notes(args, given, config)
    _lay_out(args, config, report)
    flagged = {name for p in report.problems for name in p.argument.split(", ")}
    divisors = {f"--{name}-parallel-size" for name in ("tensor-model", "pipeline-model", "context")}
    if divisors & flagged:
        flagged.add("--world-size")  # which Megatron-Core divides by them
    if gpu_memory is not None and (problem := _memory_problem(report, gpu_memory)) is not None:
        report.problems.append(problem)
    if args.world_size:
        _make_active(settings)
        report.problems += upstream_problems(args, command.environment, flagged)
    if unread := [word for word in command.arguments if unknowns(word)]:
        words = ", ".join(dict.fromkeys(map(shown, unread)))
        report.notes.append(f"not known, and not looked at: {words}")
    return report


def _make_active(settings: process.Settings) -> None:
    """Let Megatron's own functions be this package's too, for this model."""
    choices = settings.gate_layout, settings.window, settings.padded_logits
    if process.enabled():  # with its wrappers in place, which takes a second
        process.ask_for(settings.config, *choices)
    else:
        gate_layout, window, padded_logits = choices
        activate(
            settings.config, gate_layout=gate_layout, window=window, padded_logits=padded_logits
        )


def _settings(
    config: Step35Config, command: TrainingCommand, args: Any
) -> tuple[process.Settings, list[Problem]]:
    """What the launch asks for of this package; what is not legal counts as not given."""
    problems = []

    def choice[Choice: str](name: str, legal: tuple[Choice, ...]) -> Choice:
        variable = f"STEP35_{name.upper()}"
        asked = getattr(args, f"step35_{name}") or command.environment.get(variable) or legal[0]
        for value in legal:
            if value == asked:
                return value
        problems.append(Problem(variable, " or ".join(legal), shown(asked), "correct it"))
        return legal[0]

    settings = process.Settings(
        config,
        choice("gate_layout", process.GATE_LAYOUTS),
        choice("window", process.WINDOWS),
        choice("padded_logits", process.PADDED_LOGITS),
        "CONFIG",
    )
    return settings, problems


def _activation_problems(command: TrainingCommand) -> list[Problem]:
    """Whether the launch would train Step-3.5 at all."""
    if not command.program:
        return []
    problems = []
    variables = command.environment
    switch = variables.get("STEP35_PATCH", "")
    if switch not in ("", "0", "1") and not unknowns(switch):
        problems.append(Problem("STEP35_PATCH", "1 or 0", shown(switch), "set it to 1"))
    elif not (switch == "1" or command.through_package or _imports_package(command.program)):
        problems.append(
            Problem(
                "STEP35_PATCH",
                "1 in the environment of the training program, without which stock Megatron-Core "
                "builds another model",
                shown(switch) or "none",
                "export STEP35_PATCH=1, or start it by -m step35_patch",
            )
        )
    named = any(word.partition("=")[0] == "--step35-config" for word in command.arguments)
    if not named and not variables.get("STEP35_CONFIG"):
        problems.append(
            Problem(
                "STEP35_CONFIG",
                "the path of the config, without which the patch is inert",
                "none",
                "export STEP35_CONFIG=PATH, or give --step35-config PATH",
            )
        )
    return problems


def _imports_package(program: str) -> bool:
    """Whether a program that can be read here imports this package itself."""
    if unknowns(program) or not os.path.isfile(program):
        return False
    try:
        tree = ast.parse(read_plain(program, _LARGEST_PROGRAM))
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return any(name.partition(".")[0] == "step35_patch" for name in names)


def _lay_out(args: Any, config: Step35Config, report: Report) -> None:
    """Which layers are where, and what it costs; what stands in the way is a problem."""
    sizes = (
        *(args.tensor_model_parallel_size, args.pipeline_model_parallel_size),
        *(args.context_parallel_size, args.micro_batch_size or 0),
    )
    if args.seq_length is None or min(sizes) < 1:  # said already; nothing can be divided by them
        return
    try:
        launch = from_arguments(args)
    except LaunchError as error:
        report.problems += error.problems
        return
    known = {problem.argument for problem in report.problems}
    if not args.world_size:  # said already; a number that all sizes go into
        launch = dataclasses.replace(
            launch,
            world_size=fewest_ranks(
                tensor=launch.tensor_model_parallel_size,
                pipeline=launch.pipeline_model_parallel_size,
                context=launch.context_parallel_size,
                expert=launch.expert_model_parallel_size,
                expert_tensor=launch.expert_tensor_parallel_size,
            ),
        )
    report.problems += [
        problem for problem in launch_problems(config, launch) if problem.argument not in known
    ]
    with contextlib.suppress(LaunchError):  # whose problems are among those
        report.stages = stages(launch)
    if not report.problems:
        report.launch = launch
        report.estimate = estimate(config, launch)


def _memory_problem(report: Report, gpu_memory: float) -> Problem | None:
    """That the fullest rank needs more than a GPU has, if it does."""
    if report.estimate is None or report.estimate.memory <= gpu_memory * _GIB:
        return None
    fullest = max(report.estimate.ranks, key=lambda rank: rank.memory)
    parts = {name: getattr(fullest, name) for name in ("weights", "gradients", "optimizer")}
    parts["activations"] = fullest.activations
    largest = max(parts, key=lambda name: parts[name])
    return Problem(
        "--gpu-memory",
        f"at most {gpu_memory:g} GiB on each GPU, without what fragmentation, NCCL and workspaces "
        "take",
        f"{fullest.memory / _GIB:.1f} GiB on pipeline rank {fullest.pp}, "
        f"{parts[largest] / _GIB:.1f} of them {largest}",
        {
            "activations": "cut sequences by --context-parallel-size, or use another layout "
            "(step35-patch estimate --search lists those that fit)"
            if report.estimate.launch.recompute_granularity == "full"
            else "recompute more (--recompute-granularity full --recompute-method uniform "
            "--recompute-num-layers 1), or cut sequences by --context-parallel-size",
            "optimizer": "add --use-distributed-optimizer, or use more ranks",
        }.get(largest, "use more --expert-model-parallel-size or --pipeline-model-parallel-size"),
    )
