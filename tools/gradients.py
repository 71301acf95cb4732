"""How far each case of tests/support/gradient_cases.py is from one process: docs/gradients.md.

    python tools/gradients.py            # all cases, with the Megatron-Core that is imported
    python tools/gradients.py CASE ...   # these
    python tools/gradients.py --short    # those that the tests run with each Megatron-Core
    python tools/gradients.py --render   # only write the document again

The figures go to benchmarks/results/gradients.csv, where they replace those of the same case and
Megatron-Core, and from there to the document.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

TABLE = ROOT / "benchmarks" / "results" / "gradients.csv"
DOCUMENT = ROOT / "docs" / "gradients.md"
COLUMNS = (
    *("date", "step35_patch", "megatron_core", "torch", "device", "case", "processes", "outcome"),
    *("gradient", "gradient_tensor", "change", "change_tensor", "log", "log_name", "norm"),
    *("missing", "seconds"),
)

_HEAD = """# Gradients by layout

How far training under each layout is from training in one process. Written by
[tools/gradients.py](../tools/gradients.py) from
[benchmarks/results/gradients.csv](../benchmarks/results/gradients.csv), which has the tensors'
names and the older Megatron-Cores' figures too. The cases are in
[tests/support/gradient_cases.py](../tests/support/gradient_cases.py), and
[tests/training/test_gradients.py](../tests/training/test_gradients.py) holds each to the last line.
`step35-patch verify --gradients HF_DIR -- LAYOUT` does it for a layout of yours.

A tiny model with everything in it (6 decoder and 2 MTP layers), fp32, real processes with gloo,
Megatron-Core's own schedules, DistributedDataParallel and Adam. Four micro-batches and more; where
two ranks share them by data parallelism without a pipeline, two each. Numbers are relative to a
tensor's largest value, or to the number itself, of the worst tensor on the worst rank.

- **gradient**: each published tensor's in the first step, after `finalize_model_grads`.
- **norm**: Megatron-Core's, against one computed by hand over the unique published gradients.
- **losses**: main, MTP, balancing and z losses and the norm, as logged in three steps. (Before 0.19
  Megatron-Core logs the z loss of each rank's own tokens: there it is the mean of them.)
- **change**: each weight's over three steps, against that in one process.
"""


def main() -> None:
    from step35_patch import cpu

    cpu.install()

    parser = argparse.ArgumentParser(description="Measure, and write the document.")
    parser.add_argument("cases", nargs="*", metavar="CASE", help="of `CASES`; all by default")
    parser.add_argument("--short", action="store_true", help="what each Megatron-Core runs")
    parser.add_argument("--render", action="store_true", help="only write the document again")
    options = parser.parse_args()
    from support.gradient_cases import CASES, EVERY_VERSION

    if not options.render:
        measure(options.cases or list(EVERY_VERSION if options.short else CASES))
    DOCUMENT.write_text(document(rows()))


def rows() -> list[dict[str, str]]:
    """The figures so far."""
    if not TABLE.exists():
        return []
    with TABLE.open(newline="") as file:
        return list(csv.DictReader(file))


def measure(names: list[str]) -> None:
    """Run cases, and replace their figures of this Megatron-Core."""
    import megatron.core
    import torch
    from support.gradient_cases import CASES, hold, write_start
    from support.ranks import worker_ranks

    import step35_patch

    versions = {
        "date": str(datetime.date.today()),
        "step35_patch": step35_patch.__version__,
        "megatron_core": megatron.core.__version__.partition("+")[0],
        "torch": torch.__version__,
        "device": f"CPU ({platform.machine()})",
    }
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def shared(name: str, make: Callable[[Path], None]) -> Path:
            if not (folder / name).exists():
                (folder / name).mkdir()
                make(folder / name)
            return folder / name

        start = shared("start", write_start)
        ranks = worker_ranks(shared("ranks", lambda _: None))
        try:
            for number, case in enumerate(names):
                began = time.monotonic()
                out = shared(f"case-{number}", lambda _: None)
                figures = _columns(hold(CASES[case], start, ranks, out, shared))
                seconds = f"{time.monotonic() - began:.1f}"
                own = {"case": case, "processes": CASES[case].processes, "seconds": seconds}
                found.append(versions | own | figures)
                print(found[-1], flush=True)
        finally:
            ranks.close()
    table = {(row["megatron_core"], row["case"]): row for row in [*rows(), *found]}
    order = list(CASES)
    newest_first = sorted(
        (row for row in table.values() if row["case"] in CASES),
        key=lambda row: (
            [-int(number) for number in row["megatron_core"].split(".")],
            order.index(row["case"]),
        ),
    )
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(newest_first)


def _columns(found: Any) -> dict[str, str]:
    from support.gradient_cases import Refused

    if isinstance(found, Refused):
        return {"outcome": "refused"}
    worst = {"gradient": found.gradient, "change": found.change, "log": found.log}
    names = {"gradient": "gradient_tensor", "change": "change_tensor", "log": "log_name"}
    return {
        "outcome": "compared",
        **{column: f"{worst[column].difference:.2g}" for column in worst},
        **{names[column]: worst[column].name for column in worst},
        "norm": f"{found.norm:.2g}",
        "missing": " ".join(found.missing),
    }


def document(table: list[dict[str, str]]) -> str:
    """The text of docs/gradients.md."""
    newest = table[0]["megatron_core"]
    by_version = {row["megatron_core"]: row for row in table}
    lines = [
        _HEAD,
        "| layout and batch | processes | gradient | norm | losses | change |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in table:
        if row["megatron_core"] != newest:
            continue
        name, numbers = row["case"], [row[c] for c in ("gradient", "norm", "log", "change")]
        if row["outcome"] == "refused":
            numbers = ["refused", "", "", ""]
        lines.append(
            f"| {name} | {row['processes']} | {' | '.join(numbers)} |".replace("|  ", "| ")
        )
    lines += ["| **held to** | | 1e-5 | 1e-5 | 1e-5 | 1e-3 |", ""]
    for version, row in by_version.items():
        own = [r for r in table if r["megatron_core"] == version]
        worst = max(float(r["gradient"]) for r in own if r["outcome"] == "compared")
        lines.append(
            f"- Megatron-Core {version}, torch {row['torch']}, {row['device']}, {row['date']}: "
            f"{len(own)} cases, worst gradient {worst:.2g}."
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
