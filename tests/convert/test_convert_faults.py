"""What `step35-patch convert` does when things go wrong, for real and in both directions.

Real processes are killed, stopped, interrupted and run out of disk space; files are cut, flipped,
lost and forged. The claims: an output appears whole or not at all, the one before it stays until
then, no input is changed, an interrupted run is gone on with and ends with the same files to the
byte, what is wrong is said with file and name, and nothing that a pickle names is called.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import pickletools
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.reference import random_weights, tiny_config, write_hf_folder

from step35_patch.storage.hf_folder import INDEX

RELEASE, TRACKER = "release", "latest_checkpointed_iteration.txt"
SEED = 20250731
# Bytes of a file, so that there are about a hundred of them, or a few.
MANY, FEW, ONE = "4KB", "250KB", "5GB"

# --- Runs ---------------------------------------------------------------------------------------

# Forks a process for each conversion, so that a fault meets the work and not the imports. A hook
# is run in the child before the command; statuses are those of os.waitstatus_to_exitcode.
_SERVER = """
import contextlib, json, os, signal, sys, threading, traceback
import torch
import step35_patch.convert
from step35_patch.cli import main

torch.set_num_threads(1)
for line in sys.stdin:
    ask = json.loads(line)
    if "pid" in ask:
        _, status = os.waitpid(ask["pid"], os.WUNTRACED)
        print("stopped" if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status), flush=True)
        continue
    pid = os.fork()
    if pid:
        print(pid, flush=True)
        continue
    status = 99
    try:
        log = os.open(ask["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.alarm(120)
        exec(ask["hook"], {"main": main})
        status = main(ask["argv"]) if ask["argv"] else 0
    except BaseException:
        traceback.print_exc()
    finally:
        for thread in set(threading.enumerate()) - {threading.main_thread()}:
            with contextlib.suppress(RuntimeError):  # interrupted while it was being started
                thread.join()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
"""


@dataclass
class Ended:
    """How a run ended: its exit status, or minus the signal's number, and what it said."""

    status: int
    text: str


class Run:
    """A conversion under way."""

    def __init__(self, server: Server, pid: int, log: Path):
        self.server, self.pid, self.log = server, pid, log

    def wait(self) -> Ended:
        status = self.server.ask({"pid": self.pid})
        assert status != "stopped"
        return Ended(int(status), self.log.read_text())

    def wait_until_stopped(self) -> None:
        """For a hook that stops its process."""
        status = self.server.ask({"pid": self.pid})
        assert status == "stopped", f"{status}: {self.log.read_text()}"

    def has_ended(self) -> bool:
        return Path(f"/proc/{self.pid}/stat").read_text().rsplit(")")[-1].split()[0] == "Z"

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)


class Server:
    def __init__(self, folder: Path):
        self.folder, self.runs = folder, 0
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", _SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def ask(self, question: dict[str, Any]) -> str:
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline().strip()
        assert answer, "the server of processes died"
        return answer

    def start(self, argv: list, hook: str = "") -> Run:
        self.runs += 1
        log = self.folder / f"{self.runs}.log"
        words = [str(word) for word in argv]
        return Run(self, int(self.ask({"argv": words, "hook": hook, "log": str(log)})), log)

    def run(self, argv: list, hook: str = "") -> Ended:
        return self.start(argv, hook).wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("logs"))
    yield server
    server.process.stdin.close()
    server.process.wait()


def at_change(number: int, action: str) -> str:
    """A hook that runs `action` just before the `number`-th change that a run makes on the disk.

    The files of weights come first, two renames each; then small files; then the last renames.
    """
    return f"""
import os, signal, sys
made = 0

def count(event, args):
    global made
    changes = ("os.rename", "os.mkdir", "os.remove", "os.rmdir")
    if event in changes or event == "open" and "converting" in str(args[0]) and args[1] == "wb":
        made += 1
        if made == {number}:
            {action}

sys.addaudithook(count)
"""


KILL, STOP = (f"os.kill(os.getpid(), signal.{name})" for name in ("SIGKILL", "SIGSTOP"))


# --- Folders ------------------------------------------------------------------------------------


def tree(folder: Path) -> dict[str, Any] | None:
    """Names, sizes and SHA-256 of all in a folder; None if there is nothing at the path."""
    if not os.path.lexists(folder):
        return None
    return {str(path.relative_to(folder)): _described(path) for path in folder.rglob("*")}


def _described(path: Path) -> Any:
    if path.is_symlink():
        return os.readlink(path)
    if path.is_dir():
        return "folder"
    return path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()


def flip(path: Path, at: int, mask: int = 1) -> None:
    """Flip bits of a byte in place; a negative `at` counts from the end."""
    data = bytearray(path.read_bytes())
    data[at] ^= mask
    path.write_bytes(data)


def staged(out: Path) -> Path:
    return out.parent / f".{out.name}.converting"


def finished_files(out: Path) -> list[Path]:
    """Files of weights that a run that did not end has finished."""
    done = staged(out) / "done"
    files = sorted(path for path in done.rglob("*.json"))
    return [staged(out) / "out" / path.relative_to(done).with_suffix("") for path in files]


def write_shards(folder: Path, config: dict[str, Any], weights: dict[str, torch.Tensor]) -> Path:
    """A folder in the published layout with three shards and an index."""
    write_hf_folder(folder, config, weights)
    (folder / "model.safetensors").unlink()
    names = list(weights)
    parts = {f"{letter}.safetensors": names[n::3] for n, letter in enumerate("abc")}
    for file, part in parts.items():
        save_file({name: weights[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    return folder


@dataclass
class Direction:
    """One direction of conversion with its inputs, and what it makes of them.

    Attributes:
        source: the weights; hf: the folder with the config.
        old: an output of other weights.
        wanted: by size of file, the tree of a run that nothing disturbed.
    """

    name: str
    source: Path
    hf: Path
    old: Path
    server: Server
    wanted: dict[str, dict]

    def argv(self, out: Path, *options: str, size: str = MANY, source: Path | None = None) -> list:
        argv = ["convert", self.name, source or self.source, out, "--max-shard-size", size]
        return [*argv, *(["--hf-dir", self.hf] if self.name == "to-hf" else []), *options]

    def convert(self, out: Path, *options: str, hook: str = "", **more: Any) -> Ended:
        return self.server.run(self.argv(out, *options, **more), hook)

    def learn(self, folder: Path, size: str) -> None:
        ended = self.convert(folder, size=size)
        assert ended.status == 0, ended.text
        self.wanted[size] = tree(folder)

    def assert_whole(self, out: Path, size: str = MANY) -> None:
        """The output is that of a run that nothing disturbed, and nothing else is left."""
        assert tree(out) == self.wanted[size]
        assert tree(staged(out)) is None


@pytest.fixture(scope="module")
def world(tmp_path_factory, server) -> SimpleNamespace:
    folder = tmp_path_factory.mktemp("world")
    config = tiny_config()
    weights = random_weights(config, 51)
    hf = write_shards(folder / "hf", config, weights)
    other = write_shards(folder / "other", config, random_weights(config, 52))
    checkpoint, old = folder / "checkpoint", folder / "old checkpoint"
    for source, target in ((hf, checkpoint), (other, old)):
        argv = ["convert", "to-megatron", source, target, "--max-shard-size", FEW]
        assert server.run(argv).status == 0
    directions = {
        "to-megatron": Direction("to-megatron", hf, hf, old, server, {}),
        "to-hf": Direction("to-hf", checkpoint, hf, other, server, {}),
    }
    for direction in directions.values():
        for size in (MANY, FEW, ONE):
            direction.learn(folder / f"{direction.name} {size}", size)
    return SimpleNamespace(config=config, weights=weights, hf=hf, directions=directions)


@pytest.fixture(params=["to-megatron", "to-hf"])
def direction(request, world) -> Iterator[Direction]:
    """A direction whose inputs must be the same afterwards."""
    chosen = world.directions[request.param]
    before = tree(chosen.source), tree(chosen.hf)
    yield chosen
    assert (tree(chosen.source), tree(chosen.hf)) == before, "an input was changed"


def assert_refused(ended: Ended, *said: str) -> None:
    """Status 1, every fragment said, and no traceback."""
    assert ended.status == 1 and "Traceback" not in ended.text, ended.text
    for fragment in said:
        assert fragment in ended.text, f"{fragment!r} is not in: {ended.text}"


# --- Killed -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("overwrite", [False, True], ids=["fresh", "overwrite"])
def test_sigkill_at_random_moments(direction, tmp_path, overwrite):
    """13 kills for each case, each upon what the one before it left, and a run to the end."""
    chance, wanted = random.Random(SEED), direction.wanted[MANY]
    options = ["--overwrite"] if overwrite else []
    old = tree(direction.old) if overwrite else None
    before = tree(direction.source), tree(direction.hf)
    kills = resumed = rounds = 0
    while kills < 13:
        rounds += 1
        out = tmp_path / f"out{rounds}"
        if overwrite:
            shutil.copytree(direction.old, out)
        told = f"seed {SEED}, round {rounds}"
        for _ in range(chance.choice([1, 1, 2, 3])):
            run = direction.server.start(direction.argv(out, *options))
            _wait_for_a_random_moment(run, out, len(wanted), chance)
            run.signal(signal.SIGKILL)
            ended = run.wait()
            assert (tree(direction.source), tree(direction.hf)) == before, told
            kills += ended.status == -signal.SIGKILL
            if tree(out) == wanted:
                break
            assert ended.status == -signal.SIGKILL, f"{told}: {ended.text}"
            between = tree(out) is None and tree(staged(out) / "old") == old
            assert tree(out) == old or between, f"{told}: {ended.text}"
        else:
            finished = len(finished_files(out))
            ended = direction.convert(out, *options)
            assert ended.status == 0, f"{told}: {ended.text}"
            resumed += finished > 0
            assert (f"going on: {finished} of" in ended.text) == (finished > 0), ended.text
            direction.assert_whole(out)
    assert resumed >= 3


def _wait_for_a_random_moment(run: Run, out: Path, files: int, chance: random.Random) -> None:
    """Once so many more files are finished, and some milliseconds on."""
    goal = chance.randint(len(finished_files(out)), files)
    while len(finished_files(out)) < goal and not run.has_ended():
        time.sleep(0.001)
    time.sleep(chance.uniform(0, 0.01))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGKILL", "SIGINT"])
def test_end_before_every_change_on_the_disk(direction, tmp_path, name):
    """With --overwrite; in particular between the renames that replace the output."""
    old, wanted, number = tree(direction.old), direction.wanted[ONE], 0
    names = {str(old): "old", str(None): "none", str(wanted): "new"}
    seen = dict.fromkeys(names.values(), 0)
    killed = name == "SIGKILL"
    while True:
        number += 1
        out = tmp_path / f"out{number}"
        shutil.copytree(direction.old, out)
        options = ("--overwrite", "--workers", "1")
        hook = at_change(number, f"print('now', flush=True); os.kill(os.getpid(), signal.{name})")
        ended = direction.convert(out, *options, size=ONE, hook=hook)
        if "now" not in ended.text:
            break
        told = f"change {number}: {ended.text}"
        left = names[str(tree(out))]
        seen[left] += 1
        if killed:
            assert ended.status == -signal.SIGKILL, told
        else:
            assert ended.status in ((0, 130) if left == "new" else (130,)), told
            assert "Traceback" not in ended.text and not list(tmp_path.rglob("*.partial")), told
            assert left == "old" or left == "new" and "again to go on" not in ended.text, told
        again = direction.convert(out, *options, size=ONE)
        assert again.status == 0, f"{told} {again.text}"
        direction.assert_whole(out, ONE)
        shutil.rmtree(out)
    assert ended.status == 0 and seen["old"] > 15 and seen["none"] == killed
    assert seen["new"] > 3 or not killed


def test_old_output_is_back_after_a_kill_between_the_renames(direction, tmp_path):
    """Even the run that may not replace it puts it back."""
    out = tmp_path / "out"
    shutil.copytree(direction.old, out)
    assert _kill_with(direction, out, "--overwrite", lost=True)
    assert_refused(direction.convert(out, size=ONE), "exists already")
    assert tree(out) == tree(direction.old)


def _kill_with(direction: Direction, out: Path, *options: str, lost: bool) -> bool:
    """Kill a run just behind the rename that takes the output away (lost) or puts it there."""
    renamed = ".converting/old" if lost else str(out)
    hook = f"""
import os, signal
rename = os.rename

def patched(source, target, **more):
    rename(source, target, **more)
    if str(target).endswith({renamed!r}):
        {KILL}

os.rename = patched
"""
    ended = direction.convert(out, *options, size=ONE, hook=hook)
    return ended.status == -signal.SIGKILL and (tree(out) is None) == lost


def test_failure_between_the_renames_brings_the_old_output_back(direction, tmp_path):
    """A failed run, as well as an interrupted one, can still put back what it took away."""
    out = tmp_path / "out"
    shutil.copytree(direction.old, out)
    hook = f"""
import os
rename = os.rename

def patched(source, target, **more):
    if str(target) == {str(out)!r} and str(source).endswith("/out"):
        raise OSError(5, "Input/output error")
    rename(source, target, **more)

os.rename = patched
"""
    assert_refused(direction.convert(out, "--overwrite", size=ONE, hook=hook), "Input/output")
    assert tree(out) == tree(direction.old)


def test_removed_half_of_an_old_output_never_comes_back(direction, tmp_path):
    """Killed while it removes the old output; the user moves the new one away and runs again."""
    out = tmp_path / "out"
    shutil.copytree(direction.old, out)
    hook = f"""
import os, signal, sys
published = False

def watch(event, args):
    global published
    published |= event == "os.rename" and str(args[1]) == {str(out)!r}
    if published and event == "os.rmdir":
        {KILL}

sys.addaudithook(watch)
"""
    ended = direction.convert(out, "--overwrite", size=ONE, hook=hook)
    assert ended.status == -signal.SIGKILL and tree(out) == direction.wanted[ONE]
    out.rename(tmp_path / "mine")
    ended = direction.convert(out, size=ONE)
    assert ended.status == 0, ended.text
    direction.assert_whole(out, ONE)


@pytest.mark.parametrize("number", [9, 90])
@pytest.mark.parametrize("what", ["weights", "size", "note", "plan"])
def test_damage_to_what_a_killed_run_left_is_made_good(direction, tmp_path, what, number):
    out = tmp_path / "out"
    hook = at_change(number + 40, KILL)
    assert direction.convert(out, hook=hook).status == -signal.SIGKILL
    files = finished_files(out)
    assert len(files) > 3
    file = files[1]
    note = staged(out) / "done" / file.relative_to(staged(out) / "out")
    note = note.with_name(f"{note.name}.json")
    if what == "weights":
        flip(file, file.stat().st_size // 2)
    elif what == "size":
        file.write_bytes(file.read_bytes()[:-1])
    elif what == "note":
        # A digit of a place where a tensor stands, or of the check sum where there are none.
        text = note.read_bytes()
        flip(note, text.index(b"]]" if b"]]" in text else b"}") - 1)
    else:
        flip(staged(out) / "plan.json", 20, 0x80)
    ended = direction.convert(out)
    assert ended.status == 0, ended.text
    direction.assert_whole(out)
    if what != "plan":
        assert f"going on: {len(files) - 1} of" in ended.text


def test_other_options_or_inputs_start_anew(direction, tmp_path, world):
    out = tmp_path / "out"
    hook = at_change(60, KILL)
    assert direction.convert(out, "--dtype", "bfloat16", hook=hook).status == -signal.SIGKILL
    assert finished_files(out)
    ended = direction.convert(out)
    assert ended.status == 0 and "made of other inputs or options; removed" in ended.text
    direction.assert_whole(out)
    # The same names and sizes, but written anew meanwhile.
    source = tmp_path / "source"
    shutil.copytree(direction.source, source)
    out = tmp_path / "second"
    assert direction.convert(out, hook=hook, source=source).status == -signal.SIGKILL
    for path in source.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes())
    ended = direction.convert(out, source=source)
    assert ended.status == 0 and "made of other inputs or options; removed" in ended.text
    direction.assert_whole(out)


# --- Interrupted, and two at once ---------------------------------------------------------------


@pytest.mark.parametrize("number", [3, 50, 150])
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_interrupted_run_ends_cleanly_and_is_gone_on_with(direction, tmp_path, name, number):
    out = tmp_path / "out"
    run = direction.server.start(direction.argv(out), at_change(number, STOP))
    run.wait_until_stopped()
    run.signal(getattr(signal, name))
    run.signal(signal.SIGCONT)
    ended = run.wait()
    assert ended.status == 130 and "Traceback" not in ended.text, ended.text
    assert ("run the same command again" in ended.text) == staged(out).exists(), ended.text
    assert tree(out) is None and not list(tmp_path.rglob("*.partial"))
    finished = len(finished_files(out))
    ended = direction.convert(out)
    assert ended.status == 0, ended.text
    assert (f"going on: {finished} of" in ended.text) == (finished > 0)
    direction.assert_whole(out)


@pytest.mark.parametrize("times", [1, 2])
def test_interrupt_ends_the_run_soon(direction, tmp_path, times):
    """Not when the files are done that are being written; a second one is as clean."""
    out = tmp_path / "out"
    hook = """
import time
from step35_patch.storage.staging import SummedFile
write = SummedFile.write

def slow(self, data):
    time.sleep(0.6 * (len(data) > 500))
    return write(self, data)

SummedFile.write = slow
"""
    run = direction.server.start(direction.argv(out, size=ONE), hook)
    while not list(tmp_path.rglob("*.partial")):
        time.sleep(0.01)
    for _ in range(times):
        time.sleep(0.2)
        run.signal(signal.SIGINT)
    began = time.monotonic()
    ended = run.wait()
    assert ended.status == 130 and "Traceback" not in ended.text, ended.text
    assert time.monotonic() - began < 20, "some hundred slow writes were to come"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "module", ["torch", "pydantic", "step35_patch.storage.staging", "torch swallows"]
)
def test_interrupt_while_it_starts_is_clean(world, tmp_path, module):
    """Most of the first seconds goes to imports, of which some swallow what is raised in them."""
    argv = world.directions["to-megatron"].argv(tmp_path / "out")
    ended = subprocess.run(
        [
            sys.executable,
            "-W",
            "ignore",
            "-c",
            _INTERRUPTED,
            *module.split()[:1],
            module,
            *map(str, argv),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ended.returncode, "Traceback" in ended.stdout) == (130, False), ended.stdout
    assert list(tmp_path.iterdir()) == []


_INTERRUPTED = """
import os, signal, sys, time
from step35_patch.cli import main

module, swallows = sys.argv.pop(1), "swallows" in sys.argv.pop(1)
signal.signal(signal.SIGINT, signal.default_int_handler)

def watch(event, args):
    if event == "import" and args[0] == module:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)  # it comes before this ends
        except KeyboardInterrupt:
            if not swallows:
                raise

sys.addaudithook(watch)
sys.exit(main())
"""


def test_two_at_once(direction, tmp_path):
    out = tmp_path / "out"
    first = direction.server.start(direction.argv(out), at_change(50, STOP))
    first.wait_until_stopped()
    before = tree(tmp_path)
    for options in ([], ["--overwrite"], ["--dtype", "bfloat16"]):
        assert_refused(direction.convert(out, *options), f"{out}: another run is writing it")
    # By another way to the same place.
    (tmp_path / "link").symlink_to(tmp_path)
    assert_refused(direction.convert(tmp_path / "link" / "out"), "another run is writing it")
    (tmp_path / "link").unlink()
    assert tree(tmp_path) == before
    first.signal(signal.SIGCONT)
    ended = first.wait()
    assert ended.status == 0, ended.text
    direction.assert_whole(out)
    assert_refused(direction.convert(out), f"{out}: exists already; give --overwrite")


def test_output_that_appears_meanwhile_is_kept(direction, tmp_path):
    """Nobody holds a lock who makes a folder by hand."""
    out = tmp_path / "out"
    run = direction.server.start(direction.argv(out), at_change(50, STOP))
    run.wait_until_stopped()
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    run.signal(signal.SIGCONT)
    assert_refused(run.wait(), f"{out}: exists already")
    assert [path.name for path in out.iterdir()] == ["mine.txt"]
    shutil.rmtree(out)
    ended = direction.convert(out)
    assert ended.status == 0 and "going on:" in ended.text
    direction.assert_whole(out)


# --- Disks that are full, or not to be written to -----------------------------------------------


@contextlib.contextmanager
def mounted(folder: Path, size: str, *options: str) -> Iterator[Path]:
    """A tmpfs; the test is skipped where none can be mounted."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", ",".join([f"size={size}", *options]), "tmpfs", folder]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a tmpfs can't be mounted: not root, or not allowed to")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def fill(folder: Path) -> Path:
    """Leave no free byte on the disk of a folder."""
    path = folder / "filler"
    with open(path, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"x" * 4096):
            pass
    assert shutil.disk_usage(folder).free == 0
    return path


def test_disk_that_is_too_small_is_refused_first(direction, tmp_path):
    with mounted(tmp_path / "disk", "400k") as disk:
        for options in ([], ["--dry-run"]):
            ended = direction.convert(disk / "out", *options)
            assert_refused(ended, f"{disk / 'out'}: needs 605.6 kB of disk space, free are 40")
            assert list(disk.iterdir()) == []


@pytest.mark.parametrize("number", [2, 8, 40, 150, -6])
def test_disk_that_runs_full(direction, tmp_path, number):
    """Before the first file, among them, and at the small ones that come last."""
    if number < 0:  # those are counted from the end
        number += _changes(direction, tmp_path)
    with mounted(tmp_path / "disk", "8m") as disk:
        out = disk / "out"
        run = direction.server.start(direction.argv(out), at_change(number, STOP))
        run.wait_until_stopped()
        filler = fill(disk)
        run.signal(signal.SIGCONT)
        ended = run.wait()
        finished = len(finished_files(out))
        assert_refused(ended, f"{out}: no space left on the disk")
        assert ("the same command again" in ended.text) == (finished > 0), ended.text
        assert tree(out) is None
        filler.unlink()
        ended = direction.convert(out)
        assert ended.status == 0, ended.text
        assert (f"going on: {finished} of" in ended.text) == (finished > 0)
        direction.assert_whole(out)


def _changes(direction: Direction, tmp_path: Path) -> int:
    """How many changes on the disk a run makes up to and with the output's rename."""
    hook = at_change(0, "pass") + "import atexit\n"
    hook += """
rename = os.rename

def patched(source, target, **more):
    rename(source, target, **more)
    if str(source).endswith("converting/out"):
        print("changes:", made)

os.rename = patched
"""
    ended = direction.convert(tmp_path / "counted", hook=hook)
    return int(re.search(r"changes: (\d+)", ended.text)[1])


def test_space_of_a_cut_short_file_is_free_again(direction, tmp_path):
    """A killed run's half file does not count against the run that writes it anew."""
    with mounted(tmp_path / "disk", "1100k") as disk:
        out = disk / "out"
        hook = """
import os, signal
from step35_patch.storage.staging import SummedFile
write = SummedFile.write

def patched(self, data):
    done = write(self, data)
    if self.size > 550_000:
        self.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    return done

SummedFile.write = patched
"""
        assert direction.convert(out, size=ONE, hook=hook).status == -signal.SIGKILL
        assert shutil.disk_usage(disk).free < 605_600
        ended = direction.convert(out, size=ONE)
        assert ended.status == 0, ended.text
        direction.assert_whole(out, ONE)


def test_writes_that_fail_otherwise(direction, tmp_path):
    """A file may not grow past 100 kB: EFBIG, where a full disk would be ENOSPC."""
    out = tmp_path / "out"
    hook = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
"""
    ended = direction.convert(out, size=FEW, hook=hook)
    assert_refused(ended, "File too large", str(out))
    assert tree(out) is None and not list(tmp_path.rglob("*.partial"))
    assert direction.convert(out, size=FEW).status == 0
    direction.assert_whole(out, FEW)


def test_dry_run_writes_nothing_and_needs_no_space(direction, tmp_path):
    with mounted(tmp_path / "disk", "1m") as disk:
        ended = direction.convert(disk / "sub" / "out", "--dry-run")
        assert ended.status == 0 and "nothing is written" in ended.text, ended.text
        assert list(disk.iterdir()) == []


def test_read_only_disk_is_refused(direction, tmp_path):
    with mounted(tmp_path / "disk", "8m") as disk:
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        assert_refused(direction.convert(disk / "out"), "Read-only file system", str(disk))
        assert list(disk.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind root")
def test_read_only_folder_is_refused(direction, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o555)
    assert_refused(direction.convert(tmp_path / "closed" / "out"), "Permission denied")


def test_reader_of_the_messages_that_goes_away_does_not_hide_a_failure(direction, tmp_path):
    """As in `step35-patch convert ... 2>&1 | head -1`: no output, so the status can't be 0."""
    hook = """
import os
reading, writing = os.pipe()
os.close(reading)
os.dup2(writing, 2)
os.dup2(writing, 1)
"""
    ended = direction.convert(tmp_path / "out", hook=hook)
    assert (ended.status == 0) == (tree(tmp_path / "out") == direction.wanted[MANY])


# --- Places that are refused --------------------------------------------------------------------


def _a_file(direction, folder):
    (folder / "out").write_text("mine")
    return folder / "out", "exists already", "expected a folder with"


def _below_a_file(direction, folder):
    (folder / "file").write_text("mine")
    return folder / "file" / "out", str(folder / "file"), str(folder / "file")


def _another_folder(direction, folder):
    (folder / "out").mkdir()
    (folder / "out" / "mine.txt").write_text("mine")
    return folder / "out", "exists already", "expected a folder with"


def _an_empty_folder(direction, folder):
    (folder / "out").mkdir()
    return folder / "out", "exists already", "expected a folder with"


def _a_link(direction, folder):
    shutil.copytree(direction.old, folder / "old")
    (folder / "out").symlink_to(folder / "old")
    return folder / "out", "exists already", "found something else"


def _a_dangling_link(direction, folder):
    (folder / "out").symlink_to(folder / "nowhere")
    return folder / "out", "exists already", "found something else"


def _in_the_source(direction, folder):
    return folder / "source" / "out", "expected a place apart", "expected a place apart"


def _the_source(direction, folder):
    return folder / "source", "expected a place apart", "expected a place apart"


def _around_the_source(direction, folder):
    return folder, "expected a place apart", "expected a place apart"


def _the_source_by_a_link(direction, folder):
    (folder / "link").symlink_to(folder)
    return folder / "link" / "source", "expected a place apart", "expected a place apart"


@pytest.mark.parametrize("overwrite", [False, True], ids=["", "overwrite"])
@pytest.mark.parametrize(
    "place",
    [
        _a_file,
        _below_a_file,
        _another_folder,
        _an_empty_folder,
        _a_link,
        _a_dangling_link,
        _in_the_source,
        _the_source,
        _around_the_source,
        _the_source_by_a_link,
    ],
)
def test_place_is_refused_and_left_alone(direction, tmp_path, place, overwrite):
    shutil.copytree(direction.source, tmp_path / "source")
    out, *said = place(direction, tmp_path)
    before = tree(tmp_path)
    options = ["--overwrite"] if overwrite else []
    ended = direction.convert(out, *options, source=tmp_path / "source")
    assert_refused(ended, said[overwrite])
    assert tree(tmp_path) == before


@pytest.mark.parametrize("inside", ["", "sub"], ids=["the folder", "around it"])
@pytest.mark.parametrize("option", ["--hf-dir", "--mtp-from"])
def test_other_inputs_are_never_replaced(world, tmp_path, option, inside):
    """The config's folder and the MTP layers' are inputs too."""
    direction = world.directions["to-hf"]
    target = write_shards(tmp_path / "out", world.config, world.weights)
    used = shutil.copytree(target, target / inside) if inside else target
    source = direction.source
    argv = ["convert", "to-hf", source, target, "--overwrite"]
    if option == "--mtp-from":
        source = _without_mtp(world, tmp_path)
        argv = ["convert", "to-hf", source, target, "--overwrite", "--hf-dir", world.hf]
    before = tree(tmp_path)
    assert_refused(direction.server.run([*argv, option, used]), "expected a place apart")
    assert tree(tmp_path) == before


# Fields of config.json with an entry for each layer, MTP layers included.
LISTS = (
    "layer_types",
    "rope_theta",
    "partial_rotary_factors",
    "swiglu_limits",
    "swiglu_limits_shared",
)


def _without_mtp(world: SimpleNamespace, folder: Path) -> Path:
    """A checkpoint of the model without its MTP layers."""
    config = world.config | {"num_nextn_predict_layers": 0}
    for name in LISTS:
        config[name] = config[name][: config["num_hidden_layers"]]
    names = {name for name in world.weights if re.search(r"layers\.[67]\.", name)}
    weights = {name: value for name, value in world.weights.items() if name not in names}
    hf = write_hf_folder(folder / "trained", config, weights)
    server = world.directions["to-megatron"].server
    ended = server.run(["convert", "to-megatron", hf, folder / "without"])
    assert ended.status == 0, ended.text
    # It was trained with the whole model's config, of which it has a part.
    (folder / "without" / RELEASE / "common.pt").unlink()
    return folder / "without"


# --- Damaged inputs -----------------------------------------------------------------------------


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors of a safetensors file."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def reindex(folder: Path, change: Callable[[dict[str, str]], Any]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


GATE, NORM, HEAD = (
    "model.layers.1.self_attn.g_proj.weight",
    "model.norm.weight",
    "lm_head.weight",
)


def _shard_of(folder: Path, name: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def _truncated_shard(folder):
    file = folder / "b.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    return ["b.safetensors: not readable as safetensors"]


def _empty_shard(folder):
    (folder / "b.safetensors").write_bytes(b"")
    return ["b.safetensors: not readable as safetensors"]


def _truncated_header(folder):
    file = folder / "b.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    return ["b.safetensors: not readable as safetensors"]


def _header_of_an_absurd_length(folder):
    flip(folder / "b.safetensors", 7, 0x40)
    return ["b.safetensors: not readable as safetensors"]


def _folder_for_a_shard(folder):
    (folder / "b.safetensors").unlink()
    (folder / "b.safetensors").mkdir()
    return ["b.safetensors: not readable as safetensors"]


def _missing_shards(folder):
    (folder / "b.safetensors").unlink()
    (folder / "c.safetensors").unlink()
    return ["b.safetensors: not readable", "c.safetensors: not readable"]


def _no_index(folder):
    (folder / INDEX).unlink()
    return [f"expected {INDEX} or model.safetensors, found neither"]


def _half_an_index(folder):
    text = (folder / INDEX).read_text()
    (folder / INDEX).write_text(text[: len(text) // 2])
    return [f"{INDEX}: expected an object with a weight_map"]


def _index_in_no_encoding(folder):
    flip(folder / INDEX, 30, 0x80)
    return [f"{INDEX}: expected an object with a weight_map"]


def _index_of_numbers(folder):
    (folder / INDEX).write_text(json.dumps({"weight_map": {HEAD: 1}}))
    return [INDEX]


def _index_with_a_list(folder):
    (folder / INDEX).write_text(json.dumps({"weight_map": ["a.safetensors"]}))
    return [INDEX]


def _index_with_a_zero_byte(folder):
    reindex(folder, lambda index: index.update({HEAD: "a\0.safetensors"}))
    return ["a\0.safetensors: not readable as safetensors"]


def _index_that_leaves(folder):
    shutil.copy(folder / "a.safetensors", folder.parent / "x.safetensors")
    reindex(
        folder,
        lambda index: index.update(
            {HEAD: "../x.safetensors", NORM: str(folder.parent / "x.safetensors")}
        ),
    )
    return [
        f"{INDEX}: '../x.safetensors' leaves the folder",
        f"{INDEX}: '{folder.parent / 'x.safetensors'}' leaves the folder",
    ]


def _stored_twice(folder):
    value = load_file(_shard_of(folder, HEAD))[HEAD]
    first, second = sorted({"a.safetensors", "b.safetensors"})
    for name in (first, second):
        rewrite(folder / name, lambda tensors: tensors.update({HEAD: value}))
    return [f"{HEAD}: stored twice, in {first} and {second}"]


def _not_where_the_index_says(folder):
    where = _shard_of(folder, HEAD).name
    reindex(folder, lambda index: index.update({HEAD: "abc".replace(where[0], "")[0] + where[1:]}))
    return [f"{HEAD}: in {where}, where the index has"]


def _all_at_once(folder):
    """Each kind of wrong tensor, in one go."""
    file = _shard_of(folder, GATE)
    others = [name for name in load_file(file) if name not in (GATE, NORM, HEAD)]
    missing, double, bias = others[0], others[1], "model.layers.3.moe.router_bias"

    def spoil(tensors):
        del tensors[missing]
        tensors[GATE] = tensors[GATE][:-1].contiguous()
        tensors[double] = tensors[double].double()
        tensors["model.layers.8.enorm.weight"] = torch.zeros(32)

    rewrite(file, spoil)
    reindex(folder, lambda index: index.update({"model.layers.8.enorm.weight": file.name}))
    rewrite(_shard_of(folder, bias), lambda tensors: tensors.update({bias: tensors[bias].half()}))
    return [
        "5 problem(s)",
        f"{missing}: missing",
        f"{GATE}: shape (5, 32) in {file.name}, expected (6, 32)",
        f"{double}: dtype F64 in {file.name}, expected F32",
        f"model.layers.8.enorm.weight: unexpected, in {file.name}",
        f"{bias}: dtype F16 in {_shard_of(folder, bias).name}, expected F32",
    ]


@pytest.mark.parametrize(
    "harm",
    [
        _truncated_shard,
        _empty_shard,
        _truncated_header,
        _header_of_an_absurd_length,
        _folder_for_a_shard,
        _missing_shards,
        _no_index,
        _half_an_index,
        _index_in_no_encoding,
        _index_of_numbers,
        _index_with_a_list,
        _index_with_a_zero_byte,
        _index_that_leaves,
        _stored_twice,
        _not_where_the_index_says,
        _all_at_once,
    ],
)
def test_damaged_published_folder(world, tmp_path, harm):
    """Said before anything is written."""
    source = shutil.copytree(world.hf, tmp_path / "source")
    said = harm(source)
    before = tree(tmp_path)
    out = tmp_path / "new" / "out"
    ended = world.directions["to-megatron"].convert(out, source=source)
    assert_refused(ended, str(source), *said)
    assert tree(tmp_path) == before


# Runs conversions of a file with one byte changed, in one process: prints for each the status
# and whether the output is as it should be, and what was said of the first of each bad kind.
_FLIPS = """
import contextlib, io, json, resource, shutil, traceback
from pathlib import Path

resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33))
ask = json.loads({ask!r})
path, out = Path(ask["path"]), Path(ask["out"])
whole, counts, bad = path.read_bytes(), {{}}, []
for at, mask in ask["flips"]:
    path.write_bytes(whole[:at] + bytes([whole[at] ^ mask]) + whole[at + 1:])
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            status = main(ask["argv"])
    except BaseException:
        status = "raised"
        traceback.print_exc(file=said)
    if status == 0:
        names = sorted(p for p in out.rglob("*") if p.is_file())
        found = {{str(p.relative_to(out)): p.read_bytes() for p in names}}
        wanted = {{n: (Path(ask["wanted"]) / n).read_bytes() for n in found}}
        right = found == wanted
        shutil.rmtree(out)
    else:
        right = status == 1 and ask["name"] in said.getvalue() and not out.exists()
    shutil.rmtree(out.parent / f".{{out.name}}.converting", ignore_errors=True)
    counts[str(status)] = counts.get(str(status), 0) + 1
    if not right:
        bad.append((at, mask, status, said.getvalue()[-400:]))
path.write_bytes(whole)
print("RESULT", json.dumps((counts, bad)))
"""


def _flip_each(direction: Direction, source: Path, file: Path, flips: list, out: Path) -> dict:
    """Convert with each byte flipped; how often which status. Any bad end is an error."""
    wanted = out.with_name("wanted")
    assert direction.convert(wanted, size=ONE, source=source).status == 0
    argv = [str(word) for word in direction.argv(out, size=ONE, source=source)]
    ask = {
        "path": str(file),
        "out": str(out),
        "wanted": str(wanted),
        "argv": argv,
        "flips": flips,
        "name": str(source),
    }
    ended = direction.server.run([], _FLIPS.format(ask=json.dumps(ask)))
    assert "RESULT" in ended.text, ended
    counts, bad = json.loads(ended.text.split("RESULT")[1])
    shown = "\n".join(f"byte {at}, mask {mask}: {end}: {said}" for at, mask, end, said in bad[:5])
    assert not bad, f"seed {SEED}: {len(bad)} of {len(flips)} went wrong; {counts}\n{shown}"
    return counts


@pytest.mark.slow
def test_flipped_byte_in_a_safetensors_header(world, tmp_path):
    source = shutil.copytree(world.hf, tmp_path / "source")
    file = source / "b.safetensors"
    length = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    chance = random.Random(SEED)
    flips = [(at, 1) for at in range(8)]
    flips += [(chance.randrange(length), 1 << chance.randrange(8)) for _ in range(100)]
    direction = world.directions["to-megatron"]
    counts = _flip_each(direction, source, file, flips, tmp_path / "out")
    assert counts["1"] > 90


@pytest.mark.slow
def test_flipped_byte_in_the_metadata(world, tmp_path):
    """Any byte: an error that names the file, or the very same weights."""
    source = shutil.copytree(world.directions["to-hf"].source, tmp_path / "source")
    file = source / RELEASE / ".metadata"
    chance, size = random.Random(SEED), file.stat().st_size
    flips = [(chance.randrange(size), 1 << chance.randrange(8)) for _ in range(120)]
    # Numbers: places, offsets and sizes of chunks. Most of the bytes are names.
    numbers = [
        at + 1 + byte
        for opcode, _, at in pickletools.genops(file.read_bytes())
        for byte in range({"BININT1": 1, "BININT2": 2, "BININT": 3}.get(opcode.name, 0))
    ]
    flips += [(at, 1 << chance.randrange(8)) for at in chance.sample(numbers, 120)]
    direction = world.directions["to-hf"]
    counts = _flip_each(direction, source, file, flips, tmp_path / "out")
    assert counts["1"] > 150


def _change_metadata(folder: Path, change: Callable[[Any], str]) -> list[str]:
    """Change what .metadata says with torch's own classes; what is to be said."""
    file = folder / RELEASE / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    said = change(metadata)
    file.write_bytes(pickle.dumps(metadata))
    return [said]


FC1 = "decoder.layers.0.mlp.linear_fc1.weight"
EXPERTS = "decoder.layers.2.mlp.experts.experts.linear_fc1.weight"


def _move_chunk(metadata, key: str, number: int, offsets: tuple[int, ...]) -> None:
    """Say that a chunk stands elsewhere in its tensor."""
    chunk = metadata.state_dict_metadata[key].chunks[number]
    index = next(
        i for i in metadata.storage_data if i.fqn == key and tuple(i.offset) == tuple(chunk.offsets)
    )
    place = metadata.storage_data.pop(index)
    chunk.offsets = torch.Size(offsets)
    metadata.storage_data[type(index)(key, chunk.offsets)] = place


def _places(metadata, key: str) -> list:
    return [place for index, place in metadata.storage_data.items() if index.fqn == key]


def _overlapping_chunks(metadata):
    _move_chunk(metadata, FC1, 1, (40, 0))
    return FC1


def _chunk_outside(metadata):
    _move_chunk(metadata, EXPERTS, 3, (9, 24, 0))
    return EXPERTS


def _chunk_before_the_first(metadata):
    _move_chunk(metadata, EXPERTS, 3, (-1, 24, 0))
    return EXPERTS


def _chunks_of_one_place(metadata):
    first, second = _places(metadata, EXPERTS)[2:4]
    second.relative_path, second.offset = first.relative_path, first.offset
    return EXPERTS


def _record_of_another_tensor(metadata):
    other = _places(metadata, EXPERTS.replace("layers.2", "layers.3"))[0]
    place = _places(metadata, EXPERTS)[0]
    place.relative_path, place.offset = other.relative_path, other.offset
    return EXPERTS


def _record_that_ends_with_the_next(metadata):
    first, second = _places(metadata, EXPERTS)[:2]
    assert first.relative_path == second.relative_path
    first.length = second.offset + second.length - first.offset
    return EXPERTS


def _offset_that_is_no_number(metadata):
    _places(metadata, EXPERTS)[0].offset = "0"
    return ".metadata"


def _negative_offset(metadata):
    _places(metadata, EXPERTS)[0].offset = -100
    return EXPERTS


def _path_that_is_no_text(metadata):
    _places(metadata, EXPERTS)[0].relative_path = 5
    return ".metadata"


def _sizes_that_are_no_numbers(metadata):
    metadata.state_dict_metadata[EXPERTS].chunks[0].sizes = ("1", "2", "3")
    return ".metadata"


def _place_that_leaves_the_folder(metadata):
    _places(metadata, EXPERTS)[0].relative_path = "../__0_1.distcp"
    return ".metadata: '../__0_1.distcp' leaves the folder"


def _key_lost_and_key_added(metadata):
    """A wrong name, a wrong shape and a wrong dtype."""
    entries = metadata.state_dict_metadata
    entries["decoder.layers.9.enorm.weight"] = entries.pop("decoder.final_layernorm.weight")
    norm = _places(metadata, "decoder.final_layernorm.weight")[0]
    index = next(i for i in metadata.storage_data if i.fqn == "decoder.final_layernorm.weight")
    del metadata.storage_data[index]
    key = "decoder.layers.9.enorm.weight"
    metadata.storage_data[type(index)(key, index.offset)] = norm
    return f"{key}: unexpected"


@pytest.mark.parametrize(
    "change",
    [
        _overlapping_chunks,
        _chunk_outside,
        _chunk_before_the_first,
        _chunks_of_one_place,
        _record_of_another_tensor,
        _record_that_ends_with_the_next,
        _offset_that_is_no_number,
        _negative_offset,
        _path_that_is_no_text,
        _sizes_that_are_no_numbers,
        _place_that_leaves_the_folder,
        _key_lost_and_key_added,
    ],
)
def test_metadata_that_tells_a_wrong_story(world, tmp_path, change):
    """Well-formed, so that only its sense can show it; said before anything is written."""
    direction = world.directions["to-hf"]
    source = shutil.copytree(direction.source, tmp_path / "source")
    said = _change_metadata(source, change)
    before = tree(tmp_path)
    ended = direction.convert(tmp_path / "out", source=source)
    assert_refused(ended, str(source), *said)
    assert tree(tmp_path) == before


def test_small_metadata_takes_little_memory(world, tmp_path):
    """A pickle of eleven bytes may ask its reader for gigabytes (and a flipped bit of a sane one:
    an R becomes an r, the opcode that stores an object under a number of four bytes)."""
    direction = world.directions["to-hf"]
    source = shutil.copytree(direction.source, tmp_path / "source")
    (source / RELEASE / ".metadata").write_bytes(
        b"\x80\x04Nr" + (2**27).to_bytes(4, "little") + b"."
    )
    hook = f"""
import resource
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
status = main({[str(word) for word in direction.argv(tmp_path / "out", source=source)]!r})
print(status, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1000, "MB")
"""
    ended = direction.server.run([], hook)
    status, grown = re.search(r"(\d+) (\d+) MB", ended.text).groups()
    assert status == "1" and ".metadata: not readable" in ended.text
    assert int(grown) < 500


def _distcp_of(folder: Path, key: str) -> tuple[Path, int, int]:
    """The file of a tensor's first chunk, the record's offset there and its length."""
    metadata = pickle.loads((folder / RELEASE / ".metadata").read_bytes())
    place = _places(metadata, key)[0]
    return folder / RELEASE / place.relative_path, place.offset, place.length


def _truncated_distcp(folder):
    file, *_ = _distcp_of(folder, EXPERTS)
    file.write_bytes(file.read_bytes()[:-1])
    return [f"in {file.name}: expected at least", "the file is truncated"]


def _empty_distcp(folder):
    file, *_ = _distcp_of(folder, EXPERTS)
    file.write_bytes(b"")
    return [f"{EXPERTS}: in {file.name}: expected at least", "found 0: the file is truncated"]


def _missing_distcp(folder):
    file, *_ = _distcp_of(folder, EXPERTS)
    file.unlink()
    return [f"{EXPERTS}: in {file.name}: ", "No such file"]


def _flipped_record(folder):
    """In the archive's list of its members."""
    file, offset, length = _distcp_of(folder, EXPERTS)
    flip(file, offset + length - 22)
    return [f"{EXPERTS}: in {file.name}: damaged record"]


def _no_metadata(folder):
    (folder / RELEASE / ".metadata").unlink()
    return [f"{TRACKER} names release: expected .metadata"]


def _empty_metadata(folder):
    (folder / RELEASE / ".metadata").write_bytes(b"")
    return [".metadata: not readable"]


def _no_tracker(folder):
    (folder / TRACKER).unlink()
    return [f"expected {TRACKER} or .metadata of a torch_dist checkpoint"]


def _tracker_of_nonsense(folder):
    (folder / TRACKER).write_text("../other")
    return [f"{TRACKER}: expected an iteration, found '../other'"]


def _tracker_in_no_encoding(folder):
    (folder / TRACKER).write_bytes(b"\xff\xfe")
    return [TRACKER]


def _common_state_that_is_a_list(folder):
    torch.save([1, 2], folder / RELEASE / "common.pt")
    return ["common"]


def _common_state_of_noise(folder):
    (folder / RELEASE / "common.pt").write_bytes(b"noise")
    return ["common"]


def _common_state_of_another_model(folder):
    from argparse import Namespace

    state = {"args": Namespace(step35_fingerprint="0123")}
    torch.save(state, folder / RELEASE / "common.pt")
    return ["config: expected fingerprint", "found 0123"]


@pytest.mark.parametrize(
    "harm",
    [
        _truncated_distcp,
        _empty_distcp,
        _missing_distcp,
        _flipped_record,
        _no_metadata,
        _empty_metadata,
        _no_tracker,
        _tracker_of_nonsense,
        _tracker_in_no_encoding,
        _common_state_that_is_a_list,
        _common_state_of_noise,
        _common_state_of_another_model,
    ],
)
def test_damaged_megatron_checkpoint(world, tmp_path, harm):
    """Said before anything is written."""
    direction = world.directions["to-hf"]
    source = shutil.copytree(direction.source, tmp_path / "source")
    said = harm(source)
    before = tree(tmp_path)
    ended = direction.convert(tmp_path / "new" / "out", source=source)
    assert_refused(ended, str(source), *said)
    assert tree(tmp_path) == before


@pytest.mark.slow
def test_flipped_byte_in_a_distcp_file(world, tmp_path):
    """Of weights: a check sum that differs, with file and key. Elsewhere the same, or no harm."""
    direction = world.directions["to-hf"]
    source = shutil.copytree(direction.source, tmp_path / "source")
    file, *_ = _distcp_of(source, EXPERTS)
    chance, size = random.Random(SEED), file.stat().st_size
    flips = [(chance.randrange(size), 1 << chance.randrange(8)) for _ in range(120)]
    counts = _flip_each(direction, source, file, flips, tmp_path / "out")
    assert counts["1"] > 60


def test_flipped_weight_in_a_distcp_file(world, tmp_path):
    direction = world.directions["to-hf"]
    source = shutil.copytree(direction.source, tmp_path / "source")
    file, offset, length = _distcp_of(source, EXPERTS)
    flip(file, offset + length // 2)
    out = tmp_path / "out"
    ended = direction.convert(out, source=source)
    assert_refused(ended, f"{EXPERTS}: in {file.name}: check sum ", "the file was damaged after")
    assert tree(out) is None
    flip(file, offset + length // 2)
    assert direction.convert(out, source=source).status == 0
    direction.assert_whole(out)


# --- Forged pickles -----------------------------------------------------------------------------


class _Forged:
    """A pickle that makes a file when it is loaded by pickle or torch.load."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


def _forge_metadata(folder, bomb):
    _change_metadata(folder, lambda metadata: setattr(metadata, "planner_data", bomb) or "")


def _forge_whole_metadata(folder, bomb):
    (folder / RELEASE / ".metadata").write_bytes(pickle.dumps(bomb))


def _forge_common_state(folder, bomb):
    torch.save({"args": bomb, "iteration": 0}, folder / RELEASE / "common.pt")


def _forge_record(folder, bomb):
    file, offset, length = _distcp_of(folder, EXPERTS)
    record = folder.parent / "record"
    torch.save(bomb, record)
    end = file.stat().st_size
    with open(file, "ab") as opened:
        opened.write(record.read_bytes())

    def change(metadata):
        place = _places(metadata, EXPERTS)[0]
        place.offset, place.length = end, record.stat().st_size
        return EXPERTS

    _change_metadata(folder, change)


@pytest.mark.parametrize(
    "forge", [_forge_metadata, _forge_whole_metadata, _forge_common_state, _forge_record]
)
def test_nothing_that_a_pickle_names_is_called(world, tmp_path, forge):
    direction = world.directions["to-hf"]
    source = shutil.copytree(direction.source, tmp_path / "source")
    touched = tmp_path / "touched"
    pickle.loads(pickle.dumps(_Forged(touched)))
    assert touched.exists(), "the forged pickle works"
    touched.unlink()
    forge(source, _Forged(touched))
    ended = direction.convert(tmp_path / "out", source=source)
    assert ended.status in (0, 1) and "Traceback" not in ended.text, ended.text
    assert not touched.exists()
    if ended.status == 0:  # the rest of it was whole
        direction.assert_whole(tmp_path / "out")


def test_nothing_that_a_pickle_names_is_imported(world, tmp_path, monkeypatch):
    module = tmp_path / "modules" / "step35_forged.py"
    module.parent.mkdir()
    module.write_text(f"open({str(tmp_path / 'touched')!r}, 'w')\nclass Thing: pass\n")
    direction = world.directions["to-hf"]
    source = shutil.copytree(direction.source, tmp_path / "source")
    named = b"\x80\x04cstep35_forged\nThing\n."
    (source / RELEASE / ".metadata").write_bytes(named)
    hook = f"import sys\nsys.path.insert(0, {str(module.parent)!r})"
    assert_refused(direction.convert(tmp_path / "out", source=source, hook=hook), ".metadata")
    assert not (tmp_path / "touched").exists()
    monkeypatch.syspath_prepend(str(module.parent))
    pickle.loads(named)
    assert (tmp_path / "touched").exists(), "pickle imports it"


# --- NaN and Inf --------------------------------------------------------------------------------

BROKEN = {
    GATE: float("nan"),
    "model.layers.4.moe.down_proj.weight": float("inf"),
    "model.layers.7.transformer.shared_head.output.weight": float("-inf"),
    "model.layers.2.moe.router_bias": float("nan"),
}


@pytest.fixture(scope="module")
def broken(world, tmp_path_factory) -> SimpleNamespace:
    """Weights with a NaN or Inf in one element each, in both layouts."""
    folder = tmp_path_factory.mktemp("broken")
    weights = {name: value.clone() for name, value in world.weights.items()}
    for name, value in BROKEN.items():
        weights[name].view(-1)[-3] = value
    hf = write_shards(folder / "hf", world.config, weights)
    argv = ["convert", "to-megatron", hf, folder / "checkpoint", "--allow-nonfinite"]
    ended = world.directions["to-megatron"].server.run(argv)
    assert ended.status == 0, ended.text
    sources = {"to-megatron": hf, "to-hf": folder / "checkpoint"}
    return SimpleNamespace(weights=weights, hf=hf, sources=sources)


def test_nan_and_inf_are_reported_by_published_names(direction, broken, tmp_path):
    source, out = broken.sources[direction.name], tmp_path / "out"
    ended = direction.convert(out, source=source)
    assert_refused(ended, f"{source}: NaN or Inf in {len(BROKEN)} tensors", "--allow-nonfinite")
    listed = ended.text.split("tensors:\n")[1].split("\nThe model")[0].split()
    assert sorted(listed) == sorted(BROKEN)
    assert tree(out) is None
    # What an earlier run found is not forgotten by the one that goes on with its files.
    again = direction.convert(out, source=source)
    assert_refused(again, "going on:", *BROKEN)
    assert tree(out) is None
    ended = direction.convert(out, "--allow-nonfinite", "--check", source=source)
    assert ended.status == 0 and "bit for bit" in ended.text, ended.text
    if direction.name == "to-hf":
        found = {}
        for path in out.glob("*.safetensors"):
            found |= load_file(path)
        assert {n: t.numpy().tobytes() for n, t in found.items()} == {
            n: t.numpy().tobytes() for n, t in broken.weights.items()
        }


def test_values_that_do_not_fit_the_dtype_are_reported(direction, world, tmp_path):
    weights = {name: value.clone() for name, value in world.weights.items()}
    weights[GATE][2, 3] = -1e5
    source = write_shards(tmp_path / "hf", world.config, weights)
    if direction.name == "to-hf":
        argv = ["convert", "to-megatron", source, tmp_path / "checkpoint"]
        assert direction.server.run(argv).status == 0
        source = tmp_path / "checkpoint"
    out = tmp_path / "out"
    ended = direction.convert(out, "--dtype", "float16", source=source)
    assert_refused(ended, "NaN or Inf in 1 tensors", GATE)
    assert tree(out) is None
    assert direction.convert(out, "--dtype", "bfloat16", source=source).status == 0


# --- A lost write -------------------------------------------------------------------------------

# One byte of a file's weights reaches the disk flipped, whatever the program believes.
_LOST_WRITE = """
from step35_patch.storage.staging import SummedFile

init, lost = SummedFile.__init__, []

class Disk:
    def __init__(self, file):
        self.file = file

    def write(self, data):
        data = bytes(data)
        if not lost and len(data) > 2000:
            lost.append(1)
            data = data[:1000] + bytes([data[1000] ^ 1]) + data[1001:]
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)

def patched(self, file):
    init(self, Disk(file))

SummedFile.__init__ = patched
"""


def test_check_finds_a_write_that_was_lost(direction, tmp_path):
    out = tmp_path / "out"
    assert direction.convert(out, size=ONE, hook=_LOST_WRITE).status == 0
    assert tree(out) != direction.wanted[ONE], "without --check it goes unseen"
    out = tmp_path / "checked"
    ended = direction.convert(out, "--check", size=ONE, hook=_LOST_WRITE)
    assert_refused(ended, "checking", str(out))
    assert tree(out) is None
    ended = direction.convert(out, "--check", size=ONE)
    assert ended.status == 0, ended.text
    direction.assert_whole(out, ONE)


def test_check_names_the_tensor_that_differs(direction, world, tmp_path):
    """The memory was wrong before the check sum was made; the next run does not trust the file."""
    out = tmp_path / "out"
    hook = """
from step35_patch.convert.conversion import Sink
from step35_patch.storage import hf_folder as hf_files
from step35_patch.storage import torch_dist

same, spoiled = Sink.look_at, []

def patched(self, name, tensor):
    if name == "model.layers.3.moe.up_proj.weight" and not spoiled:
        spoiled.append(tensor)
        copy = tensor.clone()
        copy.view(-1)[5] += 1
        tensor.set_(copy)
    return same(self, name, tensor)

Sink.look_at = patched
"""
    ended = direction.convert(out, "--check", size=FEW, hook=hook)
    assert_refused(ended, "not what the source holds:\n  model.layers.3.moe.up_proj.weight\n")
    assert tree(out) is None
    ended = direction.convert(out, "--check", size=FEW)
    assert ended.status == 0, ended.text
    direction.assert_whole(out, FEW)
