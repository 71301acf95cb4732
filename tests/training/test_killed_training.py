"""Megatron's training loop is killed and started again: what it saved is there, and is right.

tools/faults.py does the same at random moments of 2,000 iterations, with SIGTERM and more faults.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import killed_training, layout_runs, traces
from support.conversion_runs import Run, Server
from support.killed_training import differences, folder_of, named, wait_for_save

pytestmark = pytest.mark.slow

ITERATIONS, INTERVAL = 15, 5
MARK = f"killed training of {os.getpid()}"

# Such as the manager that Megatron-Core's writer of checkpoints starts.
_AFTERWARDS = """
import multiprocessing
for child in multiprocessing.active_children():
    child.terminate()
    child.join()
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    variables = layout_runs.environment() | {traces.VARIABLE: MARK}
    server = Server(tmp_path_factory.mktemp("logs"), layout_runs.IMPORTS, variables)
    yield server
    server.close()


def start(server: Server, save: Path) -> Run:
    """The example script, from the newest checkpoint, in a group of processes of its own."""
    words = killed_training.arguments(save, ITERATIONS, INTERVAL)
    config = layout_runs.write_config(save.parent)
    hook = f"""
import os
os.setpgrp()
os.environ["STEP35_CONFIG"] = {str(config)!r}
arguments = {[str(layout_runs.SCRIPT), *words]!r}
"""
    return server.start([], hook + layout_runs.FORKED + _AFTERWARDS)


def kill(server: Server, run: Run, number: int) -> str:
    """Its log. Nothing of it stays."""
    os.killpg(run.pid, number)
    ended = run.wait()
    assert ended.status == -number, ended.text[-6000:]
    assert traces.gone(MARK, besides={server.process.pid}) == set()
    return ended.text


def test_killed_training_ends_with_the_weights_of_an_undisturbed_run(server, tmp_path):
    """To the bit, with the optimizer's state, and so does each checkpoint on the way."""
    undisturbed, save, chance = tmp_path / "undisturbed", tmp_path / "save", random.Random(35)
    ended = start(server, undisturbed).wait()
    assert ended.status == 0, ended.text[-6000:]

    def assert_right(iteration: int) -> None:
        found, wanted = (folder_of(folder, iteration) for folder in (save, undisturbed))
        assert differences(found, wanted) == [], iteration

    run = start(server, save)
    assert wait_for_save(run, save, 10, "data", chance)
    log = kill(server, run, signal.SIGKILL)
    assert named(save) == max([5, *killed_training.announced(log)])

    newest = named(save)
    ended = start(server, save).wait()
    assert ended.status == 0, ended.text[-6000:]
    assert killed_training.logged(ended.text) == list(range(newest + 1, ITERATIONS + 1))
    for iteration in range(INTERVAL, ITERATIONS + 1, INTERVAL):
        assert_right(iteration)
