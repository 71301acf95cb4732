"""Every gradient, loss and weight is one process's, under every layout and what is trained on.

Real processes, gloo, Megatron-Core's schedules and optimizer: tests/support/gradient_worker.py.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from support.gradient_cases import CASES, EVERY_VERSION, Figures, Refused, hold, write_start
from support.once import once

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return once(tmp_path_factory, "gradients-start", write_start)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.megatron] if name in EVERY_VERSION else [])
        for name in CASES
    ],
)
def test_one_process_s(start, ranks, tmp_path, tmp_path_factory, name):
    case = CASES[name]
    found = hold(
        case, start, ranks, tmp_path, lambda shared, make: once(tmp_path_factory, shared, make)
    )
    if case.refusal is not None:
        assert isinstance(found, Refused)
        return
    assert isinstance(found, Figures)
    assert found.missing == []
    assert found.gradient.difference < case.tolerance, found
    assert found.change.difference < 1e-3, found
    assert found.log.difference < 1e-5, found
    assert found.norm < 1e-5, found


def test_figures_are_of_these_cases():
    """`python tools/gradients.py` measures them again."""
    tool = Path(__file__).parents[2] / "tools" / "gradients.py"
    spec = importlib.util.spec_from_file_location("gradients_tool", tool)
    gradients = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(gradients)
    rows = gradients.rows()
    assert {row["case"] for row in rows} == set(CASES)
    assert gradients.document(rows) == gradients.DOCUMENT.read_text()
    assert not any(row["missing"] for row in rows)
