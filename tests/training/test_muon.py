"""Muon orthogonalizes the published matrices one at a time, under every layout.

Real processes, gloo, Megatron-Core's own Muon; the reference is tests/support/reference_muon.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.figures import record
from support.gradient_cases import Case, write_start
from support.once import once

pytest.importorskip("emerging_optimizers")
pytestmark = pytest.mark.slow

# There with grouped experts.
ON_BOTH = pytest.mark.transformer_engine

MUON = {
    "optimizer": "muon",
    # Weights that are rounded to fp32 must not hide what was added to them.
    "lr": 0.05,
    "muon_momentum": 0.95,
    "muon_coefficient_type": "polar_express",
    "muon_num_ns_steps": 6,
    "muon_scale_mode": "spectral",
    "muon_extra_scale_factor": 0.2,
    "muon_fp32_matmul_prec": "highest",
    "muon_tp_mode": "duplicated",
}
EXPANDED = {"gate_layout": "expanded"}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return once(tmp_path_factory, "muon-start", write_start)


def errors(
    ranks, start: Path, folder: Path, layout: str, mode: str, **spec: Any
) -> dict[str, float]:
    """Each Muon's tensor's relative error, on the rank where it is worst."""
    overrides = spec.pop("overrides", {})
    case = Case(layout, overrides, optimizer=MUON | {"muon_tp_mode": mode})
    code = "from support import muon_worker; muon_worker.main(*arguments)"
    folder.mkdir()
    ended = ranks.run(code, case.processes, start, json.dumps(case.spec() | spec), folder)
    assert not any(ended.statuses), ended.text[-4000:]
    worst: dict[str, float] = {}
    for path in folder.iterdir():
        for name, error in json.loads(path.read_text()).items():
            worst[name] = max(error, worst.get(name, 0.0))
    return worst


@pytest.mark.parametrize(
    ("layout", "mode", "overrides"),
    [
        pytest.param("one process", "duplicated", {}, marks=pytest.mark.megatron),
        pytest.param("one process", "duplicated", EXPANDED, marks=[pytest.mark.megatron, ON_BOTH]),
        pytest.param("tp2 with sequence parallelism", "duplicated", {}, marks=pytest.mark.megatron),
        ("tp2 with sequence parallelism", "duplicated", EXPANDED),
        ("tp2 with sequence parallelism", "distributed", EXPANDED),
        ("tp2 with sequence parallelism", "blockwise", {}),
        pytest.param("tp2, ep2, etp1", "distributed", {}, marks=ON_BOTH),
        ("virtual pipeline", "duplicated", {}),
    ],
)
def test_each_published_matrix_by_itself(start, ranks, tmp_path, layout, mode, overrides):
    found = errors(ranks, start, tmp_path / "out", layout, mode, overrides=overrides)
    worst = max(found, key=found.__getitem__)
    print(f"worst of {len(found)}: {worst} {found[worst]:.1e}")
    assert {name.split(".", 3)[-1] for name in found} >= {
        "self_attn.q_proj.weight",
        "self_attn.g_proj.weight",
        "moe.gate.weight",
        "moe.up_proj.weight",
        "share_expert.down_proj.weight",
        "eh_proj.weight",
    }
    assert record("change", found[worst]) < 1e-4, found


def test_merged_weights_are_noticed(start, ranks, tmp_path):
    """The same without this package's part, with which Megatron-Core's weights are the matrices."""
    found = errors(ranks, start, tmp_path / "out", "one process", "duplicated", stock=True)
    by_kind: dict[str, list[float]] = {}
    for name, error in found.items():
        by_kind.setdefault(name.split(".")[-2], []).append(error)
    for kind in ("q_proj", "k_proj", "v_proj", "g_proj", "gate_proj", "up_proj"):
        assert min(by_kind[kind]) > 0.1, (kind, by_kind[kind])
    for kind in ("o_proj", "down_proj", "gate", "eh_proj"):
        assert max(by_kind[kind]) < 1e-4, (kind, by_kind[kind])
