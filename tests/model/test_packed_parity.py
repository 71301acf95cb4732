"""Packed documents under context parallelism compute what transformers does of each by itself.

Real processes, gloo, padded slots. The documents are shorter than the window, as long, one token
longer, and longer; all features of the model are on. On Transformer Engine each layer communicates
as `cp_comm_type` says; on torch that changes nothing.
"""

from __future__ import annotations

import json

import pytest
from support.figures import record
from support.gradient_cases import Case
from support.implementation import ON_TRANSFORMER_ENGINE
from support.layout_runs import layout_config
from support.reference import random_weights, write_hf_folder

pytestmark = pytest.mark.slow
ON_BOTH = pytest.mark.transformer_engine

# Of the decoder's layers, of which the first and the fifth have no window.
RING = ["p2p", "a2a", "all_gather", "a2a", "p2p", "all_gather"]
GATHER = ["all_gather", "all_gather", "a2a", "all_gather", "a2a", "a2a"]
# As pretrain_gpt.py has it by default.
FUSED_ROPE = {"apply_rope_fusion": ON_TRANSFORMER_ENGINE}


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
    ("layout", "window", "seed", "kinds", "overrides"),
    [
        pytest.param("context parallel", 13, 11, RING, {}, marks=[pytest.mark.megatron, ON_BOTH]),
        pytest.param(
            "context parallel", 12, 12, GATHER, {"gate_layout": "expanded"}, marks=ON_BOTH
        ),
        pytest.param("cp4", 13, 13, RING, FUSED_ROPE, marks=ON_BOTH),
        ("cp4", 5, 14, GATHER, {}),
        pytest.param("tp2 and cp2", 12, 15, RING, FUSED_ROPE, marks=ON_BOTH),
    ],
)
def test_documents_are_transformers_own(ranks, tmp_path, layout, window, seed, kinds, overrides):
    for found in _compared(ranks, tmp_path, layout, window, seed, cp_comm_type=kinds, **overrides):
        # The MTP layers have the last sliding layer's.
        expected = [*kinds, kinds[-1], kinds[-1]] if ON_TRANSFORMER_ENGINE else [None] * 8
        assert found["cp_comm_type"] == expected
        gradients = found["gradients"]
        worst = max(gradients, key=gradients.__getitem__)
        print(f"logits {found['logits']:.1e}, {worst} {gradients[worst]:.1e}")
        assert len(gradients) > 100
        assert record("logits", found["logits"]) < 2e-5
        assert record("gradient", gradients[worst]) < 1e-3, worst
