"""Processes with Megatron-Bridge, whose versions of other packages are not the tests' own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# See tools/run.py.
FOLDER = Path(sys.prefix, "megatron-bridge")
TRANSFORMER_ENGINE = Path(sys.prefix, "transformer-engine")

needs_bridge = pytest.mark.skipif(
    not FOLDER.exists(), reason="Megatron-Bridge could not be set up: see tools/run.py"
)


def environment(**variables: str) -> dict[str, str]:
    """This process's, with Megatron-Bridge's folder and the tests' on the path."""
    search = [FOLDER, TRANSFORMER_ENGINE, Path(__file__).parents[1], os.environ.get("PYTHONPATH")]
    own = {
        "PYTHONPATH": os.pathsep.join(str(path) for path in search if path),
        "CUDA_VISIBLE_DEVICES": "",
    }
    return os.environ | own | variables


def output_of(code: str, *arguments: object, **variables: str) -> str:
    """What a process of its own prints that runs the code."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment(**variables),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
