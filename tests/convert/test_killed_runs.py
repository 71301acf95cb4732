"""Conversions that are killed for real: what they leave, and the runs that resume them.

An output appears whole or not at all, the one before it stays until then, no input is changed, and
a killed run is resumed and ends with the same files to the byte.
"""

from __future__ import annotations

import random
import shutil
import signal
from pathlib import Path

import pytest
from support.conversion_faults import kill_at_random
from support.conversion_flips import SEED, flip
from support.conversion_runs import KILL, assert_refused, at_change
from support.conversion_world import ONE, Direction, finished_files, staged, tree


@pytest.mark.slow
@pytest.mark.parametrize("overwrite", [False, True], ids=["fresh", "overwrite"])
def test_sigkill_at_random_moments(direction, tmp_path, overwrite):
    """13 kills for each case, each upon what the one before it left, and a run to the end."""
    chance, told = random.Random(SEED), f"seed {SEED}"
    kill_at_random(direction, tmp_path, 13, chance, overwrite=overwrite, resumed=3, told=told)


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
            assert left == "old" or (left == "new" and "again to go on" not in ended.text), told
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
