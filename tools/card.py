"""The verification card, docs/verification.md, from committed results.

    python tools/card.py                  # write the document again
    python tools/card.py RESULT.xml ...   # first take the figures of test runs into the table

`./run test --figures` does the second with each of its runs. A figure is what a test recorded (see
tests/support/figures.py), here the worst of a test's cases; "passed" counts a file's cases. Figures
of tests that were not run stay as they are. What the card asks, and what it says is not verified,
is in tools/card.toml.
"""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import json
import platform
import sys
import tomllib
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

RESULTS = ROOT / "benchmarks" / "results"
TABLE = RESULTS / "verification.csv"
GPU = RESULTS / "gpu.csv"
DOCUMENT = ROOT / "docs" / "verification.md"
CARD = tomllib.loads((ROOT / "tools" / "card.toml").read_text())
VERSIONS = ("megatron_core", "torch", "transformers", "transformer_engine")
COLUMNS = ("date", "step35_patch", *VERSIONS, "device", "test", "figure", "cases", "value")
# A row's name: a measurement of the same replaces it.
KEY = ("test", "figure", "megatron_core", "transformer_engine")
PASSED = "passed"
# As in tests/support/figures.py.
PREFIX = "figure: "
Row = dict[str, str]
# A [[question.line]] or [[question.table]] of the card.
Part = dict[str, Any]


def rows(path: Path = TABLE) -> list[Row]:
    """A result file's, none if there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def taken_from(path: Path) -> list[Row]:
    """The rows of a run's results, in JUnit's XML as pytest writes it.

    Raises:
        ValueError: no test of it says on which versions it ran.
    """
    versions: dict[str, str] = {}
    figures: dict[tuple[str, str], list[float]] = {}
    passed: dict[str, int] = {}
    for case in ElementTree.parse(path).iter("testcase"):
        if any(case.find(end) is not None for end in ("failure", "error", "skipped")):
            continue
        file = case.get("classname", "").replace(".", "/") + ".py"
        passed[file] = passed.get(file, 0) + 1
        test = f"{file}::{case.get('name', '').partition('[')[0]}"
        for entry in case.iter("property"):
            name, value = entry.get("name", ""), entry.get("value", "")
            if name in VERSIONS:
                versions[name] = value
            elif name.startswith(PREFIX):
                figures.setdefault((test, name.removeprefix(PREFIX)), []).append(float(value))
    if passed and not versions:
        raise ValueError(f"{path}: expected a test that records a figure, found none; add one")
    about = {
        "date": datetime.date.today().isoformat(),
        "step35_patch": importlib.metadata.version("step35-patch"),
        "device": f"CPU ({platform.machine()})",
        **dict.fromkeys(VERSIONS, ""),
        **versions,
    }
    found = [
        about | {"test": test, "figure": name, "cases": str(len(values)), "value": _text(values)}
        for (test, name), values in figures.items()
    ]
    return found + [
        about | {"test": file, "figure": PASSED, "cases": str(count), "value": str(count)}
        for file, count in passed.items()
    ]


def _text(values: list[float]) -> str:
    worst = max(values)
    return str(int(worst)) if all(value == int(value) for value in values) else f"{worst:.2g}"


def merged(old: list[Row], new: list[Row]) -> list[Row]:
    """The old rows with the new ones in the place of those of the same name, sorted."""
    by_key = {tuple(row[name] for name in KEY): row for row in [*old, *new]}
    return [by_key[key] for key in sorted(by_key)]


def write(found: list[Row]) -> None:
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)


def render() -> str:
    """The text of docs/verification.md."""
    found = rows()
    text = [CARD["head"], _versions(found), ""]
    for question in CARD["question"]:
        text += [f"## {question['title']}", "", question["says"], ""]
        if lines := question.get("line"):
            text += [*_lines(lines, found), ""]
        for table in question.get("table", ()):
            text += [*_table(table), ""]
    text += ["## What has not been verified", "", *(f"- {it}" for it in CARD["not_verified"]), ""]
    return "\n".join([*text, CARD["tail"]])


def _places(found: Iterable[Row]) -> list[tuple[str, bool]]:
    """(Megatron-Core, on Transformer Engine), the newest first."""
    seen = {(row["megatron_core"], bool(row["transformer_engine"])) for row in found}
    return sorted(seen, key=lambda place: (place[1], [-int(n) for n in _release(place[0])]))


def _release(version: str) -> list[str]:
    return version.partition("+")[0].split(".")


def _versions(found: list[Row]) -> str:
    def of(name: str) -> str:
        return ", ".join(sorted({row[name] for row in found if row[name]}))

    where = f"Measured {of('date')} on {of('device')}: step35_patch {of('step35_patch')}"
    others = {
        "Megatron-Core": "megatron_core",
        "torch": "torch",
        "transformers": "transformers",
        "Transformer Engine's Python": "transformer_engine",
    }
    return ", ".join([where, *(f"{name} {of(column)}" for name, column in others.items())]) + "."


def _lines(lines: list[Part], found: list[Row]) -> list[str]:
    places = _places(found)
    heads = [f"{version.partition('+')[0]}{' TE' * engine}" for version, engine in places]
    names = ["compared", "with", *heads, "held to", "on a GPU"]
    text = [f"| {' | '.join(names)} |", f"|{' --- |' * len(names)}"]
    for line in lines:
        cells = [_cell(line, found, place) for place in places]
        what = f"{line['what']}<br>`{line['command']}`"
        own = [what, line["against"], *cells, line["held"], _gpu(line.get("gpu"))]
        text.append(f"| {' | '.join(own)} |")
    return text


def _cell(line: Part, found: list[Row], place: tuple[str, bool]) -> str:
    """The worst of a line's figures in one place."""
    measured = [
        row["value"]
        for row in found
        if (row["megatron_core"], bool(row["transformer_engine"])) == place
        and row["test"].startswith(tuple(line["tests"]))
        and row["figure"] == line["figure"]
    ]
    if line["figure"] == PASSED:
        return f"{sum(map(int, measured))} passed" if measured else ""
    return max(measured, key=float) if measured else ""


def _gpu(check: str | None) -> str:
    """What `./run verify-gpu` found."""
    if check is None:
        return ""
    found = [row for row in rows(GPU) if row["check"].startswith(check)]
    if not found:
        return "not run"
    agree = [json.loads(row["value"]) for row in found if row["figure"] == "agrees"]
    return f"{sum(agree)} of {len(agree)} agree ({found[0]['device']})"


def _table(table: Part) -> list[str]:
    """Columns of another result file."""
    found = rows(RESULTS / table["file"])
    if not found:
        return [f"{table['says']} (`{table['command']}`): not run."]
    link = f"[figures](../benchmarks/results/{table['file']})"
    columns: dict[str, str] = table["columns"]
    text = [f"{table['says']} (`{table['command']}`; {link}):", ""]
    text += [f"| {' | '.join(columns.values())} |", f"|{' --- |' * len(columns)}"]
    cells = ([row[name].replace("|", "\\|") for name in columns] for row in found)
    return text + [f"| {' | '.join(row)} |" for row in cells]


def main() -> None:
    results = [Path(name) for name in sys.argv[1:]]
    if results:
        new = [row for path in results for row in taken_from(path)]
        write(merged(rows(), new))
    DOCUMENT.write_text(render())


if __name__ == "__main__":
    main()
