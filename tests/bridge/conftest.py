"""Processes with Megatron-Bridge, whose versions of other packages are not the tests' own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.bridge_on_cpu import FOLDER, TRANSFORMER_ENGINE
from support.ranks import Ranks


@pytest.fixture(scope="session")
def bridge_ranks(tmp_path_factory) -> Iterator[Ranks]:
    """Ranks that have `support.bridge_worker` imported."""
    search = [FOLDER, TRANSFORMER_ENGINE, Path(__file__).parents[1], os.environ.get("PYTHONPATH")]
    variables = os.environ | {
        "PYTHONPATH": os.pathsep.join(str(path) for path in search if path),
        "CUDA_VISIBLE_DEVICES": "",
    }
    folder = tmp_path_factory.mktemp("bridge-ranks")
    ranks = Ranks(folder, "from support import bridge_worker", variables)
    yield ranks
    ranks.close()
