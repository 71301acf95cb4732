"""The CONFIG argument, which several commands have."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from step35_patch.config.model import Step35Config

_PUBLISHED = "step-3.5-flash"


def add_config_argument(parser: argparse.ArgumentParser) -> None:
    """Give a command its CONFIG, which `read_config` reads."""
    parser.add_argument(
        "config",
        metavar="CONFIG",
        help=f"a config.json, a folder with one, or {_PUBLISHED} for the published model's",
    )


def read_config(options: argparse.Namespace) -> Step35Config | None:
    """The config that a command was given; None if it is not usable, which has been said then."""
    from step35_patch.config.model import Step35Config, Step35ConfigError, packaged_config_path

    path = Path(options.config)
    if options.config == _PUBLISHED and not path.exists():
        path = packaged_config_path()
    try:
        return Step35Config.from_pretrained(path)
    except Step35ConfigError as error:
        print(error, file=sys.stderr)
        return None
