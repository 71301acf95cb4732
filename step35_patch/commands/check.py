"""`step35-patch check`: a launch command or script held against a config, without a GPU."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from step35_patch.commands.config_argument import add_config_argument, read_config
from step35_patch.commands.launch_input import add_script_arguments, read_launch, without_a_gpu
from step35_patch.commands.upstream_notices import without_upstream_notices

if TYPE_CHECKING:
    from step35_patch.config.model import Step35Config
    from step35_patch.launch.check import Report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `step35-patch check`."""
    add_config_argument(parser)
    parser.add_argument("--script", metavar="FILE", type=Path, help="a launch script for bash")
    add_script_arguments(parser)
    parser.add_argument("--gpus", metavar="N", type=int, help="how many there are")
    parser.add_argument(
        "--gpu-memory", metavar="GIB", type=float, help="of each, to hold the fullest rank against"
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.usage = (
        "step35-patch check [-h] [--script FILE] [--call N] [--set NAME=VALUE] [--gpus N] "
        "[--gpu-memory GIB] [--json] CONFIG [-- ARGS ...]"
    )
    parser.epilog = (
        "ARGS: the launch command, or its program's arguments alone; with --script, the script's "
        "own arguments."
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print what is wrong; returns the exit status, as `--help` says."""
    config = read_config(options)
    if config is None:
        return 2
    from step35_patch.launch.errors import UnreadableLaunch

    try:
        report = _report(config, options)
    except UnreadableLaunch as error:
        print(f"step35-patch check: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(as_json(report), indent=1))
    else:
        from step35_patch.commands.check_text import print_report

        print_report(report, config)
    return 1 if report.problems else 0


def _report(config: Step35Config, options: argparse.Namespace) -> Report:
    launch = read_launch(options, options.script)
    without_a_gpu()
    from step35_patch.launch.check import check

    with without_upstream_notices():
        report = check(
            config,
            launch.command,
            gpus=options.gpus,
            gpu_memory=options.gpu_memory,
            loose=launch.loose,
        )
    report.notes[:0] = launch.notes
    return report


def as_json(report: Report) -> dict[str, Any]:
    """Everything as one object."""
    return {
        "ok": not report.problems,
        "problems": [
            {"argument": p.argument, "expected": p.expected, "found": p.found, "fix": p.fix}
            for p in report.problems
        ],
        "notes": report.notes,
        "stages": [
            {"pp": stage.pp, "vpp": stage.vpp, "layers": list(stage.layers)}
            for stage in report.stages
        ],
    }
