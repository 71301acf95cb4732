"""The `step35-patch` command: which commands there are, and how the chosen one is started.

A command is a module of `step35_patch.commands` with `add_arguments(parser)`, which sets the
parser's default `run`: a function of the parsed arguments that returns the exit status. Only the
chosen command's module is imported, so that `--help` and each command load no more than they need.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple


class _Command(NamedTuple):
    """What `step35-patch --help` and the command's own `--help` say of it.

    One that takes a command line of others gets it as `words`: all that stands behind a first --,
    which argparse would look for options and for its own arguments in.
    """

    help: str
    description: str
    takes_words: bool = False


# By the names of the modules in `step35_patch.commands`. The demo's arguments are its own
# (`demo --help` too): it has `main(argv)`, and argparse only lists it.
_COMMANDS = {
    "inspect": _Command(
        help="show a config layer by layer, with exact parameter and byte counts",
        description="Show what each layer of a config computes, and exact totals. Needs no torch.",
    ),
    "args": _Command(
        help="print Megatron's arguments for a config, ready for a launch script",
        description="Print the arguments of pretrain_gpt.py that describe a config's model.",
    ),
    "check": _Command(
        help="hold a launch script against a config, before a GPU is booked",
        description="Read a launch script or command without running it, and say everything that "
        "is wrong with it. Exit status: 0 nothing, 1 something, 2 the input could not be read.",
        takes_words=True,
    ),
    "estimate": _Command(
        help="memory, operations and messages of a parallel layout; search for layouts that fit",
        description="Count what a run costs under a parallel layout: memory of each rank, "
        "operations of a token, bytes sent in a step. Needs no GPU and no torch.",
    ),
    "rehearse": _Command(
        help="start a launch script on this CPU with the model shrunk",
        description="Start a launch command on this CPU, with fewer and smaller layers and fewer "
        "ranks, save, and resume. Exit status: 0 it starts, 1 it does not, 2 the input could not "
        "be read.",
        takes_words=True,
    ),
    "convert": _Command(
        help="convert weights between the published layout and Megatron's, in little memory",
        description="Convert weights losslessly, without a GPU, on one machine.",
    ),
    "verify": _Command(
        help="compare with transformers on the same tokens, layer by layer",
        description="Run transformers' Step-3.5 and this package's on the same tokens, one layer "
        "of each at a time, and say where they part.",
    ),
    "generate": _Command(
        help="continue prompts with a checkpoint's model, for a look at it in training",
        description="Continue prompts greedily with Megatron-Core's static engine, on a GPU or the "
        "CPU. A look at a checkpoint, no serving engine.",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status.

    0; 1 if the command could not do, or did not find, what it was asked for; 130 if it was
    interrupted.

    Args:
        argv: The arguments without the program's name; the process's own if None.

    Raises:
        SystemExit: Wrong usage (status 2) or `--help`, as argparse does.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["demo"]:
        from step35_patch.commands import demo

        return demo.main(arguments[1:])
    options = _options(arguments)
    try:
        status: int = options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader, such as `head`, has enough. What is left in the buffer has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status


def _options(arguments: list[str]) -> argparse.Namespace:
    chosen = next((word for word in arguments if word in _COMMANDS), None)
    if chosen is None or not _COMMANDS[chosen].takes_words:
        return _parser(arguments).parse_args(arguments)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    own, words = arguments[:end], arguments[end + 1 :]
    return _parser(own).parse_args(own, argparse.Namespace(words=words))


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of all commands, with the arguments of the one that is chosen."""
    chosen = next((word for word in arguments if word in _COMMANDS), None)
    parser = argparse.ArgumentParser(
        prog="step35-patch", description="Train Step-3.5 with stock Megatron-Core."
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, command in _COMMANDS.items():
        subparser = commands.add_parser(name, help=command.help, description=command.description)
        if name == chosen:
            importlib.import_module(f"step35_patch.commands.{name}").add_arguments(subparser)
    commands.add_parser(
        "demo", help="train a tiny Step-3.5 on this machine, CPU included", add_help=False
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
