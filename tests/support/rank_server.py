"""What tests/support/ranks.py starts: imports once, then forks the ranks of each job.

    rank_server.py FOLDER PARENT IMPORTS

For each job that appears in FOLDER, it forks a process a rank and says how they ended. When one
rank of a job fails, the others, which may wait for it, are killed. It ends when the process PARENT
has ended.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch


def main(folder: Path, parent: str, imports: str) -> None:
    torch.set_num_threads(1)
    exec(imports)
    number = 1
    while Path("/proc", parent).exists():
        job = folder / f"{number}.json"
        if not job.exists():
            time.sleep(0.05)
            continue
        ask = json.loads(job.read_text())
        statuses = supervised([fork(ask, rank) for rank in range(ask["processes"])])
        write(folder / f"{number}.statuses", json.dumps(statuses))
        number += 1


def fork(ask: dict[str, Any], rank: int) -> int:
    """Start one rank of a job; its process's number."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        log = os.open(ask["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout.reconfigure(line_buffering=True)
        signal.alarm(900)
        os.environ.update(ask["variables"], RANK=str(rank), LOCAL_RANK=str(rank))
        exec(ask["code"], {"arguments": ask["arguments"]})
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        # Such as the manager that Megatron-Core's writer of checkpoints starts, which would stay
        # for as long as the machine runs.
        for child in multiprocessing.active_children():
            child.terminate()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def supervised(ranks: list[int]) -> list[int]:
    """The exit statuses of a job's ranks, or minus the signals' numbers, once all have ended."""
    ended: dict[int, int] = {}
    while len(ended) < len(ranks):
        pid, status = os.wait()
        if pid not in ranks:
            continue
        ended[pid] = os.waitstatus_to_exitcode(status)
        if status:
            for other in set(ranks) - set(ended):
                os.kill(other, signal.SIGKILL)
    return [ended[pid] for pid in ranks]


def write(path: Path, text: str) -> None:
    """A file that appears whole."""
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    partial.rename(path)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
