"""What can be wrong with weights on the disk, as exceptions that name every problem."""

from __future__ import annotations

import os
from collections.abc import Iterable


class CheckpointError(ValueError):
    """Files that are not the checkpoint of the config.

    Args:
        path: Of the checkpoint.
        problems: Everything that is wrong with it, each in a line.

    Attributes:
        problems: The same, as a tuple.
    """

    def __init__(self, path: str | os.PathLike[str], problems: Iterable[str]) -> None:
        self.problems = tuple(problems)
        shown = "\n  ".join(self.problems)
        super().__init__(f"{path}: {len(self.problems)} problem(s) with the checkpoint:\n  {shown}")


class OutputBusyError(RuntimeError):
    """Another run is writing the same output."""
