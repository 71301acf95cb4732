"""Small random models under each split over two processes: one process's logits and gradients."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.config_strategies import plain_documents
from support.fuzzing import fuzzed
from support.gradient_cases import FULL as RECOMPUTED
from support.gradient_cases import LOCAL, Case
from support.random_layouts import Layout, halvable, layouts
from support.ranks import Ranks
from support.reference import random_weights, write_hf_folder

pytestmark = pytest.mark.slow
LAYOUTS_A_MODEL = 3
LOGITS, GRADIENTS, LOSSES = 2e-5, 1e-4, 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("random")


@fuzzed(0.006)
@given(data=st.data(), plain=plain_documents().map(halvable))
def test_a_random_model_is_the_same_under_its_layouts(ranks, folder, data, plain):
    chosen = st.lists(
        st.sampled_from(layouts(plain)),
        min_size=LAYOUTS_A_MODEL,
        max_size=LAYOUTS_A_MODEL,
        unique_by=repr,
    )
    gates = st.sampled_from([{}, {"gate_layout": "expanded"}])
    recomputed = st.sampled_from([{}, {}, RECOMPUTED])
    some = [layout | data.draw(gates) | data.draw(recomputed) for layout in data.draw(chosen)]
    _hold(ranks, folder, plain, some)


def _hold(ranks: Ranks, folder: Path, plain: dict, some: list[Layout]) -> None:
    shutil.rmtree(folder)
    write_hf_folder(folder, plain, random_weights(plain, 13))
    code = "from support import random_layouts_worker; random_layouts_worker.main(*arguments)"
    spec = asdict(Case("one process"))
    alone = folder / "alone.pt"
    ended = ranks.run(code, 1, folder, "", alone, json.dumps({"": spec | {"layout": LOCAL}}))
    assert not any(ended.statuses), ended.text[-6000:]
    specs = json.dumps({json.dumps(layout): spec | {"layout": layout} for layout in some})
    ended = ranks.run(code, 2, folder, alone, folder, specs)
    assert not any(ended.statuses), ended.text[-6000:]
    found = [json.loads(file.read_text()) for file in sorted(folder.glob("[01].json"))]
    assert len(found) == 2
    for layout in found[0]:
        assert any(rank[layout]["logits"] >= 0 for rank in found), layout
        for rank in found:
            assert rank[layout]["logits"] < LOGITS, (layout, rank[layout])
            assert rank[layout]["gradients"] < GRADIENTS, (layout, rank[layout])
            assert rank[layout]["losses"] < LOSSES, (layout, rank[layout])
