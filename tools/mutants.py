"""Whether the tests notice small mistakes: a sample of mutants of four rooms of the package.

    python tools/mutants.py WORK                      # draw, run, write the tables
    python tools/mutants.py WORK --draw config=150,tensors=120,storage=90,model=80 --seed 1
    python tools/mutants.py WORK --again              # the table's survivors, by their room's tests
    python tools/mutants.py WORK --again NAME --tests TEST ...

The mutants are mutmut's (tools/mutated.py); the tests are run by this script. mutmut's own run
leaves out what stands in no function and functions with decorators, which here are the tables and
the validators, and wraps functions, which changes the signatures that the package reads. Here one
process imports PyTorch and Megatron-Core once, and forks for each mutant. The fork imports the
package from a copy of the working tree in the folder WORK, in which one file is changed, and runs
the quick tests that reach the changed statement, the quickest first, until one fails. Processes
that a test starts find the changed file too.

Left out: the words of messages, annotations, and lines that none of TESTS runs in its own process.
WORK keeps which test runs which line, and the results, so that a run that was ended goes on.

Needs the extra `audit` of setup.cfg.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import datetime
import functools
import gc
import importlib.metadata
import importlib.util
import json
import os
import platform
import random
import resource
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mutated import ROOT, Mutant, mutants_of

SURVIVORS = ROOT / "benchmarks" / "results" / "mutants.csv"
SUMMARY = ROOT / "benchmarks" / "results" / "mutants_drawn.csv"
# The verdict is written by hand, and kept by name.

TESTS = """
tests/config tests/tensors tests/storage tests/checkpoint/test_checkpoint.py
tests/convert/test_fp8_folders.py tests/convert/test_resaved_folders.py
tests/convert/test_described_bytes.py tests/convert/test_damaged_published.py
tests/convert/test_checkpoint_contents.py tests/convert/test_damaged_checkpoint.py
tests/convert/test_options.py
tests/model/test_parity.py tests/model/test_rope.py tests/model/test_norm.py
tests/model/test_windowed_attention.py tests/model/test_experts.py tests/model/test_provider.py
tests/model/test_option_tables.py tests/model/test_padded_vocabulary.py
tests/model/test_core_attention.py tests/model/test_generation.py tests/model/test_low_precision.py
tests/patch/test_training_arguments.py tests/commands/test_inspect.py
""".split()
# Seconds of tests that a mutant gets at first, by their own time, and that one gets which survives
# these, so that a mutant of what all tests run does not get them all.
SOON, LATER = 12.0, 60.0
# Seconds that a fork may take, and bytes: some mutants allocate without end.
LIMIT, MEMORY = 120, 8 * 2**30
BROKEN = 70  # the exit status of a fork in which this script failed
# Rooms whose mutants get the tests that import Megatron-Core, and where these are.
HEAVY = {"model"}
HEAVY_TESTS = ("tests/model/", "tests/patch/", "tests/checkpoint/")


# The process that forks


def import_once() -> None:
    """Everything that a test imports and no mutant changes."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    # Without the package itself, which each fork imports for itself.
    spec = importlib.util.spec_from_file_location("_stand_in", ROOT / "step35_patch" / "cpu.py")
    assert spec is not None
    assert spec.loader is not None
    stand_in = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stand_in)
    stand_in.install()
    for name in (
        *("hypothesis", "pydantic", "pytest", "rich", "safetensors.torch", "wrapt"),
        *("torch.distributed.checkpoint", "transformers.models.step3p7.modeling_step3p7"),
    ):
        importlib.import_module(name)
    assert not any(name.split(".")[0] == "step35_patch" for name in sys.modules)
    gc.collect()
    gc.freeze()


def import_megatron() -> None:
    """For the rooms of HEAVY: what the package does to it then takes each fork seconds."""
    for name in ("models.gpt", "dist_checkpointing", "optimizer"):
        importlib.import_module(f"megatron.core.{name}")
    gc.collect()
    gc.freeze()


def forked(folder: Path, work: Callable[[], int], limit: float | None) -> int | None:
    """What `work` returns in a process of its own with the copy in `folder`; None: too slow."""
    sys.stdout.flush()
    if not (pid := os.fork()):
        status = BROKEN
        try:
            os.setpgid(0, 0)
            resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
            with open(folder / "log", "w") as log:
                os.dup2(log.fileno(), 1)
                os.dup2(log.fileno(), 2)
            os.environ["PYTHONPATH"] = str(folder / "tree")
            sys.path.insert(0, str(folder / "tree"))
            os.chdir(folder / "tree")
            status = work()
        finally:
            sys.stdout.flush()
            os._exit(status)
    deadline, ended = time.monotonic() + (limit or 1e9), 0
    while not ended and time.monotonic() < deadline:
        time.sleep(0.02)
        ended, status = os.waitpid(pid, os.WNOHANG)
    with contextlib.suppress(ProcessLookupError):  # what the tests started and left
        os.killpg(pid, signal.SIGKILL)
    if not ended:
        os.waitpid(pid, 0)
        return None
    return os.waitstatus_to_exitcode(status)


def pytest_run(folder: Path, tests: list[str], *options: str, plugins: tuple[Any, ...] = ()) -> int:
    import pytest

    scratch = folder / "basetemp"
    quiet = ("-q", "-p", "no:cacheprovider", "-W", "ignore", f"--basetemp={scratch}")
    status = int(pytest.main([*quiet, *options, *tests], plugins=list(plugins)))
    shutil.rmtree(scratch, ignore_errors=True)
    return status


class _Recorder:
    """Tells coverage which test runs, and notes the tests' seconds and failures."""

    def __init__(self, coverage: Any):
        self.coverage, self.seconds, self.failed = coverage, Counter[str](), set[str]()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.coverage.switch_context(nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.seconds[report.nodeid] += report.duration
        if report.outcome == "failed":
            self.failed.add(report.nodeid)


def record(folder: Path) -> int:
    """Write which test runs which lines of the package: {file: {line: tests}}."""
    import coverage

    measured = coverage.Coverage(data_file=None, source_pkgs=["step35_patch"], config_file=False)
    recorder = _Recorder(measured)
    measured.start()
    pytest_run(folder, TESTS, "-m", "not slow", plugins=(recorder,))
    measured.stop()
    data, lines = measured.get_data(), {}
    for path in data.measured_files():
        file = str(Path(path).relative_to(folder / "tree"))
        found = data.contexts_by_lineno(path)
        lines[file] = {
            line: sorted(set(tests) - recorder.failed - {""}) for line, tests in found.items()
        }
    result = {"lines": lines, "seconds": recorder.seconds, "failed": sorted(recorder.failed)}
    (folder / "recorded.json").write_text(json.dumps(result))
    return 0


def tests_of(mutant: Mutant, recorded: dict[str, Any]) -> list[str] | None:
    """Those that run its statement, its room's and the quickest first; None: it never runs.

    What runs at import has no test of its own, and gets those that run anything of its file.
    """
    lines = recorded["lines"].get(mutant.file, {})
    here = [lines[str(line)] for line in mutant.statement if str(line) in lines]
    if not here:
        return None
    tests = {test for tests in here for test in tests}
    if not tests:
        tests = {test for tests in lines.values() for test in tests}
    if room_of(mutant.file) not in HEAVY:
        tests = {test for test in tests if not test.startswith(HEAVY_TESTS)}
    own = f"tests/{room_of(mutant.file)}/"
    return sorted(tests, key=lambda test: (not test.startswith(own), recorded["seconds"][test]))


def run_mutant(folder: Path, mutant: Mutant, recorded: dict[str, Any]) -> str:
    """killed, survived or timeout."""
    parts: tuple[list[str], list[str]] = ([], [])
    seconds, own = 0.0, f"tests/{room_of(mutant.file)}/"
    for test in tests_of(mutant, recorded) or []:
        seconds += recorded["seconds"][test] + 0.02
        if seconds <= LATER:
            parts[seconds > SOON or not test.startswith(own)].append(test)
    return outcome_of(folder, mutant, [part for part in parts if part])


def outcome_of(folder: Path, mutant: Mutant, parts: list[list[str]]) -> str:
    """killed, survived or timeout, by tests that run in as many processes as there are parts."""
    copy = folder / "tree" / mutant.file
    copy.write_text(mutant.source)
    try:
        for part in parts:
            status = forked(folder, functools.partial(pytest_run, folder, part, "-x"), LIMIT)
            if status is None:
                return "timeout"
            if status == BROKEN:
                sys.exit(f"{mutant.name}: {(folder / 'log').read_text()[-3000:]}")
            if status:
                return "killed"
        return "survived"
    finally:
        shutil.copy2(ROOT / mutant.file, copy)


def copy_tree(folder: Path) -> None:
    """The working tree as it is, in the folder's tree, with .venv by reference."""
    tree = folder / "tree"
    shutil.rmtree(tree, ignore_errors=True)
    shutil.copytree(
        ROOT, tree, ignore=shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache")
    )
    (tree / ".venv").symlink_to(ROOT / ".venv")


# The tables


def read_table(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def write_table(path: Path, rows: list[dict[str, Any]]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def write_tables(
    results: dict[str, tuple[str, float]], drawn: list[Mutant], counts: dict[str, int], seed: int
) -> None:
    verdicts = {row["name"]: row["verdict"] for row in read_table(SURVIVORS)}
    survivors = [
        {
            "name": mutant.name,
            "room": room_of(mutant.file),
            "file": mutant.file,
            "function": mutant.function,
            "line": mutant.line,
            "change": mutant.change,
            "verdict": verdicts.get(mutant.name, ""),
        }
        for mutant in drawn
        if results.get(mutant.name, ("",))[0] == "survived"
    ]
    if survivors:
        write_table(SURVIVORS, sorted(survivors, key=lambda row: (row["file"], row["line"])))
    version = importlib.metadata.version
    rows = []
    for room in ROOMS:
        ended = [
            results[mutant.name]
            for mutant in drawn
            if room_of(mutant.file) == room and mutant.name in results
        ]
        outcomes = Counter(outcome for outcome, _ in ended)
        rows.append(
            {
                "date": datetime.date.today().isoformat(),
                "step35_patch": version("step35-patch"),
                "megatron_core": version("megatron-core"),
                "torch": version("torch"),
                "mutmut": version("mutmut"),
                "device": f"CPU ({platform.machine()})",
                "room": room,
                "mutants": counts[f"{room} all"],
                "in_lines_of_quick_tests": counts[f"{room} run"],
                "drawn": len(ended),
                "killed": outcomes["killed"],
                "timeouts": outcomes["timeout"],
                "survived": outcomes["survived"],
                "seconds": round(sum(seconds for _, seconds in ended)),
                "seed": seed,
            }
        )
    write_table(SUMMARY, rows)


ROOMS = ("config", "tensors", "storage", "model")


def room_of(file: str) -> str:
    return Path(file).parent.name


def draw(mutants: list[Mutant], number: int, chance: random.Random) -> list[Mutant]:
    """So many from each file as is its share of all."""
    by_file: dict[str, list[Mutant]] = {}
    for mutant in mutants:
        by_file.setdefault(mutant.file, []).append(mutant)
    drawn = []
    for those in by_file.values():
        share = max(1, round(number * len(those) / len(mutants)))
        drawn += chance.sample(those, min(share, len(those)))
    return drawn


def run_again(folder: Path, names: list[str], tests: list[str] | None) -> None:
    """The table's survivors of these names, or all of it, by some tests or by their room's."""
    rows = [row for row in read_table(SURVIVORS) if not names or row["name"] in names]
    folder.mkdir(parents=True, exist_ok=True)
    copy_tree(folder)
    import_once()
    for file in sorted({row["file"] for row in rows}):
        lines = {int(row["line"]) for row in rows if row["file"] == file}
        for mutant in mutants_of(file):
            # A name is made of the whole changed file, and takes a while.
            if mutant.line in lines and mutant.name in {row["name"] for row in rows}:
                own = [f"tests/{room_of(file)}"]
                print(outcome_of(folder, mutant, [tests or own]), mutant.name, mutant.change)
                log = (folder / "log").read_text().splitlines()
                print(*(f"    {line}" for line in log if "FAILED" in line), sep="\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path, help="folder for the copy and what is known so far")
    parser.add_argument("--draw", default="config=150,tensors=120,storage=90,model=80")
    parser.add_argument("--seed", type=int, default=20261127)
    parser.add_argument("--minutes", type=float, default=1e9, help="start no mutant after these")
    parser.add_argument("--rooms", nargs="+", default=ROOMS, help="run those drawn of these alone")
    parser.add_argument("--again", nargs="*", help="only these, or the table's, by name")
    parser.add_argument("--tests", nargs="+", help="with --again: not all tests of their room")
    options = parser.parse_args()
    folder, started = options.work.resolve(), time.monotonic()
    if options.again is not None:
        run_again(folder, options.again, options.tests)
        return
    folder.mkdir(parents=True, exist_ok=True)
    copy_tree(folder)
    import_once()
    everything = [
        mutant
        for room in ROOMS
        for path in sorted((ROOT / "step35_patch" / room).glob("*.py"))
        for mutant in mutants_of(str(path.relative_to(ROOT)))
    ]
    if not (folder / "recorded.json").exists():
        status = forked(folder, lambda: record(folder), None)
        if status:
            sys.exit((folder / "log").read_text()[-3000:])
    recorded = json.loads((folder / "recorded.json").read_text())
    if recorded["failed"]:
        print("fail without a mutant, and are left out:", *recorded["failed"])
    # Else a test that can't be asked for by name would seem to notice every mutant. What this
    # compiles is kept, and what a mutant compiles is not.
    names = list(recorded["seconds"])
    if forked(folder, functools.partial(pytest_run, folder, names, "--collect-only"), None):
        sys.exit((folder / "log").read_text()[-3000:])
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    sys.dont_write_bytecode = True
    reached = [mutant for mutant in everything if tests_of(mutant, recorded)]
    counts = Counter(f"{room_of(mutant.file)} all" for mutant in everything)
    counts += Counter(f"{room_of(mutant.file)} run" for mutant in reached)
    results: dict[str, tuple[str, float]] = {}
    kept = folder / "results.jsonl"
    drawn = []
    for room, number in (word.split("=") for word in options.draw.split(",")):
        those = [mutant for mutant in reached if room_of(mutant.file) == room]
        drawn += draw(those, int(number), random.Random(f"{options.seed} {room}"))
    if kept.exists():
        results = dict(json.loads(line) for line in kept.read_text().splitlines())
    # So that a run that is cut short has a sample of every file too.
    random.Random(options.seed).shuffle(drawn)
    drawn.sort(key=lambda mutant: room_of(mutant.file) in HEAVY)
    heavy = False
    for mutant in drawn:
        if room_of(mutant.file) not in options.rooms or mutant.name in results:
            continue
        if time.monotonic() - started > options.minutes * 60:
            break
        if room_of(mutant.file) in HEAVY and not heavy:
            heavy = True
            import_megatron()
        since = time.monotonic()
        outcome = run_mutant(folder, mutant, recorded)
        results[mutant.name] = (outcome, round(time.monotonic() - since, 1))
        print(outcome, results[mutant.name][1], mutant.name, mutant.file, mutant.line, flush=True)
        if outcome == "survived":
            print("    ", mutant.change, flush=True)
        with open(kept, "a") as file:
            file.write(json.dumps((mutant.name, results[mutant.name])) + "\n")
    write_tables(results, drawn, counts, options.seed)


if __name__ == "__main__":
    main()
