"""Ranks of a parallel layout: processes forked from one that has done their imports.

Imports take a process longer than a layout's work, and there are dozens of layouts. The ranks have
the variables that torchrun would give them, and meet as they do under it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from support.rank_server import write

# The most that a layout of the tests has; as many devices the stand-in for CUDA claims.
MOST_RANKS = 4


@dataclass
class Ended:
    """The ranks' exit statuses, or minus the signals' numbers, and all that they wrote."""

    statuses: list[int]
    text: str


class Ranks:
    """Runs code in all ranks of one layout at a time.

    Args:
        folder: for the jobs and their logs; exists.
        imports: code that is run once, before any rank is forked.
        variables: the environment.
    """

    def __init__(self, folder: Path, imports: str, variables: Mapping[str, str]):
        self.folder, self.runs = folder, 0
        command = [sys.executable, str(Path(__file__).with_name("rank_server.py"))]
        own = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        with open(folder / "server.log", "w") as log:
            self.process = subprocess.Popen(
                [*command, str(folder), str(os.getpid()), imports],
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**variables, **own, "LOCAL_WORLD_SIZE": str(MOST_RANKS)},
            )

    def run(self, code: str, processes: int, *arguments: object, **variables: str) -> Ended:
        """Code that has `arguments`, as text, in each of some processes with their variables."""
        self.runs += 1
        log = self.folder / f"{self.runs}.log"
        # The ranks meet at a store of this process, as they do at one of torchrun's.
        store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        variables |= {
            "WORLD_SIZE": str(processes),
            "LOCAL_WORLD_SIZE": str(processes),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        ask = {
            "code": code,
            "processes": processes,
            "arguments": [str(argument) for argument in arguments],
            "variables": variables,
            "log": str(log),
        }
        write(self.folder / f"{self.runs}.json", json.dumps(ask))
        ended = self.folder / f"{self.runs}.statuses"
        while not ended.exists():
            assert self.process.poll() is None, (self.folder / "server.log").read_text()[-6000:]
            time.sleep(0.05)
        return Ended(json.loads(ended.read_text()), log.read_text())

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()


def worker_ranks(folder: Path) -> Ranks:
    """For the `main(*arguments)` of each `*_worker` of tests/support that is imported here."""
    search = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    workers = "convert_worker, distributed_worker, gradient_worker, random_layouts_worker, "
    workers += "training_worker"
    imports = f"from support import {workers}\n"
    return Ranks(
        folder, imports, os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, search))}
    )
