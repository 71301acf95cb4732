# PYTHON_ARGCOMPLETE_OK
"""The `step35-patch` command: which commands there are, and how the chosen one is started.

A command is a module of `step35_patch.commands` with `add_arguments(parser)`, which sets the
parser's default `run`: a function of the parsed arguments that returns the exit status. Only the
chosen command's module is imported, so that `--help`, completion in a shell and each command load
no more than they need.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple


class _Command(NamedTuple):
    """What `step35-patch --help` and the command's own `--help` say of it.

    Attributes:
        help: In the list of commands.
        description: In its own help.
        wrong: What exit status 1 means; None if there is none.
        takes_words: Whether it gets all that stands behind a first -- as `words`: a command line of
            others, in which argparse would look for options.
    """

    help: str
    description: str
    wrong: str | None
    takes_words: bool = False


# By the names of the modules in `step35_patch.commands`.
_COMMANDS = {
    "inspect": _Command(
        help="show a config layer by layer, with exact parameter and byte counts",
        description="Show what each layer of a config computes, and exact totals, without torch. "
        "Of a folder with safetensors, compare names, shapes and dtypes too, by their headers.",
        wrong="the folder's weights are not what its config says",
    ),
    "doctor": _Command(
        help="say what a launch in this environment would meet, and what would be refused",
        description="Show versions, what is wrapped, and everything that would stop a launch here. "
        "Imports Megatron-Core in a process of its own, which takes a while. What is printed holds "
        "no user's name, home folder or host name.",
        wrong="something is wrong",
    ),
    "args": _Command(
        help="print Megatron's arguments for a config, ready for a launch script",
        description="Print the arguments of pretrain_gpt.py that describe a config's model.",
        wrong=None,
    ),
    "check": _Command(
        help="hold a launch script against a config, before a GPU is booked",
        description="Read a launch script or command without running it, and say everything that "
        "is wrong with it.",
        wrong="the launch has problems",
        takes_words=True,
    ),
    "estimate": _Command(
        help="memory, operations and messages of a parallel layout; search for layouts that fit",
        description="Count what a run costs under a parallel layout: memory of each rank, "
        "operations of a token, bytes sent in a step. Needs no GPU and no torch.",
        wrong="the model does not fit into --gpu-memory, or cannot be laid out so",
    ),
    "rehearse": _Command(
        help="start a launch script on this CPU with the model shrunk",
        description="Start a launch command on this CPU, with fewer and smaller layers and fewer "
        "ranks, save, and resume.",
        wrong="the launch does not start",
        takes_words=True,
    ),
    "convert": _Command(
        help="convert weights between the published layout and Megatron's, in little memory",
        description="Convert weights losslessly, without a GPU, on one machine.",
        wrong="nothing was written, and why not is said",
    ),
    "verify": _Command(
        help="compare with transformers on the same tokens, layer by layer",
        description="Run transformers' Step-3.5 and this package's on the same tokens, one layer "
        "of each at a time, and say where they part.",
        wrong="a part or a gradient differs",
    ),
    "generate": _Command(
        help="continue prompts with a checkpoint's model, for a look at it in training",
        description="Continue prompts greedily with Megatron-Core's static engine, on a GPU or the "
        "CPU. A look at a checkpoint, no serving engine.",
        wrong=None,
    ),
    "demo": _Command(
        help="train a tiny Step-3.5 on this machine, CPU included",
        description="Train a tiny Step-3.5 through Megatron's own training loop, on the CPU.",
        wrong="it did not train as it should",
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status.

    0; 1 if the command found something wrong, or could not do what it was asked for; 2 if it could
    not read its input; 130 if it was interrupted.

    Args:
        argv: The arguments without the program's name; the process's own if None.

    Raises:
        SystemExit: Wrong usage (status 2) or `--help`, as argparse does.
    """
    if "_ARGCOMPLETE" in os.environ:
        return _complete()
    if argv is None and isinstance(sys.stdout, io.TextIOWrapper):
        # As standard error does: a name that the terminal's encoding lacks ends no command.
        sys.stdout.reconfigure(errors="backslashreplace")
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = _options(arguments)
    try:
        status: int = options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader, such as `head`, has enough. What is left in the buffer has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return status


def _options(arguments: list[str]) -> argparse.Namespace:
    chosen = next((word for word in arguments if word in _COMMANDS), None)
    if chosen is None or not _COMMANDS[chosen].takes_words:
        return _parser(arguments).parse_args(arguments)
    end = arguments.index("--") if "--" in arguments else len(arguments)
    own, words = arguments[:end], arguments[end + 1 :]
    return _parser(own).parse_args(own, argparse.Namespace(words=words))


def _complete() -> int:
    """Answer a shell that completes words, which argcomplete has asked this process for.

    It ends the process, unless it is missing: the shell then gets nothing, and completes files.
    """
    try:
        import argcomplete
    except ImportError:
        return 1
    line = os.environ.get("COMP_LINE", "")[: int(os.environ.get("COMP_POINT", "0"))]
    argcomplete.autocomplete(_parser(line.split()[1:]))
    return 1


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of all commands, with the arguments of the one that is chosen."""
    chosen = next((word for word in arguments if word in _COMMANDS), None)
    parser = argparse.ArgumentParser(
        prog="step35-patch",
        description="Train Step-3.5 with stock Megatron-Core.",
        epilog=_exit_status("something is wrong (COMMAND --help says what)"),
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, command in _COMMANDS.items():
        subparser = commands.add_parser(
            name,
            help=command.help,
            description=command.description,
            epilog=_exit_status(command.wrong),
        )
        if name == chosen:
            importlib.import_module(f"step35_patch.commands.{name}").add_arguments(subparser)
    return parser


def _exit_status(wrong: str | None) -> str:
    found = f"1 {wrong}; " if wrong else ""
    return (
        f"Exit status: 0 fine; {found}2 the input can't be read or used, or wrong usage; "
        "130 interrupted."
    )


if __name__ == "__main__":
    sys.exit(main())
