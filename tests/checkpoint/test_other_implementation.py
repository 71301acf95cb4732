"""Training goes on from a checkpoint of the other implementation, with its optimizer's state.

Real processes, gloo; Transformer Engine's own Python, whose kernels tests/support/te_on_cpu stands
in for.
"""

from __future__ import annotations

import json

import pytest
import torch
from support.figures import record
from support.gradient_cases import Case, write_start
from support.once import once
from support.ours import build
from torch.distributed.checkpoint.api import CheckpointException

pytestmark = pytest.mark.transformer_engine(only=True)

LOCAL = {"transformer_impl": "local", "moe_grouped_gemm": False}
GROUPED = {"transformer_impl": "transformer_engine", "moe_grouped_gemm": True}
SEQUENTIAL = GROUPED | {"moe_grouped_gemm": False}
# The default goes by the order of the parameters, which differs: it is refused at the arguments.
FULLY_RESHARDABLE = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": False,
}


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return once(tmp_path_factory, "resume-start", write_start)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layout", "first", "second"),
    [
        pytest.param("tp2 with sequence parallelism", LOCAL, GROUPED, marks=pytest.mark.megatron),
        pytest.param("expert parallel", GROUPED, LOCAL, marks=pytest.mark.megatron),
        ("expert parallel: distributed optimizer", LOCAL, SEQUENTIAL),
        ("pipeline", SEQUENTIAL, LOCAL),
        ("expanded gate, tp2", GROUPED, SEQUENTIAL),
    ],
)
def test_training_goes_on(start, ranks, tmp_path, layout, first, second):
    layout, _, distributed = layout.partition(": ")
    case = Case(layout, distributed_optimizer=bool(distributed))
    spec = json.dumps(case.spec() | {"sharding": FULLY_RESHARDABLE if distributed else {}})
    code = "from support import resume_worker; resume_worker.main(*arguments)"
    arguments = start, tmp_path, spec, json.dumps(first), json.dumps(second)
    ended = ranks.run(code, case.processes, *arguments)
    assert not any(ended.statuses), ended.text[-4000:]
    found = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    assert len(found) == case.processes
    for rank in found:
        for what, tolerance in (("gradients", 1e-4), ("changes", 1e-3)):
            worst = max(rank[what], key=rank[what].__getitem__)
            print(what, worst, rank[what][worst])
            assert record(what, rank[what][worst]) < tolerance, (what, worst, rank[what][worst])
        for log, wanted in zip(rank["logs"], rank["wanted logs"], strict=True):
            assert log == pytest.approx(wanted, rel=2e-6)


@pytest.mark.megatron
def test_states_that_may_hold_data_are_not_dropped(start, tmp_path, monkeypatch):
    """Those of linear layers, which FP8 fills: read where they are, and missed where they are not.

    A norm's, which is empty, may be missing.
    """
    from megatron.core import dist_checkpointing

    model, other = build(start), build(start)
    qkv = "decoder.layers.1.self_attention.linear_qkv"
    scales = torch.arange(5, dtype=torch.uint8)
    monkeypatch.setattr(model.get_submodule(qkv), "get_extra_state", lambda: scales)
    found = []
    monkeypatch.setattr(other.get_submodule(qkv), "set_extra_state", found.append)

    def load(*without: str) -> dict:
        state = model.sharded_state_dict()
        for name in without:
            del state[f"{name}._extra_state"]
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        dist_checkpointing.save(state, str(folder))
        return dist_checkpointing.load(other.sharded_state_dict(), str(folder))

    norms = [
        name.removesuffix(".weight")
        for name, weight in model.named_parameters()
        if weight.dim() == 1 and name.endswith(".weight")
    ]
    assert len(norms) > 20
    for without in ([], norms):
        other.load_state_dict(load(*without), strict=True)
        assert torch.equal(found.pop(), scales)
    with pytest.raises(CheckpointException, match=f"{qkv}._extra_state"):
        load(qkv)
