"""What only a GPU can show, measured on the first machine that has one: the card's empty column.

    ./run verify-gpu --dry-run    # what would be run here, and what for want of what would not
    ./run verify-gpu              # run it, write benchmarks/results/gpu.csv and the card

Each check is a command of its own, whose lines of JSON are the figures. One that needs more GPUs,
or Transformer Engine with its kernels (`pip install --no-build-isolation
'transformer-engine[pytorch]'` into .venv), is left out with a word on what it lacks.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

TABLE = ROOT / "benchmarks" / "results" / "gpu.csv"
COLUMNS = (
    *("date", "step35_patch", "megatron_core", "transformer_engine", "torch", "device"),
    *("check", "case", "figure", "value"),
)
ENGINE = "transformer_engine"


@dataclass(frozen=True)
class Check:
    """One command.

    Attributes:
        name: in the table and the card.
        what: what its figures say.
        words: the command behind Python.
        gpus: that it needs.
        engine: whether it needs Transformer Engine's kernels.
    """

    name: str
    what: str
    words: tuple[str, ...]
    gpus: int = 1
    engine: bool = False

    def lacks(self, gpus: int, engine: bool) -> str | None:
        """What this machine would have to have besides, in words."""
        if gpus < self.gpus:
            return f"{self.gpus} GPU(s), found {gpus}"
        if self.engine and not engine:
            return "Transformer Engine with its compiled part, found none"
        return None

    @property
    def command(self) -> str:
        variable = f"STEP35_TEST_IMPLEMENTATION={ENGINE} " if self.engine else ""
        return f"{variable}python {' '.join(self.words)}"


FULL_WIDTH = "bf16 forward and gradients of each kind of layer at full width, against fp32"
CHECKS = (
    Check("full width", FULL_WIDTH, ("tools/full_width.py",)),
    Check("full width, kernels", FULL_WIDTH, ("tools/full_width.py",), engine=True),
    Check(
        "speed",
        "a layer's time beside stock Megatron-Core's",
        ("tools/gpu_layers.py",),
        engine=True,
    ),
    *(
        Check(
            f"NCCL, {gpus} GPUs{', kernels' * engine}",
            f"10 iterations under each layout of {gpus} GPUs against those of one",
            ("tools/verify_gpu.py", "--layouts", str(gpus)),
            gpus,
            engine,
        )
        for gpus in (2, 4)
        for engine in (False, True)
    ),
)


def layout_words(engine: bool, layout: str = "") -> list[str]:
    """Arguments of a run on GPUs: the layouts' own, without what a CPU needs."""
    from support import layout_runs

    from step35_patch.arguments import CPU_ARGUMENTS

    words = [*layout_runs.arguments(iterations=10)[len(CPU_ARGUMENTS) :], *layout.split()]
    if engine:
        return [*words, "--transformer-impl", ENGINE, "--moe-grouped-gemm", "--bf16"]
    return [*words, "--transformer-impl", "local"]


def layouts(gpus: int, engine: bool) -> Iterator[dict[str, Any]]:
    """A row for each layout of so many processes: the largest difference of a loss, relative."""
    from support import layout_runs

    def run(folder: Path, words: list[str], processes: int) -> dict[int, layout_runs.Iteration]:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc-per-node", str(processes), str(layout_runs.SCRIPT), *words]
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        own = {"PYTHONPATH": path, "STEP35_CONFIG": str(folder / "config.json")}
        ended = subprocess.run(command, env=os.environ | own, capture_output=True, text=True)
        if ended.returncode:
            sys.exit(f"{' '.join(command)}\n{(ended.stdout + ended.stderr)[-6000:]}")
        return layout_runs.iterations(ended.stdout + ended.stderr)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        layout_runs.write_config(folder)
        start = folder / "start"
        run(folder, [*layout_words(engine), "--save", str(start), "--save-interval", "10"], 1)
        load = ["--load", str(start), "--exit-on-missing-checkpoint", "--finetune"]
        load += ["--no-load-optim", "--no-load-rng"]
        wanted = run(folder, [*layout_words(engine), *load], 1)
        for layout, (processes, words) in layout_runs.LAYOUTS.items():
            if processes == gpus:
                found = run(folder, [*layout_words(engine, words), *load], processes)
                off = max(abs(found[n].loss / wanted[n].loss - 1) for n in wanted)
                yield {"kind": layout, "training losses": off, "agrees": off < _allowed(engine)}


def _allowed(engine: bool) -> float:
    """In bf16 on the kernels; else in fp32, with sums in another order."""
    return 2e-2 if engine else 1e-4


def rows_of(check: Check, output: str) -> list[dict[str, Any]]:
    """The table's rows of what a check printed."""
    rows = []
    for line in output.splitlines():
        if line.startswith("{"):
            found = json.loads(line)
            case = found.pop("kind")
            rows += [
                {"check": check.name, "case": case, "figure": figure, "value": json.dumps(value)}
                for figure, value in found.items()
            ]
    return rows


def write(rows: list[dict[str, Any]], table: Path = TABLE) -> None:
    """The table anew, with what was measured on this machine."""
    with table.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(versions() | row for row in rows)


def versions() -> dict[str, Any]:
    """The table's columns that say on what."""
    engine = importlib.util.find_spec(ENGINE) is not None
    return {
        "date": datetime.date.today().isoformat(),
        "step35_patch": importlib.metadata.version("step35-patch"),
        "megatron_core": importlib.metadata.version("megatron-core"),
        "transformer_engine": importlib.metadata.version("transformer-engine") if engine else "",
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure what only a GPU can show.")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be run")
    parser.add_argument("--layouts", type=int, metavar="GPUS", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.layouts:
        agree = True
        for row in layouts(
            arguments.layouts, os.environ.get("STEP35_TEST_IMPLEMENTATION") == ENGINE
        ):
            print(json.dumps(row), flush=True)
            agree &= row["agrees"]
        return int(not agree)

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    engine = importlib.util.find_spec("transformer_engine_torch") is not None
    runnable = []
    for check in CHECKS:
        lacks = check.lacks(gpus, engine)
        print(f"{check.name}: {check.what}\n    {check.command}")
        print(f"    left out: needs {lacks}" if lacks else "    runs here", flush=True)
        runnable += [] if lacks else [check]
    if arguments.dry_run:
        return 0
    if not runnable:
        print("verify-gpu: expected a GPU, found none that torch can use; nothing was measured")
        return 1
    rows, failed = [], []
    for check in runnable:
        print(f"== {check.name}", flush=True)
        variables = {"STEP35_TEST_IMPLEMENTATION": ENGINE if check.engine else "local"}
        ended = subprocess.run(
            [sys.executable, *check.words],
            cwd=ROOT,
            env=os.environ | variables,
            stdout=subprocess.PIPE,
            text=True,
        )
        print(ended.stdout, flush=True)
        rows += rows_of(check, ended.stdout)
        failed += [check.name] if ended.returncode else []
    write(rows)
    subprocess.run([sys.executable, "tools/card.py"], cwd=ROOT, check=True)
    print(f"verify-gpu: {TABLE}; off or failed: {', '.join(failed) or 'none'}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
