"""Megatron-Core asks for a CUDA device even on its CPU paths; the stand-in plays it here."""

import itertools
from collections.abc import Iterator

import pytest
import torch

pytest.register_assert_rewrite("support")

from support import figures, implementation  # noqa: E402
from support.ranks import Ranks, worker_ranks  # noqa: E402

if not torch.cuda.is_available():
    implementation.install()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The slow tests first, so that no worker is left alone with one at the end of a run.

    Those that are about Transformer Engine alone only where it is tested.
    """
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)
    if not implementation.ON_TRANSFORMER_ENGINE:
        marked = (item.get_closest_marker("transformer_engine") for item in items)
        elsewhere = [mark is not None and mark.kwargs.get("only", False) for mark in marked]
        config.hook.pytest_deselected(items=[*itertools.compress(items, elsewhere)])
        items[:] = [item for item, other in zip(items, elsewhere, strict=True) if not other]


@pytest.fixture(autouse=True)
def _one_seed():
    torch.manual_seed(1234)


@pytest.fixture(autouse=True)
def _figures(record_property):
    """See `support.figures`."""
    figures.take()
    yield
    if taken := figures.take():
        named = {f"{figures.PREFIX}{name}": value for name, value in taken.items()}
        for name, value in (figures.versions() | named).items():
            record_property(name, value)


@pytest.fixture(scope="session")
def ranks(tmp_path_factory) -> Iterator[Ranks]:
    ranks = worker_ranks(tmp_path_factory.mktemp("ranks"))
    yield ranks
    ranks.close()
