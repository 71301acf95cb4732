"""What the package tells a user who should know, but need not stop."""

import os
import warnings


def warn(message: str) -> None:
    """A warning, from the first rank only."""
    if os.environ.get("RANK", "0") == "0":
        warnings.warn(f"step35_patch: {message}", RuntimeWarning, stacklevel=3)
