"""Ranks with Megatron-Bridge."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.bridge_processes import environment
from support.ranks import Ranks


@pytest.fixture(scope="session")
def bridge_ranks(tmp_path_factory) -> Iterator[Ranks]:
    """Ranks that have `support.bridge_worker` imported."""
    folder = tmp_path_factory.mktemp("bridge-ranks")
    ranks = Ranks(folder, "from support import bridge_worker", environment())
    yield ranks
    ranks.close()
