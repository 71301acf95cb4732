"""Kill training and conversions, and count what is lost: benchmarks/results/faults.csv.

    python tools/faults.py                    # all parts, in half an hour
    python tools/faults.py training torchrun  # these; the others' figures stay
    python tools/faults.py --quick --out FILE # a few of each

Needs Linux, and root for disks that it fills and makes read-only (`unshare`, `mount`). Nothing that
it mounts is seen by other processes, or stays when it is killed itself.

Training is the example script on a tiny model with everything in it. A run that nothing disturbs
says what the checkpoint of each iteration holds; then another is ended by one fault after the other
and started again by the same command. What is counted:

    recovered  the next start went on from the newest checkpoint, to the iteration
    lost       checkpoints that Megatron had said to be saved, and that are not there or not named
    wrong      checkpoints named after a fault that are not to the bit those of the undisturbed run
    left_*     processes, ports and files that are still there afterwards; files of Python's
               multiprocessing and of torchrun, which nobody can remove behind a SIGKILL, apart
"""

from __future__ import annotations

import argparse
import csv
import itertools
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

import paired  # noqa: E402
from support import clocks, conversion_faults, killed_training, layout_runs, traces  # noqa: E402
from support.conversion_runs import Server  # noqa: E402
from support.conversion_world import TRACKER, make_world  # noqa: E402
from support.disks import fill, mounted, remount  # noqa: E402
from support.killed_training import Launched, folder_of, named  # noqa: E402

TABLE = ROOT / "benchmarks" / "results" / "faults.csv"
SEED = 35
SHARED_MEMORY = Path("/dev/shm")
# Temporary files of Python's multiprocessing and of torchrun.
_NOT_OURS = ("pymp-", "torchelastic_")


@dataclass
class Figures:
    """What a fault did; a row of the table."""

    part: str
    fault: str
    times: int = 0
    recovered: int = 0
    lost: int = 0
    wrong: int = 0
    left_processes: int = 0
    left_ports: int = 0
    left_files: int = 0
    left_files_of_others: int = 0
    end_identical: bool | None = None
    early_rss_mib: float | None = None
    late_rss_mib: float | None = None


@dataclass
class Table:
    """The rows of one part, by fault, and where they are counted."""

    part: str
    rows: dict[str, Figures] = field(default_factory=dict)

    def of(self, fault: str) -> Figures:
        return self.rows.setdefault(fault, Figures(self.part, fault))

    def count_files(self, fault: str, folders: list[Path]) -> None:
        """Count what there is in folders that were empty, and remove it."""
        for path in (path for folder in folders for path in folder.iterdir()):
            others = path.name.startswith(_NOT_OURS)
            self.of(fault).left_files += not others
            self.of(fault).left_files_of_others += others
            if not others:
                say(f"left: {path}")
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def say(text: str) -> None:
    print(text, flush=True)


# --- Training -----------------------------------------------------------------------------------

KILLS = ("SIGKILL in a step", "SIGTERM in a step", "SIGKILL in a save", "SIGTERM in a save")
DISKS = ("disk full, then cleaned", "disk full, then enlarged", "disk read-only, then writable")
CLOCK = "clock that jumps, then SIGKILL"


class Training:
    """One training with its faults."""

    def __init__(self, folder: Path, part: str, *, iterations: int, interval: int, processes: int):
        self.folder, self.iterations, self.interval = folder, iterations, interval
        self.processes, self.chance, self.starts = processes, random.Random(SEED), 0
        self.table = Table(part)
        self.config = layout_runs.write_config(folder)
        self.undisturbed, self.disk = folder / "undisturbed", folder / "disk"
        self.save = self.disk / "checkpoints"
        self.temporary, self.clock = folder / "tmp", folder / "clock"
        for path in (self.temporary, self.clock):
            path.mkdir()
        (self.clock / "sitecustomize.py").write_text(clocks.JUMPING)
        self.announced: set[int] = set()
        self.last: str | None = None

    def start(self, save: Path, *, jumping: bool = False) -> Launched:
        self.starts += 1
        words = killed_training.arguments(save, self.iterations, self.interval, self.processes)
        variables = {"STEP35_CONFIG": str(self.config), "TMPDIR": str(self.temporary)}
        if jumping:
            path = [str(self.clock), layout_runs.environment()["PYTHONPATH"]]
            variables["PYTHONPATH"] = os.pathsep.join(path)
        command = killed_training.command(words, self.processes)
        return Launched(command, self.folder / f"{self.starts}.log", variables)

    def run_undisturbed(self) -> dict[int, int]:
        """Save what is wanted; bytes in memory a while after each save, and before the end."""
        run, sizes = self.start(self.undisturbed), {}
        saves = range(self.interval, self.iterations, self.interval)
        for iteration in (*(n + self.interval // 5 for n in saves), self.iterations - 2):
            if killed_training.wait_for_step(run, iteration, self.chance):
                sizes[iteration] = traces.resident(run.process.pid)
        ended = run.wait()
        assert ended.status == 0, ended.text[-6000:]
        return sizes

    def disturb(self, faults: list[str]) -> None:
        """One fault after the other, spread over the iterations, and a run to the end."""
        for number, fault in enumerate(faults, 1):
            self._meet(fault, number * self.iterations // (len(faults) + 1))
        newest = named(self.save) or 0
        self._end("none", self.start(self.save), set(), newest)

    def _meet(self, fault: str, at: int) -> None:
        """Start, and end by a fault at an iteration or the next at which it is possible."""
        newest, interval = named(self.save) or 0, self.interval
        run = self.start(self.save, jumping=fault == CLOCK)
        save = max(newest, at - 1) // interval * interval + interval
        step = max(newest + 1, at) + self.chance.randrange(interval // 2)
        if fault in DISKS:
            ready = killed_training.wait_for_step(run, save - interval // 2, self.chance)
        elif fault.endswith("in a save"):
            stage = self.chance.choice(list(killed_training.STAGES))
            ready = killed_training.wait_for_save(run, self.save, save, stage, self.chance)
        else:
            ready = killed_training.wait_for_step(run, step, self.chance)
        assert ready, run.wait().text[-6000:]
        ports = traces.ports(run.processes())
        if fault in DISKS:
            mend = self._spoil_disk(fault)
            self._end(fault, run, ports, newest)
            mend()
        else:
            run.signal(signal.SIGTERM if fault.startswith("SIGTERM") else signal.SIGKILL)
            self._end(fault, run, ports, newest)

    def _spoil_disk(self, fault: str) -> Callable[[], object]:
        """Returns what mends it."""
        if fault == DISKS[2]:
            assert remount(self.disk, "ro")
            return lambda: remount(self.disk, "rw")
        filler = fill(self.disk)
        if fault == DISKS[0]:
            return filler.unlink
        return lambda: remount(self.disk, "size=800m")

    def _end(self, fault: str, run: Launched, ports: set[str], newest: int) -> None:
        """Wait for the end, and count what is left and whether the start before went on."""
        ended = run.wait()
        assert (ended.status == 0) == (fault == "none"), ended.text[-6000:]
        figures = self.table.of(fault)
        figures.times += 1
        left = traces.gone(run.mark)
        figures.left_processes += len(left)
        figures.left_ports += len(traces.still_open(ports))
        run.signal(signal.SIGKILL)
        self.table.count_files(fault, [self.temporary, SHARED_MEMORY])
        if self.last is not None:
            went_on = killed_training.logged(ended.text)[:1] == [newest + 1]
            self.table.of(self.last).recovered += went_on
        self.last = fault
        self.announced |= set(killed_training.announced(ended.text))
        tracked = named(self.save)
        lost = [n for n in self.announced if n > (tracked or 0)]
        lost += [n for n in self.announced if not folder_of(self.save, n).exists()]
        figures.lost += len(lost)
        if tracked is not None:
            figures.wrong += self.is_wrong(tracked)
        elif self.announced:  # as a user has to
            (self.save / TRACKER).write_text(str(max(self.announced)))
        step = max(killed_training.logged(ended.text), default=newest)
        say(f"{fault}: status {ended.status} after {step}, newest {newest}, now {tracked}")

    def is_wrong(self, iteration: int) -> bool:
        """Whether a checkpoint is not the undisturbed run's."""
        folders = (folder_of(save, iteration) for save in (self.save, self.undisturbed))
        if different := killed_training.differences(*folders):
            say(f"iteration {iteration} differs: {different}")
        return bool(different)


def train(
    folder: Path, part: str, *, iterations: int, kills: int, others: list[str], processes: int = 1
) -> list[Figures]:
    """Both runs of one part; its figures, the last of which are of the training as a whole."""
    folder.mkdir()
    faults = [fault for _, fault in zip(range(kills), itertools.cycle(KILLS))] + others
    random.Random(SEED).shuffle(faults)
    with mounted(folder / "disk", "300m"):
        training = Training(
            folder, part, iterations=iterations, interval=iterations // 20, processes=processes
        )
        sizes = training.run_undisturbed()
        say(f"memory of the undisturbed run: {sizes}")
        training.disturb(faults)
        end = training.table.of("none")
        saved = range(training.interval, iterations + 1, training.interval)
        end.fault, end.times = "all checkpoints at the end", len(saved)
        end.lost += len(set(saved) - training.announced)
        end.wrong = sum(training.is_wrong(n) for n in saved)
        end.end_identical = not training.is_wrong(iterations)
        if processes == 1:  # else it is torchrun's
            early = min(n for n in sizes if n > iterations // 10)
            end.early_rss_mib, end.late_rss_mib = (sizes[n] / 2**20 for n in (early, max(sizes)))
    return list(training.table.rows.values())


# --- Conversions --------------------------------------------------------------------------------


def convert(folder: Path, quick: bool) -> list[Figures]:
    """Both directions; of each fault that a run has, the next one has to make the output whole."""
    mark, temporary, chance = f"{os.getpid()} {folder}", folder / "tmp", random.Random(SEED)
    temporary.mkdir(parents=True)
    os.environ |= {traces.VARIABLE: mark, "TMPDIR": str(temporary)}
    server = Server(folder)
    world = make_world(folder / "world", server)
    rows = []
    for direction in world.directions.values():
        table = Table(f"convert {direction.name}")
        for fault, (times, meet) in conversion_faults.FAULTS.items():
            figures = table.of(fault)
            for number in range(1 if quick else times):
                place = folder / f"{direction.name} {fault} {number}"
                with mounted(place, "16m"):
                    figures.times += 1
                    try:
                        meet(direction, place, chance)
                        figures.recovered += 1
                    except AssertionError:
                        traceback.print_exc()
                        figures.wrong += 1
                left = traces.processes(mark) - {server.process.pid, os.getpid()}
                figures.left_processes += len(left)
                figures.left_ports += len(traces.ports([server.process.pid, *left]))
                table.count_files(fault, [temporary, SHARED_MEMORY])
            say(str(figures))
        rows += table.rows.values()
    server.close()
    return rows


# --- All ----------------------------------------------------------------------------------------


PARTS: dict[str, Callable[[Path, bool], list[Figures]]] = {
    "training": lambda folder, quick: train(
        folder,
        "training, 1 process",
        iterations=200 if quick else 2000,
        kills=4 if quick else 20,
        others=[*DISKS, CLOCK],
    ),
    "torchrun": lambda folder, quick: train(
        folder,
        "training, torchrun with 2 processes",
        iterations=100 if quick else 200,
        kills=2 if quick else 4,
        others=[],
        processes=2,
    ),
    "convert": convert,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    parser.add_argument("--quick", action="store_true", help="a few of each")
    parser.add_argument("--out", type=Path, default=TABLE, help="the table (%(default)s)")
    options = parser.parse_args()
    if "STEP35_FAULTS" not in os.environ:
        # Mounts of its own, of which nothing stays, whatever ends it.
        again = ["unshare", "--mount", sys.executable, *sys.argv]
        os.execvpe(again[0], again, os.environ | {"STEP35_FAULTS": "1"})
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", SHARED_MEMORY], check=True)
    with tempfile.TemporaryDirectory(prefix="step35-faults-") as folder:
        for part in options.parts or PARTS:
            keep(options.out, PARTS[part](Path(folder, part), options.quick))


def keep(out: Path, figures: list[Figures]) -> None:
    """Put a part's figures in the place of those that there were."""
    rows = []
    if out.exists():
        with out.open(newline="") as file:
            rows = [r for r in csv.DictReader(file) if r["part"] not in {f.part for f in figures}]
    about = paired.about("megatron-core", threads=1) | {"device": f"CPU ({platform.machine()})"}
    written = [{n: "" if v is None else v for n, v in asdict(f).items()} for f in figures]
    paired.write(out, [*rows, *(about | row for row in written)])


if __name__ == "__main__":
    main()
