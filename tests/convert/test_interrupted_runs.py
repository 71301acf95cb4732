"""Conversions that are interrupted, and two that write the same output at once."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time

import pytest
from support.conversion_runs import STOP, assert_refused, at_change
from support.conversion_world import ONE, finished_files, staged, tree


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
        timeout=600,
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
