"""The launch that several commands are given: a script, or a command behind --."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from step35_patch.launch.command import TrainingCommand
    from step35_patch.launch.shell import Call


@dataclass
class GivenLaunch:
    """What was read.

    Attributes:
        command: the call of the training program.
        notes: what of a script was not followed.
        loose: what stands in it as a command of its own, and begins with an option.
    """

    command: TrainingCommand
    notes: list[str] = field(default_factory=list)
    loose: list[Call] = field(default_factory=list)


def add_script_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --call and --set, which say what a script alone does not."""
    parser.add_argument(
        "--call", metavar="N", type=int, help="which training program's call of it is meant, from 1"
    )
    parser.add_argument(
        "--set",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="a variable that the script takes from elsewhere; may be repeated",
    )


def read_launch(options: argparse.Namespace, script: Path | None) -> GivenLaunch:
    """Read a script, or the words behind --.

    Args:
        options: with those of `add_script_arguments`, and `words`.
        script: its path; None for the words alone.

    Raises:
        UnreadableLaunch: there is nothing that could be looked at.
    """
    from step35_patch.launch.command import chosen, from_words, loose_words
    from step35_patch.launch.errors import UnreadableLaunch

    given = {}
    for pair in options.set:
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier():
            raise UnreadableLaunch(f"--set: expected NAME=VALUE, found {pair!r}")
        given[name] = value
    if script is None:
        if given or options.call is not None:
            raise UnreadableLaunch("--set and --call: expected a script with them, found none")
        return GivenLaunch(from_words(options.words))
    from step35_patch.launch.shell import read_script

    calls, notes = read_script(script, options.words, given)
    return GivenLaunch(chosen(calls, str(script), options.call), notes, loose_words(calls))


def without_a_gpu() -> None:
    """Let Megatron be imported as on a machine with GPUs, and use none.

    Before torch and Megatron are imported.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from step35_patch import cpu

    cpu.install()
