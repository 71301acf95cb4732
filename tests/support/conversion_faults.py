"""What a test or tools/faults.py does to conversions while they run."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from support import clocks
from support.conversion_runs import KILL, STOP, Ended, Run, assert_refused, at_change
from support.conversion_world import MANY, Direction, finished_files, staged, tree
from support.disks import fill, remount

# --- Kills --------------------------------------------------------------------------------------

# How a run ends by each signal: interrupted, it says so.
STATUS = {signal.SIGKILL: -signal.SIGKILL, signal.SIGTERM: 130}


@dataclass
class Killed:
    """How often by each signal, in how many outputs, of which some were resumed from files."""

    times: dict[int, int]
    outputs: int = 0
    resumed: int = 0


def kill_at_random(
    direction: Direction,
    folder: Path,
    kills: int,
    chance: random.Random,
    *,
    overwrite: bool = False,
    numbers: tuple[int, ...] = (signal.SIGKILL,),
    resumed: int = 0,
    told: str = "",
) -> Killed:
    """So many kills, up to three upon what the one before left, and a run to the end behind them.

    More of them, until so many runs to the end went on from files that were finished: on a machine
    that does other things a run can be done before the kill reaches it.

    Asserts after each that no input is changed and that the output is the old one or none, and at
    the end that it is that of a run that nothing disturbed.
    """
    wanted, options = direction.wanted[MANY], ["--overwrite"] if overwrite else []
    old = tree(direction.old) if overwrite else None
    before = tree(direction.source), tree(direction.hf)
    killed = Killed(dict.fromkeys(numbers, 0))
    while sum(killed.times.values()) < kills or killed.resumed < resumed:
        killed.outputs += 1
        assert killed.outputs < 10 * kills, f"{told}: {killed}"
        out = folder / f"out{killed.outputs}"
        if overwrite:
            shutil.copytree(direction.old, out)
        for _ in range(chance.choice([1, 1, 2, 3])):
            number = chance.choice(numbers)
            run = direction.server.start(direction.argv(out, *options))
            _wait_for_a_random_moment(run, out, len(wanted), chance)
            run.signal(number)
            ended = run.wait()
            assert (tree(direction.source), tree(direction.hf)) == before, told
            killed.times[number] += _was_killed(ended, number)
            if tree(out) == wanted:
                break
            assert _was_killed(ended, number), f"{told}: {ended.status} {ended.text}"
            between = tree(out) is None and tree(staged(out) / "old") == old
            assert tree(out) == old or between, f"{told}: {ended.text}"
        else:
            finished = len(finished_files(out))
            ended = direction.convert(out, *options)
            assert ended.status == 0, f"{told}: {ended.text}"
            killed.resumed += finished > 0
            assert (f"going on: {finished} of" in ended.text) == (finished > 0), ended.text
            direction.assert_whole(out)
    return killed


def _was_killed(ended: Ended, number: int) -> bool:
    """Whether a run ended by a signal; in its first milliseconds it does not listen to it yet."""
    return ended.status == STATUS[number] or (ended.status, ended.text) == (-number, "")


def _wait_for_a_random_moment(run: Run, out: Path, files: int, chance: random.Random) -> None:
    """Once so many more files are finished, and some milliseconds on."""
    goal = chance.randint(len(finished_files(out)), files)
    while len(finished_files(out)) < goal and not run.has_ended():
        time.sleep(0.001)
    time.sleep(chance.uniform(0, 0.01))


# --- Sources that change ------------------------------------------------------------------------


def _cut_short(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _cut_by_a_byte(path: Path) -> None:
    """Of a mapped file the rest of the page would be zeros."""
    os.truncate(path, path.stat().st_size - 1)


def _written_again(path: Path) -> None:
    """Other bytes, as many as before."""
    with open(path, "r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(os.urandom(path.stat().st_size // 2))


CHANGES: dict[str, Callable[[Path], None]] = {
    "cut short": _cut_short,
    "cut by a byte": _cut_by_a_byte,
    "written again": _written_again,
}


def weights_of(source: Path) -> list[Path]:
    """A source's files of weights."""
    return sorted([*source.rglob("*.safetensors"), *source.rglob("__*.distcp")])


def change_while_it_is_read(
    direction: Direction, source: Path, out: Path, change: Callable[[Path], None], number: int
) -> Ended:
    """Run with a source whose files change just before a run's `number`-th change on the disk."""
    argv = direction.argv(out, source=source)
    run = direction.server.start(argv, at_change(number, STOP))
    run.wait_until_stopped()
    for path in weights_of(source):
        change(path)
    run.signal(signal.SIGCONT)
    return run.wait()


# --- Disks --------------------------------------------------------------------------------------


def run_out_of_space(direction: Direction, disk: Path, number: int) -> None:
    """A disk that is full just before a run's `number`-th change on it, and then is cleaned."""
    out = disk / "out"
    run = direction.server.start(direction.argv(out), at_change(number, STOP))
    run.wait_until_stopped()
    filler = fill(disk)
    run.signal(signal.SIGCONT)
    _assert_resumed(direction, out, run.wait(), "no space left on the disk", filler.unlink)


def make_read_only(direction: Direction, disk: Path, number: int) -> None:
    """A disk that a run is killed on, at its `number`-th change, and that is read-only for a while.

    (While a run has its lock, the system does not let a disk become so.)
    """
    out = disk / "out"
    assert direction.convert(out, hook=at_change(number, KILL)).status == -signal.SIGKILL
    assert remount(disk, "ro")
    ended = direction.convert(out)
    _assert_resumed(direction, out, ended, "Read-only", lambda: remount(disk, "rw"))


def _assert_resumed(
    direction: Direction, out: Path, ended: Ended, said: str, mend: Callable[[], object]
) -> None:
    """The run was refused by its disk; once that is mended, the next goes on to a whole output."""
    finished = len(finished_files(out))
    assert_refused(ended, f"{out}: ", said)
    assert ("the same command again" in ended.text) == (finished > 0), ended.text
    assert tree(out) is None
    mend()
    ended = direction.convert(out)
    assert ended.status == 0, ended.text
    assert (f"going on: {finished} of" in ended.text) == (finished > 0)
    direction.assert_whole(out)


# --- One of each, at a random moment -------------------------------------------------------------


def _killed(number: int, count: int) -> Callable[[Direction, Path, random.Random], None]:
    def meet(direction: Direction, folder: Path, chance: random.Random) -> None:
        killed = kill_at_random(direction, folder, count, chance, numbers=(number,))
        assert killed.times[number] >= count

    return meet


def _changed(change: str) -> Callable[[Direction, Path, random.Random], None]:
    def meet(direction: Direction, folder: Path, chance: random.Random) -> None:
        source, out = folder / "source", folder / "out"
        shutil.copytree(direction.source, source)
        number = chance.randrange(3, 100)
        ended = change_while_it_is_read(direction, source, out, CHANGES[change], number)
        assert_refused(ended, "it was changed while it was read", ": expected the")
        assert tree(out) is None
        ended = direction.convert(out)
        assert ended.status == 0, ended.text
        direction.assert_whole(out)

    return meet


def _full(direction: Direction, folder: Path, chance: random.Random) -> None:
    run_out_of_space(direction, folder, chance.randrange(3, 150))


def _read_only(direction: Direction, folder: Path, chance: random.Random) -> None:
    make_read_only(direction, folder, chance.randrange(3, 150))


def _at_once(direction: Direction, folder: Path, chance: random.Random) -> None:
    """Three on one output: one makes it, the others say why they do not."""
    out, runs = folder / "out", []
    for _ in range(3):
        runs.append(direction.server.start(direction.argv(out)))
        time.sleep(chance.uniform(0, 0.3))
    ended = [run.wait() for run in runs]
    assert sorted(run.status for run in ended) == [0, 1, 1], ended
    for refused in (run for run in ended if run.status):
        busy = "another run is writing it" in refused.text
        assert_refused(refused, f"{out}: {'another run' if busy else 'exists already'}")
    direction.assert_whole(out)


def _clock(direction: Direction, folder: Path, chance: random.Random) -> None:
    out, hook = folder / "out", clocks.JUMPING + at_change(chance.randrange(40, 150), KILL)
    assert direction.convert(out, hook=hook).status == -signal.SIGKILL
    ended = direction.convert(out, hook=clocks.JUMPING)
    assert ended.status == 0 and "going on:" in ended.text, ended.text
    direction.assert_whole(out)


# How often tools/faults.py has it happen in each direction.
FAULTS: dict[str, tuple[int, Callable[[Direction, Path, random.Random], None]]] = {
    "SIGKILL": (13, _killed(signal.SIGKILL, 1)),
    "SIGTERM": (13, _killed(signal.SIGTERM, 1)),
    "disk full, then cleaned": (5, _full),
    "disk read-only, then writable": (5, _read_only),
    **{f"source {name} while it is read": (4, _changed(name)) for name in CHANGES},
    "three on one output at once": (5, _at_once),
    "clock that jumps, and SIGKILL": (5, _clock),
}
