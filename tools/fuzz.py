"""The long runs of the tests that make their own examples: benchmarks/results/fuzz.csv.

    python tools/fuzz.py 20000                # every such test, with so many examples to share
    python tools/fuzz.py 20000 TESTS ...      # these files
    python tools/fuzz.py --read FILE.xml ...  # of runs that were started otherwise, by --junitxml

Figures replace those of the same test and Megatron-Core. A finding is a test that failed: it
becomes a test of its own, and the run is repeated.
"""

from __future__ import annotations

import argparse
import base64
import csv
import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "benchmarks" / "results" / "fuzz.csv"
TESTS = (
    "tests/config/test_fuzzed_configs.py",
    "tests/convert/test_fuzzed_files.py",
    "tests/model/test_fuzzed_parity.py",
    "tests/training/test_random_layouts.py",
)
PACKAGES = ("step35_patch", "megatron_core", "torch", "transformers", "safetensors", "hypothesis")
COLUMNS = ("date", *PACKAGES, "device", "test", "examples", "findings", "seconds")


def main() -> None:
    parser = argparse.ArgumentParser(description="Run them, and write the figures down.")
    parser.add_argument("examples", nargs="?", type=int, help="of all tests of a file together")
    parser.add_argument("tests", nargs="*", default=TESTS, metavar="TESTS")
    parser.add_argument("--read", nargs="+", type=Path, metavar="FILE.xml", default=[])
    options = parser.parse_args()
    files: list[Path] = options.read
    with tempfile.TemporaryDirectory() as folder:
        if options.examples is not None:
            files = [run(test, options.examples, Path(folder)) for test in options.tests]
        write([row for file in files for row in rows(file)])


def run(test: str, examples: int, folder: Path) -> Path:
    """Run the tests of a file; returns what pytest wrote of it."""
    report = folder / f"{Path(test).stem}.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", f"--junitxml={report}", test]
    subprocess.run(
        [*command, "-p", "no:cacheprovider", f"--basetemp={folder / 'tests'}"],
        cwd=ROOT,
        env=os.environ | {"STEP35_TEST_EXAMPLES": f"{examples}", "OMP_NUM_THREADS": "1"},
        check=False,
    )
    return report


def rows(report: Path) -> Iterator[dict[str, str]]:
    """The figures of each test in a file of pytest's."""
    versions = {name: importlib.metadata.version(name).partition("+")[0] for name in PACKAGES}
    suite = ElementTree.parse(report).getroot()[0]
    tried = dict(_counts_of_hypothesis(suite))
    for case in suite.iter("testcase"):
        own = case.find("properties/property[@name='examples']")
        name = case.attrib["name"]
        failed = any(case.find(kind) is not None for kind in ("failure", "error"))
        yield {
            "date": str(datetime.date.today()),
            **versions,
            "device": f"CPU ({platform.machine()})",
            "test": name,
            "examples": str(tried.get(name, 0) if own is None else own.attrib["value"]),
            "findings": str(int(failed)),
            "seconds": f"{float(case.attrib['time']):.0f}",
        }


def _counts_of_hypothesis(suite: ElementTree.Element) -> Iterator[tuple[str, int]]:
    """Each test and the examples that it was called with, of hypothesis's own statistics."""
    for entry in suite.iterfind("properties/property"):
        if entry.attrib["name"].startswith("hypothesis-statistics-"):
            text = base64.b64decode(entry.attrib["value"]).decode()
            counts = re.findall(r"(\d+) passing, (\d+) failing", text)
            yield entry.attrib["name"].rpartition("::")[2], sum(int(n) for c in counts for n in c)


def write(found: list[dict[str, str]]) -> None:
    """Put rows into the table, in the place of those of the same test and Megatron-Core."""
    old = []
    if TABLE.exists():
        with TABLE.open(newline="") as file:
            old = list(csv.DictReader(file))
    table = {(row["megatron_core"], row["test"]): row for row in [*old, *found]}
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(table[key] for key in sorted(table))


if __name__ == "__main__":
    main()
