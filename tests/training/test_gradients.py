"""Every gradient, loss and weight is one process's, under every layout and what is trained on.

Real processes, gloo, Megatron-Core's schedules and optimizer: tests/support/gradient_worker.py.
"""

from __future__ import annotations

import pytest
from support.gradient_cases import CASES, Refused, hold, write_start
from support.once import once

pytestmark = pytest.mark.slow

# With each Megatron-Core; the others run with the newest only.
EVERY_VERSION = (
    "tp2 with sequence parallelism",
    "virtual pipeline: 8 micro-batches, prompts masked",
    "virtual pipeline: TransformerConfig's own way of sending",
    "context parallel: prompts masked, per token",
    "context parallel: all but the last 1/8 masked, per token",
    "data parallel: distributed optimizer, overlaps",
    "pipeline: decoupled learning rate",
    "pipeline: packed in padded slots",
    "MTP layers on the first stage",
    "MTP layers alone on a middle stage",
    "MTP layers alone on a middle stage: default embedding ranks",
)
# What is known to be wrong, by case; each is to be mended or refused.
STATES = {
    "MTP layers on the first stage": "two copies of the embedding on one rank are trained apart",
}


def _marks(name: str) -> list[pytest.MarkDecorator]:
    marks = [pytest.mark.megatron] if name in EVERY_VERSION else []
    if name in STATES:
        marks.append(pytest.mark.xfail(strict=True, reason=STATES[name]))
    return marks


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return once(tmp_path_factory, "gradients-start", write_start)


@pytest.mark.parametrize("name", [pytest.param(name, marks=_marks(name)) for name in CASES])
def test_one_process_s(start, ranks, tmp_path, tmp_path_factory, name):
    case = CASES[name]
    found = hold(
        case, start, ranks, tmp_path, lambda shared, make: once(tmp_path_factory, shared, make)
    )
    if isinstance(found, Refused):  # what the case allows
        return
    assert found.missing == []
    assert found.gradient.difference < case.tolerance, found
    assert found.change.difference < 1e-3, found
    assert found.log.difference < 1e-5, found
    assert found.norm < 1e-5, found
