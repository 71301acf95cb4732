"""Weights in and out, and the loss, under each parallel layout: real processes, gloo."""

from __future__ import annotations

import json
import re

import pytest
from support.provider_layouts import LAYOUTS
from support.reference import (
    WINDOW,
    Reference,
    random_tokens,
    random_weights,
    tiny_config,
    write_hf_folder,
)

pytestmark = pytest.mark.slow
# With each Megatron-Core; the others run with the newest only.
EVERY_VERSION = ("virtual pipeline", "expanded gate, tp2")


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    config = tiny_config()
    weights = random_weights(config, 21)
    folder = write_hf_folder(tmp_path_factory.mktemp("hf"), config, weights)
    tokens = random_tokens(1, 2, 3 * WINDOW)
    _, loss, _ = Reference(config, weights).losses(*tokens)
    return folder, loss.item()


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.megatron] if n in EVERY_VERSION else []) for n in LAYOUTS],
)
def test_layout(case, ranks, tmp_path, name):
    folder, loss = case
    processes, layout, layers = LAYOUTS[name]
    arguments = folder, tmp_path / "out", repr(loss), json.dumps(layout)
    code = "from support import distributed_worker; distributed_worker.main(*arguments)"
    ended = ranks.run(code, processes, *arguments)
    assert ended.statuses == [0] * processes, ended.text[-8000:]
    found = dict(re.findall(r"rank (\d) layers (\[.*?\]) ok", ended.text))
    assert sorted(found) == [str(rank) for rank in range(processes)], ended.text[-2000:]
    if layers:
        assert [json.loads(found[str(rank)]) for rank in range(processes)] == layers
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
