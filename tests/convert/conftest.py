from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.conversion_runs import Server
from support.conversion_world import Direction, World, make_world, tree
from support.converted import weights_of
from support.reference import tiny_config, write_hf_folder


@pytest.fixture(scope="session")
def server(tmp_path_factory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("logs"))
    yield server
    server.close()


@pytest.fixture(scope="session")
def world(tmp_path_factory, server) -> World:
    return make_world(tmp_path_factory.mktemp("world"), server)


@pytest.fixture(params=["to-megatron", "to-hf"])
def direction(request, world) -> Iterator[Direction]:
    """A direction whose inputs must be the same afterwards."""
    chosen = world.directions[request.param]
    before = tree(chosen.source), tree(chosen.hf)
    yield chosen
    assert (tree(chosen.source), tree(chosen.hf)) == before, "an input was changed"


@pytest.fixture
def case(tmp_path):
    """A config, its weights, and the folder of both."""
    config = tiny_config(torch_dtype="bfloat16", architectures=["Step3p5ForCausalLM"])
    weights = weights_of(config)
    return config, weights, write_hf_folder(tmp_path / "hf", config, weights)
