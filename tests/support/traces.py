"""What runs leave behind: processes, listening ports, files.

Processes are found by a variable of their environment, whatever session or parent they have.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Collection, Iterable
from pathlib import Path

VARIABLE = "STEP35_TEST_RUN"
# How long what was killed may take to be gone, in seconds.
PATIENCE = 20
_LISTENS = "0A"


def processes(mark: str) -> set[int]:
    """The numbers of those that were started with `VARIABLE` set to this."""
    wanted, found = f"{VARIABLE}={mark}".encode(), set()
    for folder in Path("/proc").glob("[0-9]*"):
        # It may end meanwhile; one that has ended and is not waited for has no environment.
        with contextlib.suppress(OSError):
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.add(int(folder.name))
    return found


def ports(pids: Iterable[int]) -> set[str]:
    """The sockets at which these processes listen, by the kernel's number."""
    open_files = set()
    for pid in pids:
        for path in Path(f"/proc/{pid}/fd").glob("*"):
            with contextlib.suppress(OSError):
                open_files.add(os.readlink(path))
    return {socket for socket in listening() if f"socket:[{socket}]" in open_files}


def listening() -> set[str]:
    """All sockets of this machine at which somebody listens."""
    tables = [Path("/proc/net/tcp"), Path("/proc/net/tcp6")]
    rows = [line.split() for table in tables for line in table.read_text().splitlines()[1:]]
    return {row[9] for row in rows if row[3] == _LISTENS}


def gone(mark: str, besides: Collection[int] = ()) -> set[int]:
    """The processes, but for some, that are still there when there has been time enough to end."""
    deadline = time.monotonic() + PATIENCE
    while (left := processes(mark) - set(besides)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def still_open(sockets: set[str]) -> set[str]:
    """Those at which somebody listens when there has been time enough to end.

    A process that is ending has no environment any more before it closes its files.
    """
    deadline = time.monotonic() + PATIENCE
    while (left := listening() & sockets) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def resident(pid: int) -> int:
    """Bytes of a process in memory."""
    text = Path(f"/proc/{pid}/status").read_text()
    return 1024 * next(int(li.split()[1]) for li in text.splitlines() if li.startswith("VmRSS:"))
