"""Training goes on from a checkpoint of the other implementation, with its optimizer's state.

Real processes, gloo; Transformer Engine's own Python, whose kernels tests/support/te_on_cpu stands
in for.
"""

from __future__ import annotations

import json

import pytest
from support.gradient_cases import Case, write_start
from support.once import once

pytestmark = [pytest.mark.transformer_engine(only=True), pytest.mark.slow]

LOCAL = {"transformer_impl": "local", "moe_grouped_gemm": False}
GROUPED = {"transformer_impl": "transformer_engine", "moe_grouped_gemm": True}
SEQUENTIAL = GROUPED | {"moe_grouped_gemm": False}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return once(tmp_path_factory, "resume-start", write_start)


@pytest.mark.parametrize(
    ("layout", "first", "second"),
    [
        pytest.param("tp2 with sequence parallelism", LOCAL, GROUPED, marks=pytest.mark.megatron),
        pytest.param("expert parallel", GROUPED, LOCAL, marks=pytest.mark.megatron),
        ("expert parallel", LOCAL, SEQUENTIAL),
        ("pipeline", SEQUENTIAL, LOCAL),
        ("expanded gate, tp2", GROUPED, SEQUENTIAL),
    ],
)
def test_training_goes_on(start, ranks, tmp_path, layout, first, second):
    spec = json.dumps(Case(layout).spec())
    code = "from support import resume_worker; resume_worker.main(*arguments)"
    arguments = start, tmp_path, spec, json.dumps(first), json.dumps(second)
    ended = ranks.run(code, Case(layout).processes, *arguments)
    assert not any(ended.statuses), ended.text[-4000:]
    found = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    assert len(found) == Case(layout).processes
    for rank in found:
        for what, tolerance in (("gradients", 1e-4), ("changes", 1e-3)):
            worst = max(rank[what], key=rank[what].__getitem__)
            print(what, worst, rank[what][worst])
            assert rank[what][worst] < tolerance, (what, worst, rank[what][worst])
        for log, wanted in zip(rank["logs"], rank["wanted logs"], strict=True):
            assert log == pytest.approx(wanted, rel=2e-6)
