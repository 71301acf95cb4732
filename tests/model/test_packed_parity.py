"""Packed documents under context parallelism compute what transformers does of each by itself.

Real processes, gloo, padded slots. The documents are shorter than the window, as long, one token
longer, and longer; all features of the model are on.
"""

from __future__ import annotations

import json

import pytest
from support.gradient_cases import Case
from support.layout_runs import layout_config
from support.reference import random_weights, write_hf_folder

pytestmark = pytest.mark.slow


def _compared(ranks, folder, layout: str, window: int, seed: int, **overrides) -> list[dict]:
    """What each rank found. The lengths of the documents are 7, 13 and 20."""
    config = layout_config() | {"sliding_window": window}
    start = write_hf_folder(folder / "hf", config, random_weights(config, seed))
    case = Case(layout, overrides, per_token=True, documents="slots", samples=2)
    out = folder / "out"
    out.mkdir()
    code = "from support import packed_worker; packed_worker.main(*arguments)"
    ended = ranks.run(code, case.processes, start, json.dumps(case.spec()), out)
    assert not any(ended.statuses), ended.text[-4000:]
    return [json.loads(path.read_text()) for path in out.iterdir()]


@pytest.mark.parametrize(
    ("layout", "window", "seed", "overrides"),
    [
        pytest.param("context parallel", 13, 11, {}, marks=pytest.mark.megatron),
        ("context parallel", 12, 12, {"gate_layout": "expanded"}),
        ("cp4", 13, 13, {}),
        ("cp4", 5, 14, {}),
        ("tp2 and cp2", 12, 15, {}),
    ],
)
def test_documents_are_transformers_own(ranks, tmp_path, layout, window, seed, overrides):
    for found in _compared(ranks, tmp_path, layout, window, seed, **overrides):
        gradients = found["gradients"]
        worst = max(gradients, key=gradients.__getitem__)
        print(f"logits {found['logits']:.1e}, {worst} {gradients[worst]:.1e}")
        assert len(gradients) > 100
        assert found["logits"] < 2e-5
        assert gradients[worst] < 1e-3, worst
