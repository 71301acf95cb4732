"""The benchmarks' document says what their result files say, and what they share counts right."""

from __future__ import annotations

import importlib
import re
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    """Import a module of the folder as its scripts do."""
    monkeypatch.syspath_prepend(FOLDER)
    yield importlib.import_module
    for name in ("all", "paired", "render"):
        sys.modules.pop(name, None)


def test_the_readme_is_what_the_result_files_say(load):
    assert load("render").main(["--check"]) == 0


@pytest.mark.parametrize("cell", [r"\| \d+ ms \|", r"\*20\d\d-\d\d-\d\d"])
def test_another_number_in_the_readme_would_be_found(load, cell):
    text = (FOLDER / "README.md").read_text()
    spoilt = re.sub(cell, lambda found: re.sub(r"\d", "0", found[0], count=1), text, count=1)
    assert spoilt != text
    assert load("render").rendered(spoilt) == text


def test_every_script_is_in_the_readme_and_has_a_quick_run(load):
    text = (FOLDER / "README.md").read_text()
    scripts = load("all").scripts()
    assert scripts
    for name, path in scripts.items():
        assert f"| `{name}.py` |" in text
        assert "--quick" in path.read_text()


class Worker:
    """One that has measured already."""

    def __init__(self, *results):
        self.results = list(results)

    def measure(self, case):
        return self.results.pop(0)


SHORT, LONG = {"dtype": "float32", "seq_len": 8}, {"dtype": "float32", "seq_len": 16}


@pytest.fixture
def measured(load):
    paired = load("paired")
    benchmark = paired.Benchmark(
        script="tiny.py",
        implementations=("ours", "theirs"),
        measure=lambda implementation, case: {},
        cases=[SHORT, LONG],
        quick=[SHORT],
        growth=("seq_len",),
    )
    return paired.Measured(benchmark, benchmark.cases)


def fill(measured, ours, theirs, number):
    """Rounds of one case."""
    workers = {"ours": Worker(*ours), "theirs": Worker(*theirs)}
    for _ in ours:
        for name, worker in workers.items():
            measured._once(name, number, worker)


def times(*seconds):
    return [{"total_s": time, "peak_mib": 100 * time, "check": [1.0]} for time in seconds]


def test_ratios_are_those_within_a_round(measured):
    # The second round is ten times slower. The ratios of the medians would be 3 and 4 / 3.
    fill(measured, times(1, 10, 1), times(2, 10, 3), 0)
    fill(measured, times(3, 30, 3), times(4, 40, 4), 1)
    short, their_short, _, their_long = measured.rows()
    spread = [their_short[f"over_ours_{p}"] for p in ("p20", "p50", "p80")]
    assert spread == ["1.400", "2.000", "2.600"]
    assert their_long["over_previous_p50"] == "2.000"
    assert short["over_previous_p50"] == ""
    assert (short["total_ms_p50"], short["total_ms_p80"]) == ("1000.0", "6400.0")
    assert (their_long["peak_mib"], their_long["peak_mib_over_previous"]) == ("4000", "4.00")


def test_growth_is_over_the_next_smaller_size_with_all_else_equal(load, measured):
    half = {"dtype": "bfloat16"}
    cases = [SHORT, LONG, {**SHORT, "seq_len": 64}, SHORT | half, {**SHORT, "seq_len": 32} | half]
    found = load("paired").Measured(measured.benchmark, cases)
    assert [found._smaller(case) for case in cases] == [None, 0, 1, None, 3]


def test_what_runs_out_of_memory_once_has_no_numbers(measured):
    fill(measured, times(1, 1), times(2, 2), 0)
    fill(measured, times(1, 1), [*times(2), {"out_of_memory": True}], 1)
    *_, ours, theirs = measured.rows()
    assert (ours["status"], theirs["status"], theirs["rounds"]) == ("ok", "out of memory", 0)
    assert theirs["total_ms_p50"] == theirs["over_ours_p50"] == theirs["peak_mib"] == ""


def test_what_takes_no_memory_has_no_growth_of_it(measured):
    for number in (0, 1):
        fill(measured, times(1), [{"total_s": 1.0, "peak_mib": 0.0}], number)
    *_, theirs = measured.rows()
    assert theirs["peak_mib"] == "0"
    assert theirs["peak_mib_over_previous"] == ""


@pytest.mark.parametrize(("apart", "wrong"), [(5e-5, False), (5e-4, True)])
def test_implementations_that_disagree_are_no_result(measured, apart, wrong):
    theirs = times(1)
    theirs[0]["check"] = [1.0 - apart]
    fill(measured, times(1), theirs, 0)
    if not wrong:
        measured._check(0)
        return
    with pytest.raises(RuntimeError, match="theirs and ours disagree"):
        measured._check(0)
