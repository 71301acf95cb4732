"""The `step35-patch` command. Each subcommand loads what it needs, and nothing else."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from step35_patch.commands import convert as convert_cli
from step35_patch.verify import api as compare

if TYPE_CHECKING:
    from step35_patch.config.model import Step35Config

_PUBLISHED = "step-3.5-flash"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, 1 for a config that cannot be used.

    Args:
        argv: The arguments without the program's name; the process's own if None.

    Raises:
        SystemExit: Wrong usage (status 2) or `--help`, as argparse does.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Its arguments are its own (`demo --help` too), so argparse does not get to see them.
    if arguments[:1] == ["demo"]:
        from step35_patch.commands import demo

        return demo.main(arguments[1:])
    options = _parser().parse_args(arguments)
    try:
        status = options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader, such as `head`, has enough. What is left in the buffer has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="step35-patch", description="Train Step-3.5 with stock Megatron-Core."
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    inspect = commands.add_parser(
        "inspect",
        help="show a config layer by layer, with exact parameter and byte counts",
        description="Show what each layer of a config computes, and exact totals. Needs no torch.",
    )
    _add_config(inspect)
    inspect.add_argument("--json", action="store_true", help="print everything as JSON")
    inspect.set_defaults(run=_inspect)
    arguments = commands.add_parser(
        "args",
        help="print Megatron's arguments for a config, ready for a launch script",
        description="Print the arguments of pretrain_gpt.py that describe a config's model.",
    )
    _add_config(arguments)
    arguments.set_defaults(run=_args)
    convert = commands.add_parser(
        "convert",
        help="convert weights between the published layout and Megatron's, in little memory",
        description="Convert weights losslessly, without a GPU, on one machine.",
    )
    convert_cli.add_arguments(convert)
    verify = commands.add_parser(
        "verify",
        help="compare with transformers on the same tokens, layer by layer",
        description="Run transformers' Step-3.5 and this package's on the same tokens, one layer of "
        "each at a time, and say where they part.",
    )
    compare.add_arguments(verify)
    verify.set_defaults(run=compare.run)
    commands.add_parser(
        "demo", help="train a tiny Step-3.5 on this machine, CPU included", add_help=False
    )
    return parser


def _add_config(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "config",
        metavar="CONFIG",
        help=f"a config.json, a folder with one, or {_PUBLISHED} for the published model's",
    )


def _config(path: str) -> Step35Config | None:
    """The config that a command was given; None if it is not usable, which was said then."""
    from step35_patch.config.model import Step35Config, Step35ConfigError, packaged_config_path

    if path == _PUBLISHED and not os.path.exists(path):
        path = packaged_config_path()
    try:
        return Step35Config.from_pretrained(path)
    except Step35ConfigError as error:
        print(error, file=sys.stderr)
        return None


def _inspect(options: argparse.Namespace) -> int:
    from step35_patch.commands.inspect import as_json, as_text

    if (config := _config(options.config)) is None:
        return 1
    print(as_json(config) if options.json else as_text(config))
    return 0


def _args(options: argparse.Namespace) -> int:
    from step35_patch.arguments import megatron_options

    if (config := _config(options.config)) is None:
        return 1
    lines = [
        option if value is None else f"{option} {shlex.quote(value)}"
        for option, value in megatron_options(config).items()
    ]
    print(" \\\n".join(lines))
    return 0
