"""Megatron-Core asks for a CUDA device even on its CPU paths; the stand-in plays it here."""

from collections.abc import Iterator

import pytest
import torch

pytest.register_assert_rewrite("support")

from support.ranks import Ranks, worker_ranks  # noqa: E402

if not torch.cuda.is_available():
    from step35_patch import cpu

    cpu.install()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The slow tests first, so that no worker is left alone with one at the end of a run."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def _one_seed():
    torch.manual_seed(1234)


@pytest.fixture(scope="session")
def ranks(tmp_path_factory) -> Iterator[Ranks]:
    ranks = worker_ranks(tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.close()
