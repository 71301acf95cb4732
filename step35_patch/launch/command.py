"""The training program's command line among what a script starts: processes, program, arguments.

A launch is torchrun (or `python -m torch.distributed.run`) with a program, or a program itself
under srun, mpirun or alone. torchrun's own parser reads torchrun's options.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from step35_patch.launch.errors import UnreadableLaunch
from step35_patch.launch.shell import Call
from step35_patch.launch.values import shown, unknowns

_PYTHON = re.compile(r"python[\d.]*")
_TORCHRUN_MODULES = ("torch.distributed.run", "torch.distributed.launch")
# A program without torchrun before it is one of these by its name, or called through this package.
_TRAINS = re.compile(r"(pre)?train|finetune|sft")
_PACKAGE = "step35_patch"


@dataclass(frozen=True)
class TrainingCommand:
    """One call of a training program.

    Attributes:
        program: its file, or a module's name; empty where only arguments were given.
        arguments: the program's own.
        environment: variables that are set for it.
        through_package: whether it is started by `-m step35_patch`, which activates the patch.
        nodes: how many machines; None if it is not known.
        processes_per_node: likewise.
        place: where it stands.
    """

    program: str
    arguments: tuple[str, ...]
    environment: Mapping[str, str]
    through_package: bool = False
    nodes: int | None = None
    processes_per_node: int | None = None
    place: str = "the command line"

    @property
    def world_size(self) -> int | None:
        """All processes; None if it is not known."""
        if self.nodes is None or self.processes_per_node is None:
            return None
        return self.nodes * self.processes_per_node

    def __str__(self) -> str:
        words = " ".join(map(shown, self.arguments[:4]))
        return f"{self.place}: {shown(self.program)} {words} ..."


def from_words(words: Sequence[str]) -> TrainingCommand:
    """The command that a user typed: a whole one, or the program's arguments alone.

    Raises:
        UnreadableLaunch: it is neither.
    """
    if not words:
        raise UnreadableLaunch("expected the launch command or its arguments behind --, found none")
    if words[0].startswith("-"):
        return TrainingCommand("", tuple(words), {})
    environment = {}
    rest = list(words)
    while rest and (match := re.fullmatch(r"([A-Za-z_]\w*)=(.*)", rest[0], re.DOTALL)):
        environment[match[1]] = match[2]
        rest.pop(0)
    found = _training(Call(tuple(rest), environment, "the command line"))
    if found is None:
        raise UnreadableLaunch(
            f"expected a call of torchrun or of a training program, found {' '.join(words)[:80]!r}"
        )
    return found


def chosen(calls: Sequence[Call], source: str, number: int | None) -> TrainingCommand:
    """The training program's call among all that a script makes.

    Args:
        calls: of the script.
        source: its name.
        number: which one is meant, from 1, where there are several.

    Raises:
        UnreadableLaunch: there is none, or it is not clear which one is meant.
    """
    found = [command for call in calls if (command := _training(call)) is not None]
    if not found:
        others = ", ".join(sorted({os.path.basename(call.words[0]) for call in calls})) or "nothing"
        raise UnreadableLaunch(
            f"{source}: expected a call of torchrun or of a training program such as "
            f"pretrain_gpt.py, found that it starts {shown(others)}"
        )
    listed = "".join(f"\n  {place}. {command}" for place, command in enumerate(found, 1))
    if number is None and len(found) > 1:
        raise UnreadableLaunch(
            f"{source}: {len(found)} training programs are started; say which one is meant by "
            f"--call N:{listed}"
        )
    if number is not None and not 1 <= number <= len(found):
        raise UnreadableLaunch(
            f"--call: expected 1 to {len(found)}, found {number}. {source} starts:{listed}"
        )
    return found[(number or 1) - 1]


def loose_words(calls: Sequence[Call]) -> list[Call]:
    """Calls that begin with an option: what a comment or an empty line has cut from its command."""
    return [call for call in calls if call.words[0].startswith("--")]


def _training(call: Call) -> TrainingCommand | None:
    words = call.words
    for at, word in enumerate(words):
        name = os.path.basename(word)
        if name == "torchrun":
            return _under_torchrun(call, words[:at], words[at + 1 :])
        if _PYTHON.fullmatch(name) or name.endswith(".py"):
            start = at if name.endswith(".py") else at + 1
            return _under_python(call, words[:at], words[start:])
    return None


def _under_python(
    call: Call, before: Sequence[str], words: Sequence[str]
) -> TrainingCommand | None:
    rest = list(words)
    while rest and rest[0].startswith("-") and rest[0] not in ("-m", "-c"):
        rest.pop(0)  # such as -u
    if rest[:1] == ["-m"] and rest[1:2] and rest[1] in _TORCHRUN_MODULES:
        return _under_torchrun(call, before, rest[2:])
    program, arguments, through_package = _program(rest)
    if program is None or not (through_package or _TRAINS.search(os.path.basename(program))):
        return None
    nodes, tasks = _of_wrapper(before, call.environment)
    return TrainingCommand(
        program, arguments, call.environment, through_package, nodes, tasks, call.place
    )


def _program(words: Sequence[str]) -> tuple[str | None, tuple[str, ...], bool]:
    """A program, its arguments, and whether this package starts it."""
    if words[:1] == ["-m"] or words[:1] == ("-m",):
        if words[1:2] and words[1] == _PACKAGE:
            program, arguments, _ = _program(words[2:])
            return program, arguments, True
        return (words[1], tuple(words[2:]), False) if len(words) > 1 else (None, (), False)
    if not words or words[0] == "-c":
        return None, (), False
    return words[0], tuple(words[1:]), False


def _under_torchrun(
    call: Call, before: Sequence[str], words: Sequence[str]
) -> TrainingCommand | None:
    from torch.distributed.run import get_args_parser

    parser = get_args_parser()
    parser.exit_on_error = False
    parser.error = _refuse  # type: ignore[method-assign]  # which would print, and end the process
    for action in parser._actions:
        if action.type is int:
            action.type = _number
    try:
        options = parser.parse_args(list(words))
    except (argparse.ArgumentError, SystemExit) as error:
        raise UnreadableLaunch(f"{call.place}: torchrun: {shown(str(error))}") from error
    rest = [options.training_script, *options.training_script_args]
    program, arguments, through_package = _program(["-m", *rest] if options.module else rest)
    if program is None:
        return None
    nodes = 1 if options.standalone else _count(str(options.nnodes).rpartition(":")[2])
    if nodes is None and not unknowns(str(options.nnodes)):
        nodes = _of_wrapper(before, call.environment)[0]
    return TrainingCommand(
        program,
        arguments,
        call.environment,
        through_package,
        nodes,
        _count(str(options.nproc_per_node)),
        call.place,
    )


def _of_wrapper(
    words: Sequence[str], environment: Mapping[str, str]
) -> tuple[int | None, int | None]:
    """Machines and processes on each: of srun's or mpirun's options, else of the environment."""
    pairs = dict(itertools.pairwise(words))
    pairs |= dict(word.split("=", 1) for word in words if word.startswith("--") and "=" in word)

    def option(*names: str) -> int | None:
        return next((_count(pairs[name]) for name in names if name in pairs), None)

    nodes = option("-N", "--nodes")
    tasks = option("-n", "--ntasks", "-np", "--np")
    each = option("--ntasks-per-node")
    if each is None and tasks is not None:
        nodes, each = (1, tasks) if not nodes else (nodes, tasks // nodes)
    if each is None and (world := _count(environment.get("WORLD_SIZE", ""))) is not None:
        nodes, each = 1, world
    if not words and nodes is None and each is None:
        return 1, 1
    return nodes, each


def _refuse(message: str) -> NoReturn:
    raise argparse.ArgumentError(None, message)


def _number(word: str) -> int | str:
    return word if unknowns(word) else int(word)


def _count(word: str) -> int | None:
    return int(word) if word.isdigit() and int(word) > 0 else None
