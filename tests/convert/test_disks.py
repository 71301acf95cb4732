"""Conversions to disks that are full or read-only, or that lose what is written to them."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from support import disks
from support.conversion_faults import make_read_only, run_out_of_space
from support.conversion_runs import assert_refused, at_change
from support.conversion_world import FEW, MANY, ONE, Direction, tree
from support.disks import remount

from step35_patch.storage.staging import SummedFile
from step35_patch.storage.torch_dist import save_record


@contextlib.contextmanager
def mounted(folder: Path, size: str) -> Iterator[Path]:
    """A tmpfs; the test is skipped where none can be mounted."""
    with contextlib.ExitStack() as stack:
        try:
            yield stack.enter_context(disks.mounted(folder, size))
        except disks.NoDiskError as error:
            pytest.skip(str(error))


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
        run_out_of_space(direction, disk, number)


@pytest.mark.parametrize("number", [8, 40, 150])
def test_disk_that_turns_read_only(direction, tmp_path, number):
    with mounted(tmp_path / "disk", "8m") as disk:
        make_read_only(direction, disk, number)


@pytest.mark.parametrize("bytes_left", [0, 100, 700])
def test_disk_that_runs_full_within_a_record(bytes_left):
    """torch, which then ends its archive all the same, complains of that."""

    class FullDisk:
        left = bytes_left

        def write(self, data):
            self.left -= len(bytes(data))
            if self.left < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return len(bytes(data))

        def flush(self):
            pass

    with pytest.raises(OSError, match="No space left"):
        save_record(torch.ones(100), SummedFile(FullDisk()))


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
        assert remount(disk, "ro")
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
