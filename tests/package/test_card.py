"""docs/verification.md says what the committed results say, of tests that are there."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def card():
    spec = importlib.util.spec_from_file_location("card_tool", ROOT / "tools" / "card.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lines(card):
    return [line for question in card.CARD["question"] for line in question.get("line", ())]


def test_document_is_what_the_results_say(card):
    assert card.DOCUMENT.read_text() == card.render(), "run python tools/card.py"


def test_each_line_is_of_tests_that_are_there(card):
    for line in lines(card):
        for name in [*line["tests"], *re.findall(r"tests/[\w./]+", line["command"])]:
            file, _, test = name.partition("::")
            assert (ROOT / file).exists(), line
            assert f"def {test}" in (ROOT / file).read_text() if test else True, line


def test_each_figure_is_within_its_bound(card):
    """A bound of the card is one that the tests hold, or it would not be theirs."""
    checked = 0
    for line in lines(card):
        for row in card.rows():
            own = row["test"].startswith(tuple(line["tests"])) and row["figure"] == line["figure"]
            if own and line["held"] != "all":
                checked += 1
                assert float(row["value"]) <= float(line["held"]), (line, row)
    assert checked > 10


RESULT = """<testsuites><testsuite>
<testcase classname="tests.model.test_x" name="test_a[1]"><properties>
<property name="megatron_core" value="0.19.2"/><property name="torch" value="2.14.1"/>
<property name="figure: logits" value="1e-06"/></properties></testcase>
<testcase classname="tests.model.test_x" name="test_a[2]"><properties>
<property name="figure: logits" value="3.14e-06"/>
<property name="off" value="-3.1%"/></properties></testcase>
<testcase classname="tests.model.test_x" name="test_b"><skipped message="none"/></testcase>
</testsuite></testsuites>"""


def test_figures_of_a_run_replace_those_of_the_same_tests(card, tmp_path):
    path = tmp_path / "0.xml"
    path.write_text(RESULT)
    found = card.taken_from(path)
    assert [(row["test"], row["figure"], row["cases"], row["value"]) for row in found] == [
        ("tests/model/test_x.py::test_a", "logits", "2", "3.1e-06"),
        ("tests/model/test_x.py", "passed", "2", "2"),
    ]
    older = [row | {"megatron_core": "0.18.2"} for row in found]
    worse = [row | {"value": "9"} for row in found]
    rows = card.merged([*older, *worse], found)
    assert len(rows) == 4 and "9" not in {row["value"] for row in rows}
    path.write_text(re.sub(r"<property .*?/>", "", RESULT))
    with pytest.raises(ValueError, match="expected a test that records a figure"):
        card.taken_from(path)
