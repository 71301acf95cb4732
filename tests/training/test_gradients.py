"""Every gradient, loss and weight is one process's, under every layout and what is trained on.

Real processes, gloo, Megatron-Core's schedules and optimizer: tests/support/gradient_worker.py.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import pytest
from support.figures import record
from support.gradient_cases import (
    CASES,
    ENGINE_CASES,
    ENGINE_EVERY_VERSION,
    ENGINE_FAULTS,
    EVERY_VERSION,
    Case,
    Figures,
    Refused,
    hold,
    write_start,
)
from support.once import once

pytestmark = pytest.mark.slow


def _each(cases: Iterable[str], every_version: tuple[str, ...]):
    return [
        pytest.param(name, marks=[pytest.mark.megatron] if name in every_version else [])
        for name in cases
    ]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return once(tmp_path_factory, "gradients-start", write_start)


@pytest.fixture
def held(start, ranks, tmp_path, tmp_path_factory):
    """Runs a case, and compares it with its reference."""

    def run(case: Case) -> Figures | Refused:
        return hold(case, start, ranks, tmp_path, lambda *made: once(tmp_path_factory, *made))

    return run


@pytest.mark.parametrize("name", _each(CASES, EVERY_VERSION))
def test_one_process_s(held, name):
    case = CASES[name]
    found = held(case)
    if case.refusal is not None:
        assert isinstance(found, Refused)
        return
    assert_one_process_s(found, case)


@pytest.mark.transformer_engine(only=True)
@pytest.mark.parametrize("name", _each(ENGINE_CASES, ENGINE_EVERY_VERSION))
def test_one_process_s_on_transformer_engine(held, name):
    """Of Megatron-Core's own layers."""
    assert_one_process_s(held(ENGINE_CASES[name]), ENGINE_CASES[name])


@pytest.mark.transformer_engine(only=True)
@pytest.mark.parametrize("fault", ENGINE_FAULTS)
def test_a_fault_of_some_ranks_is_seen(held, fault):
    case = ENGINE_CASES[ENGINE_FAULTS[fault]]
    with pytest.raises(AssertionError, match="Figures"):
        assert_one_process_s(held(replace(case, fault=fault)), case)


def assert_one_process_s(found: Figures | Refused, case: Case) -> None:
    assert isinstance(found, Figures)
    assert found.missing == []
    assert found.gradient.difference < case.tolerance, found
    assert found.change.difference < 1e-3, found
    assert found.log.difference < 1e-5, found
    assert found.norm < 1e-5, found
    record("gradient", found.gradient.difference)


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
