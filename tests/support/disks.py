"""Disks of a test's own, which it can fill, enlarge and make read-only."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path


class NoDiskError(RuntimeError):
    """None can be mounted: not root, or not allowed to."""


@contextlib.contextmanager
def mounted(folder: Path, size: str, *options: str) -> Iterator[Path]:
    """A tmpfs.

    Raises:
        NoDiskError: it can't be mounted.
    """
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", ",".join([f"size={size}", *options]), "tmpfs", folder]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        raise NoDiskError("a tmpfs can't be mounted: not root, or not allowed to")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def remount(folder: Path, options: str) -> bool:
    """Change a mounted disk; whether it could be done, which open files may prevent."""
    command = ["mount", "-o", f"remount,{options}", folder]
    return subprocess.run(command, capture_output=True).returncode == 0


def fill(folder: Path) -> Path:
    """Leave no free byte on the disk of a folder."""
    path = folder / "filler"
    with open(path, "wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(b"x" * 4096):
            pass
    assert shutil.disk_usage(folder).free == 0
    return path
