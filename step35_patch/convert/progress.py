"""How far a long run of copying is, and figures as people read them."""

from __future__ import annotations

import sys
import threading
import time
from pathlib import Path
from typing import TextIO

from step35_patch.terminal import StatusLine

# Seconds between two updates of the bar, and between two plain lines.
_BAR_EVERY, _LINE_EVERY = 0.2, 10.0
_BAR_WIDTH = 24


def readable_bytes(count: float) -> str:
    """A number of bytes in decimal units."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:,.2f} GB"


def readable_seconds(seconds: float) -> str:
    """A duration as minutes and hours."""
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def peak_memory() -> int:
    """The most bytes that this process has had in memory at a time."""
    try:
        status = Path("/proc/self/status").read_text("ascii")
    except OSError:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


class Progress:
    """Counts bytes and shows them: as a bar on a terminal, as a line now and then elsewhere.

    Threads may share it.

    Args:
        total: bytes to come.
        stream: where it is shown; standard error if None.
    """

    def __init__(self, total: int, stream: TextIO | None = None):
        self.total, self.done = total, 0
        self._line = StatusLine(stream or sys.stderr)
        self._start = time.monotonic()
        self._shown, self._skipped = self._start, 0
        self._lock = threading.Lock()

    def skip(self, count: int) -> None:
        """Count bytes that were there already; they say nothing about the rate."""
        with self._lock:
            self.done += count
            self._skipped += count

    def add(self, count: int) -> None:
        """Count bytes that were written."""
        with self._lock:
            self.done += count
            now = time.monotonic()
            if now - self._shown >= (_BAR_EVERY if self._line.drawn else _LINE_EVERY):
                self._shown = now
                self._show(now)

    def _show(self, now: float) -> None:
        rate = (self.done - self._skipped) / max(now - self._start, 1e-9)
        left = (self.total - self.done) / rate if rate else 0
        share = self.done / max(self.total, 1)
        text = (
            f"{share:4.0%}  {readable_bytes(self.done)} of {readable_bytes(self.total)}  "
            f"{readable_bytes(rate)}/s  {readable_seconds(left)} left"
        )
        if self._line.drawn:
            bar = "#" * round(share * _BAR_WIDTH)
            self._line.show(f"[{bar:<{_BAR_WIDTH}}] {text}")
        else:
            self._line.say(text)

    def say(self, text: str) -> None:
        """Print a line."""
        with self._lock:
            self._line.say(text)

    def close(self) -> None:
        """Show the bar once more, and leave it."""
        with self._lock:
            if self._line.drawn:
                self._show(time.monotonic())
                self._line.close()
