"""What the benchmarks share: interleaved runs of several implementations, and their result file.

A script describes itself by a `Benchmark` and hands it to `main`, which gives it the options
`--quick`, `--rounds`, `--threads`, `--memory-gib` and `--output`:

    BENCHMARK = paired.Benchmark(script=__file__, implementations=("ours", "theirs"), ...)

    if __name__ == "__main__":
        paired.main(BENCHMARK)

Each implementation runs in a process of its own (the script once more, with `--worker`), which
stays for all rounds. A round runs each case once on every implementation, one right after the
other, in the reverse order in every second round. Shown are 20th percentile, median and 80th
percentile of the rounds, and the same of the ratios within a round: a machine that does other
things as well disturbs these less than it does the times. For the same reason `clock` reads the
process's CPU time where there is one thread. What does not fit into memory is recorded as out of
memory. The result file is written after each round, so that a run that is cut short counts.

Scripts that compare nothing of this kind use `about`, `write` and `spread` alone. Importing this
module puts the repository and its tests on `sys.path`. Memory is read in Linux's /proc.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import datetime
import gc
import importlib.metadata
import json
import logging
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]

# Columns and values of JSON: what is measured, for example {"dtype": "float32", "seq_len": 1024}.
Case = dict[str, Any]
# `total_s`, which the ratios are of; other times (`*_s`, in seconds); `check`, a list of numbers
# that all implementations must agree on. Of all else, sizes and counts, the largest is shown.
Result = dict[str, Any]
Row = dict[str, Any]

PERCENTILES = ("p20", "p50", "p80")
# How far the numbers of `check` may be apart, by the case's dtype.
TOLERANCES = {"float32": 1e-4, "bfloat16": 2e-2}


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One subject.

    `script` is the script's own `__file__`, and names the result file. `measure` makes one run of
    a case in a worker; what should not be timed it does before it starts its clock, and may keep
    for the next round. The ratios `over_NAME` are to the first implementation. `over_previous` is
    the ratio of a case's time to that of the case which differs in one of the columns `growth`
    alone, where it has the next smaller value; sizes and counts have it too. `warm_up` are run once
    in a new worker, unrecorded.
    """

    script: str
    implementations: tuple[str, ...]
    measure: Callable[[str, Case], Result]
    cases: Sequence[Case]
    quick: Sequence[Case]
    rounds: int = 7
    quick_rounds: int = 3
    warm_up: Sequence[Case] = ()
    growth: tuple[str, ...] = ()
    packages: tuple[str, ...] = ("megatron-core",)

    @property
    def results(self) -> Path:
        return RESULTS / f"{Path(self.script).stem}.csv"


# --- Where and with what --------------------------------------------------------------------------


def about(*packages: str, threads: int | None = None) -> Row:
    """The columns that say when, with which versions and on what; `packages` by PyPI's name."""
    import step35_patch

    return {
        "date": datetime.date.today().isoformat(),
        "step35_patch": step35_patch.__version__,
        **{name.replace("-", "_"): importlib.metadata.version(name) for name in packages},
        "torch": torch.__version__,
        "device": f"{_processor()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads() if threads is None else threads,
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.machine()


def write(path: Path, rows: Sequence[Row]) -> None:
    """Write a result file, whose columns are those of the first row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


# --- Time and memory ------------------------------------------------------------------------------


def clock() -> float:
    """Seconds: of CPU time with one thread, which other processes' share of the core leaves alone;
    of wall time with several, which wait for each other."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def status_kib(field: str) -> int:
    """A size of this process in KiB, from /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status: expected {field}, found none. This needs Linux.")


class PeakMemory:
    """In a `with` block: `mib()` is the largest resident size since its begin, beyond that then."""

    def __enter__(self) -> PeakMemory:
        ctypes.CDLL(None).malloc_trim(0)  # else what the last run left behind would serve this one
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS, see proc_pid_clear_refs(5)
        self.before = status_kib("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def mib(self) -> float:
        return (status_kib("VmHWM") - self.before) / 1024


# --- Worker: one implementation -------------------------------------------------------------------


def _work(benchmark: Benchmark, implementation: str, memory_gib: float) -> None:
    """Answer each case on stdin, a line of JSON, by a line on stdout."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    logging.disable(logging.WARNING)  # Megatron-Core's, of each model that is built
    for case in benchmark.warm_up:
        benchmark.measure(implementation, case)
    # Allocations beyond fail cleanly, and the machine stays usable.
    limit = status_kib("VmSize") * 1024 + int(memory_gib * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    print("{}", file=answers, flush=True)
    for line in sys.stdin:
        try:
            result = benchmark.measure(implementation, json.loads(line))
        except RuntimeError as error:
            if "can't allocate memory" not in str(error):
                raise
            result = {"out_of_memory": True}
        if "out_of_memory" in result:  # the other processes need what this one still holds
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)
        print(json.dumps(result), file=answers, flush=True)


class _Worker:
    def __init__(
        self, benchmark: Benchmark, implementation: str, threads: int, memory_gib: float
    ) -> None:
        arguments = ["--worker", implementation, "--threads", str(threads)]
        arguments += ["--memory-gib", str(memory_gib)]
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", benchmark.script, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
        )

    def answer(self) -> Result:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker ended with status {self.process.wait()}")
        return json.loads(line)

    def measure(self, case: Case) -> Result:
        print(json.dumps(case), file=self.process.stdin, flush=True)
        return self.answer()

    def stop(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


# --- Parent ---------------------------------------------------------------------------------------


class Measured:
    """The results of all rounds, by implementation and number of the case; none: out of memory."""

    def __init__(self, benchmark: Benchmark, cases: Sequence[Case]) -> None:
        self.benchmark, self.cases = benchmark, cases
        self.rounds: dict[tuple[str, int], list[Result]] = {
            (name, number): [] for number in range(len(cases)) for name in benchmark.implementations
        }
        self.out_of_memory: set[tuple[str, int]] = set()

    def run(
        self, rounds: int, threads: int, memory_gib: float, after_round: Callable[[], None]
    ) -> None:
        workers = {
            name: _Worker(self.benchmark, name, threads, memory_gib)
            for name in self.benchmark.implementations
        }
        try:
            for worker in workers.values():
                worker.answer()
            for done in range(rounds):
                order = list(workers)[:: -1 if done % 2 else 1]
                for number, case in enumerate(self.cases):
                    for name in order:
                        self._once(name, number, workers[name])
                    if done == 0:
                        self._check(number)
                    print(f"round {done + 1} of {rounds}: {case}", file=sys.stderr, flush=True)
                after_round()
        finally:
            for worker in workers.values():
                worker.stop()

    def _once(self, name: str, number: int, worker: _Worker) -> None:
        key = name, number
        if key in self.out_of_memory:
            return
        result = worker.measure(self.cases[number])
        if "out_of_memory" in result:
            self.out_of_memory.add(key)
            self.rounds[key].clear()
        else:
            self.rounds[key].append(result)

    def _check(self, number: int) -> None:
        """A fast wrong answer is no result."""
        case = self.cases[number]
        first = {
            name: self.rounds[name, number][0]["check"]
            for name in self.benchmark.implementations
            if self.rounds[name, number] and "check" in self.rounds[name, number][0]
        }
        for name, values in first.items():
            expected = next(iter(first.values()))
            for a, b in zip(expected, values, strict=True):
                if abs(b - a) > TOLERANCES[case.get("dtype", "float32")] * abs(a):
                    raise RuntimeError(f"{case}: {name} and {next(iter(first))} disagree: {first}")

    def rows(self) -> list[Row]:
        """A row for each case and implementation, without when and where."""
        results = [result for done in self.rounds.values() for result in done]
        keys = list(dict.fromkeys(key for result in results for key in result))
        counts = [key for key in keys if not key.endswith("_s") and key != "check"]
        base = self.benchmark.implementations[0]
        rows = []
        for number, case in enumerate(self.cases):
            for name in self.benchmark.implementations:
                done = self.rounds[name, number]
                row = case | {
                    "implementation": name,
                    "rounds": len(done),
                    "status": "ok" if done else "out of memory",
                }
                for key in (key for key in keys if key.endswith("_s")):
                    milliseconds = [1e3 * result[key] for result in done]
                    row |= spread_columns(f"{key[:-2]}_ms", milliseconds)
                row |= {key: f"{_largest(done, key):.0f}" if done else "" for key in counts}
                row |= spread_columns(f"over_{base}", _ratios(done, self.rounds[base, number]))
                if self.benchmark.growth:
                    smaller = self._smaller(case)
                    before = [] if smaller is None else self.rounds[name, smaller]
                    row |= spread_columns("over_previous", _ratios(done, before))
                    for key in counts:
                        row[f"{key}_over_previous"] = (
                            f"{_largest(done, key) / _largest(before, key):.2f}"
                            if done and before and _largest(before, key)
                            else ""
                        )
                rows.append(row)
        return rows

    def _smaller(self, case: Case) -> int | None:
        """The case that `case` has grown from."""
        found: dict[float, int] = {}
        for number, other in enumerate(self.cases):
            changed = [column for column in case if other[column] != case[column]]
            if len(changed) != 1 or changed[0] not in self.benchmark.growth:
                continue
            if other[changed[0]] < case[changed[0]]:
                found[other[changed[0]]] = number
        return found[max(found)] if found else None


def _largest(done: list[Result], key: str) -> float:
    return max(result[key] for result in done)


def _ratios(over: list[Result], under: list[Result]) -> list[float]:
    return [a["total_s"] / b["total_s"] for a, b in zip(over, under, strict=False)]


def spread(values: Sequence[float]) -> tuple[float, float, float]:
    """20th percentile, median, 80th percentile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, *_, high = statistics.quantiles(values, n=5, method="inclusive")
    return low, statistics.median(values), high


def spread_columns(name: str, values: Sequence[float]) -> Row:
    """`spread` as columns NAME_p20, NAME_p50 and NAME_p80, empty without values."""
    texts = map(_number, spread(values)) if values else ("", "", "")
    return {
        f"{name}_{percentile}": text for percentile, text in zip(PERCENTILES, texts, strict=True)
    }


def _number(value: float) -> str:
    return f"{value:.1f}" if abs(value) >= 100 else f"{value:.3f}"


def report(rows: Iterable[Row]) -> None:
    """Print the rows, the three columns of a spread as one."""
    for row in rows:
        texts = []
        for name, value in row.items():
            stem, _, percentile = name.rpartition("_")
            if percentile == "p50" and value:
                low, middle, high = (row[f"{stem}_{p}"] for p in PERCENTILES)
                texts.append(f"{stem} {middle} ({low}-{high})")
            elif percentile not in PERCENTILES:
                texts.append(f"{name} {value}")
        print(", ".join(texts))


def main(benchmark: Benchmark, arguments: Sequence[str] | None = None) -> None:
    """The command line of a script."""
    parser = argparse.ArgumentParser(description="Run a benchmark; see the script's docstring.")
    parser.add_argument("--quick", action="store_true", help="few small cases; writes no file")
    parser.add_argument(
        "--rounds",
        type=int,
        help=f"default {benchmark.rounds}; {benchmark.quick_rounds} with --quick",
    )
    parser.add_argument("--threads", type=int, default=1, help="of each process; default 1")
    parser.add_argument("--memory-gib", type=float, default=12.0, help="limit of each process")
    parser.add_argument("--output", type=Path, help=f"default results/{benchmark.results.name}")
    parser.add_argument("--worker", choices=benchmark.implementations, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    if options.worker:
        _work(benchmark, options.worker, options.memory_gib)
        return
    where = about(*benchmark.packages)
    where["clock"] = "CPU" if options.threads == 1 else "wall"
    measured = Measured(benchmark, benchmark.quick if options.quick else benchmark.cases)
    rounds = options.rounds or (benchmark.quick_rounds if options.quick else benchmark.rounds)
    output = options.output or (None if options.quick else benchmark.results)

    def keep() -> None:
        if output is not None:
            write(output, [where | row for row in measured.rows()])

    measured.run(rounds, options.threads, options.memory_gib, after_round=keep)
    print(", ".join(f"{name} {value}" for name, value in where.items()))
    report(measured.rows())
