"""How many examples the fuzzing tests try, and how long one may take.

    STEP35_TEST_EXAMPLES=20000 python -m pytest tests/config/test_fuzzed_configs.py

tries so many, others in each run. Without it they are few, and the same in every run.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

from hypothesis import HealthCheck, settings

VARIABLE = "STEP35_TEST_EXAMPLES"
IS_LONG = VARIABLE in os.environ
EXAMPLES = int(os.environ.get(VARIABLE, "500"))


class TookTooLong(BaseException):
    """An example that hung. No Exception, which the tested code might take for one of its own."""


def fuzzed(share: float = 1.0, at_least: int = 1) -> settings:
    """Hypothesis's settings of a test that has a share of the examples."""
    return settings(
        max_examples=count(share, at_least),
        derandomize=not IS_LONG,
        database=None,
        deadline=None,
        print_blob=IS_LONG,
        suppress_health_check=list(HealthCheck),
    )


def count(share: float, at_least: int = 1) -> int:
    """A share of the examples."""
    return max(at_least, round(share * EXAMPLES))


@contextlib.contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise `TookTooLong` if the block has not ended in time. Main thread only."""

    def give_up(number: int, frame: FrameType | None) -> NoReturn:
        raise TookTooLong(f"more than {seconds} s")

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
