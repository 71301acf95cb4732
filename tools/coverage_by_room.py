"""Branch coverage by room: benchmarks/results/coverage.csv from coverage's own report.

    OMP_NUM_THREADS=1 coverage run -m pytest -n 2    # setup.cfg has the settings
    coverage combine && coverage json -o report.json
    python tools/coverage_by_room.py report.json

The processes that tests start are counted, forked ranks and those of torchrun among them; what is
killed on purpose is not. A room is a folder of step35_patch; "top" are the modules beside them.
"""

from __future__ import annotations

import csv
import datetime
import importlib.metadata
import json
import platform
import sys
from pathlib import Path

TABLE = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "coverage.csv"


def by_room(report: dict) -> list[dict[str, object]]:
    """A row for each room, and the last for all."""
    names = ("num_statements", "covered_lines", "num_branches", "covered_branches")
    rooms: dict[str, dict[str, int]] = {}
    for file, found in report["files"].items():
        parts = Path(file).parts
        inner = parts[parts.index("step35_patch") + 1 :]
        for room in (inner[0] if len(inner) > 1 else "top", "all"):
            sums = rooms.setdefault(room, dict.fromkeys(names, 0))
            for name in names:
                sums[name] += found["summary"][name]
    rows = []
    for room in [*sorted(rooms.keys() - {"all"}), "all"]:
        statements, lines, branches, taken = (rooms[room][name] for name in names)
        rows.append(
            {
                "room": room,
                "statements": statements,
                "branches": branches,
                "covered": f"{100 * (lines + taken) / (statements + branches):.1f}",
            }
        )
    return rows


def main() -> None:
    [report] = sys.argv[1:]
    about = {
        "date": datetime.date.today().isoformat(),
        "megatron_core": importlib.metadata.version("megatron-core"),
        "torch": importlib.metadata.version("torch"),
        "device": f"CPU ({platform.machine()})",
    }
    rows = [about | row for row in by_room(json.loads(Path(report).read_text()))]
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
