"""What the package tells a user who should know, but need not stop."""

import os
import warnings


def say(message: str) -> None:
    """A line in the log of what was asked for, from the first rank only."""
    if _is_first_rank():
        print(f"step35_patch: {message}", flush=True)


def warn(message: str) -> None:
    """A warning, from the first rank only."""
    if _is_first_rank():
        warnings.warn(f"step35_patch: {message}", RuntimeWarning, stacklevel=3)


def _is_first_rank() -> bool:
    return os.environ.get("RANK", "0") == "0"
