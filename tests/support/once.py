"""Set-ups that all processes of one test run share: made by the first, awaited by the others."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest


def once(tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """The folder that `make` fills, called once in a test run, however many workers it has.

    Args:
        tmp_path_factory: pytest's.
        name: of the folder, and so of the set-up.
        make: fills the folder, which exists and is empty. One that failed is not tried again: the
            others fail as well.
    """
    run = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # each worker has a folder in that of the run
        run = run.parent
    folder, made = run / f"shared-{name}", run / f"shared-{name}.made"
    with open(run / f"shared-{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            assert not folder.exists(), f"{name}: setting it up failed in another process"
            folder.mkdir()
            make(folder)
            made.touch()
    return folder
