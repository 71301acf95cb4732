"""Numbers that tests measure on their way, for the verification card.

A comparison records how far apart things were, once that is not too far: some tests make one fail.
tests/conftest.py puts a test's numbers into its result, from which `./run test --figures` writes
benchmarks/results/verification.csv, and tools/card.py the card.
"""

from __future__ import annotations

import functools
import importlib.metadata

from support import implementation

# Of their names among a test's properties, of which some tests have others.
PREFIX = "figure: "
# What it is called, and the test's largest value.
_recorded: dict[str, float] = {}


def record(name: str, value: float) -> float:
    """Keep a number of the running test, if it is its largest of this name; returns the number.

    Args:
        name: what it is, as the card says it: "logits", "gradient", "identical tensors".
        value: a difference, or a count.
    """
    _recorded[name] = max(value, _recorded.get(name, value))
    return value


@functools.cache
def versions() -> dict[str, str]:
    """Of what is tested, by the columns of the table."""
    names = ["megatron-core", "torch", "transformers"]
    if implementation.ON_TRANSFORMER_ENGINE:
        names.append("transformer-engine")
    return {name.replace("-", "_"): importlib.metadata.version(name) for name in names}


def take() -> dict[str, float]:
    """The running test's numbers by name; none are left."""
    taken = dict(_recorded)
    _recorded.clear()
    return taken
