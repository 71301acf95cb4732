"""`step35-patch args`: Megatron's arguments for a config, ready for a launch script."""

from __future__ import annotations

import argparse
import shlex

from step35_patch.commands.config_argument import add_config_argument, read_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `step35-patch args`."""
    add_config_argument(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print them, one a line; returns the exit status: 0, or 1 for an unusable config."""
    config = read_config(options)
    if config is None:
        return 1
    from step35_patch.arguments import megatron_options

    lines = [
        option if value is None else f"{option} {shlex.quote(value)}"
        for option, value in megatron_options(config).items()
    ]
    print(" \\\n".join(lines))
    return 0
