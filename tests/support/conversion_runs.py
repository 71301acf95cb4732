"""Runs of `step35-patch convert` in processes that a test can kill, stop, interrupt and look at."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Forks a process for each conversion, so that a fault meets the work and not the imports. A hook
# is run in the child before the command; statuses are those of os.waitstatus_to_exitcode.
_SERVER = """
import contextlib, json, os, signal, sys, threading, traceback
import torch
from step35_patch.cli import main

torch.set_num_threads(1)
exec(sys.argv[1])
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
        signal.alarm(600)
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
    """A run under way."""

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
    """Starts runs in processes that are forked from one that has done the imports.

    Args:
        folder: for what they say.
        imports: code that is run once.
        variables: of the environment, besides this process's.
    """

    def __init__(
        self,
        folder: Path,
        imports: str = "import step35_patch.convert",
        variables: Mapping[str, str] | None = None,
    ):
        self.folder, self.runs = folder, 0
        self.process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", _SERVER, imports],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **(variables or {}), "OMP_NUM_THREADS": "1"},
        )

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()

    def ask(self, question: dict[str, Any]) -> str:
        self.process.stdin.write(json.dumps(question) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline().strip()
        assert answer, "the server of processes died"
        return answer

    def start(self, argv: list, hook: str = "") -> Run:
        self.runs += 1
        log = self.folder / f"{self.runs}.log"
        log.touch()  # one that is killed at once writes none
        words = [str(word) for word in argv]
        return Run(self, int(self.ask({"argv": words, "hook": hook, "log": str(log)})), log)

    def run(self, argv: list, hook: str = "") -> Ended:
        return self.start(argv, hook).wait()


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


def assert_refused(ended: Ended, *said: str) -> None:
    """Status 1, every fragment said, and no traceback."""
    assert ended.status == 1 and "Traceback" not in ended.text, ended.text
    for fragment in said:
        assert fragment in ended.text, f"{fragment!r} is not in: {ended.text}"
