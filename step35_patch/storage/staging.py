"""Large outputs that appear whole or not at all, and resume where a killed run stopped.

The output of `name` is built in `.name.converting` beside it:

    lock        held with flock by the run that writes; the system releases it if the run dies
    plan.json   what determines the output; what was staged under another is discarded
    done/       for each finished file its notes (with its size and CRC-32) and their CRC-32
    out/        the output; unfinished files end in .partial
    old/        the former output while it is being replaced; then removed/

When it is complete, `out` is renamed to `name` and the rest is removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import zlib
from collections.abc import Buffer, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Self

from step35_patch.storage.errors import OutputBusyError
from step35_patch.storage.reading import OpenFile


class SummedFile:
    """A file being written, with the CRC-32 of what it holds.

    Args:
        file: What it is written to.

    Attributes:
        size: Bytes so far.
        crc: The CRC-32 of them.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file, self.size, self.crc = file, 0, 0

    def write(self, data: Buffer) -> int:
        """Append bytes; returns how many."""
        self.crc = zlib.crc32(data, self.crc)
        written = self._file.write(data)
        self.size += written
        return written

    def flush(self) -> None:
        """For torch.save, which asks for it."""
        self._file.flush()


class Staging:
    """One output in the making; a context manager.

    Args:
        target: The folder to be made.
        plan: What determines its contents, as JSON can hold it.
        overwrite: Whether a folder at `target` may be replaced.
        markers: Names of files of which such a folder has one; another is never replaced.

    Attributes:
        target: The folder to be made.
        overwrite: Whether a folder at `target` may be replaced.
        folder: The folder in which it is built.
        out: The folder to become the target.
        resumed: Whether files of an earlier run with the same plan are there.
        discarded: Whether files of an earlier run with another plan were removed.
        published: Whether `out` has become the target.

    Raises:
        FileExistsError: `target` exists and may not be replaced.
        OutputBusyError: Another run is writing it.
        OSError: The place can't be written to.
    """

    def __init__(
        self, target: Path, plan: Any, *, overwrite: bool, markers: tuple[str, ...]
    ) -> None:
        self.target, self.overwrite, self._markers = target, overwrite, markers
        self._plan = json.dumps(plan, indent=1, sort_keys=True).encode()
        self.folder = staging_path(target)
        self.out, self._done, self._old = (self.folder / n for n in ("out", "done", "old"))
        self.resumed = self.discarded = self.published = False
        self._locked: int | None = None

    def __enter__(self) -> Self:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self._locked = self._lock()
        try:
            self._restore()
            check_target(self.target, self.overwrite, self._markers)
            plan = self.folder / "plan.json"
            self.resumed = plan.exists() and plan.read_bytes() == self._plan
            if not self.resumed:
                self.discarded = self._done.exists()
                for stale in (self.out, self._done):
                    shutil.rmtree(stale, ignore_errors=True)
                with _whole(plan) as raw:
                    raw.write(self._plan)
            self.out.mkdir(exist_ok=True)
            self._done.mkdir(exist_ok=True)
            for partial in self.out.rglob("*.partial"):  # of a run that was killed
                partial.unlink()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        """Release the lock; what is finished stays for the next run."""
        if not self.published and not self._old.exists() and not self.keeps_files:
            self._remove()
        if self._locked is not None:
            os.close(self._locked)
            self._locked = None

    def _remove(self) -> None:
        """Remove the folder, its lock last: another run may begin as soon as that is gone."""
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != "lock":
                path.unlink()
        (self.folder / "lock").unlink()
        with contextlib.suppress(OSError):  # the other run's by now
            self.folder.rmdir()

    def _lock(self) -> int:
        """Take the lock; returns its file's descriptor."""
        while True:
            self.folder.mkdir(exist_ok=True)
            try:
                descriptor = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
            except FileNotFoundError:  # removed by the run that has just ended
                continue
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The run that held it may have removed the file meanwhile.
                if os.fstat(descriptor).st_ino == os.stat(self.folder / "lock").st_ino:
                    return descriptor
            except BlockingIOError:
                os.close(descriptor)
                raise OutputBusyError(
                    f"{self.target}: another run is writing it; wait for that, or choose another "
                    "output"
                ) from None
            except FileNotFoundError:
                pass
            os.close(descriptor)

    def _restore(self) -> None:
        """Undo a replacement that was cut short, or finish one that was as good as done."""
        if self._old.exists():
            if self.target.exists():
                self._remove_old()
            else:
                self._old.rename(self.target)

    def _remove_old(self) -> None:
        """Remove the former output, renamed first: half of it must never be restored."""
        removed = self.folder / "removed"
        shutil.rmtree(removed, ignore_errors=True)
        self._old.rename(removed)
        shutil.rmtree(removed)

    def forget_files(self) -> None:
        """Let the next run write all files again, because these are not what they should be."""
        shutil.rmtree(self._done)
        self._done.mkdir()

    @property
    def keeps_files(self) -> bool:
        """Whether there is something from which the next run can resume."""
        return any(self._done.glob("**/*.json"))

    def claims(self, name: str) -> bool:
        """Whether an earlier run noted that it finished a file, without a look at its bytes."""
        return (self._done / f"{name}.json").exists()

    def finished(self, name: str) -> dict[str, Any] | None:
        """The notes of a file that an earlier run finished.

        Returns:
            The notes; None if the file is missing or is not as it was, and then it is removed.
        """
        try:
            crc, text = (self._done / f"{name}.json").read_bytes().split(b"\n", 1)
            if zlib.crc32(text) != int(crc):
                raise ValueError("damaged")
            notes: dict[str, Any] = json.loads(text)
            file = OpenFile(self.out / name)
            if (file.size, file.crc32(0, file.size)) == (notes["size"], notes["crc32"]):
                return notes
        except (OSError, ValueError, KeyError, TypeError):
            pass
        for path in (self._done / f"{name}.json", self.out / name):
            path.unlink(missing_ok=True)
        return None

    @contextlib.contextmanager
    def file(self, name: str, notes: dict[str, Any]) -> Iterator[SummedFile]:
        """A file of the output to be written; it counts as finished when the block ends well.

        Args:
            name: Its path in the output.
            notes: Kept for `finished`, as they are at the end of the block; its size and CRC-32 are
                added.

        Raises:
            OSError: It can't be written.
        """
        with _whole(self.out / name) as raw:
            file = SummedFile(raw)
            yield file
        notes |= {"size": file.size, "crc32": file.crc}
        text = json.dumps(notes).encode()
        with _whole(self._done / f"{name}.json") as raw:
            raw.write(b"%d\n%s" % (zlib.crc32(text), text))

    def small_file(self, name: str, data: bytes) -> None:
        """Write a file that each run makes anew.

        Args:
            name: Its path in the output.
            data: All that it holds.
        """
        with _whole(self.out / name) as raw:
            raw.write(data)

    def publish(self) -> None:
        """Make `out` the target, and remove everything else.

        Raises:
            FileExistsError: There is something at the target by now that may not be replaced.
            OSError: It can't be moved; a former output is back in its place.
        """
        check_target(self.target, self.overwrite, self._markers)
        _sync_folders(self.out)
        if self.target.exists():
            self.target.rename(self._old)
        try:
            self.out.rename(self.target)
        except BaseException:
            if not self.out.exists():  # interrupted right after it
                self.published = True
            else:
                self._restore()
            raise
        self.published = True
        _sync_folders(self.target.parent, deep=False)
        if self._old.exists():
            self._remove_old()
        self._remove()


def staging_path(target: Path) -> Path:
    """Where the output of a target is built."""
    return target.parent / f".{target.name}.converting"


def check_target(target: Path, overwrite: bool, markers: tuple[str, ...]) -> None:
    """Refuse a target that there is already and that may not be replaced.

    Args:
        target: The folder to be made.
        overwrite: Whether a folder of ours may be replaced.
        markers: Names of files of which such a folder has one.

    Raises:
        FileExistsError: There is something, and it may not be replaced.
    """
    if not target.exists() and not target.is_symlink():
        return
    if not overwrite:
        raise FileExistsError(
            f"{target}: exists already; give --overwrite to replace it, or choose another output"
        )
    if target.is_symlink() or not any((target / name).exists() for name in markers):
        raise FileExistsError(
            f"{target}: expected a folder with {' or '.join(markers)} to overwrite, found "
            "something else; remove it yourself, or choose another output"
        )
    if training := sorted(path.name for path in target.glob("iter_*")):
        raise FileExistsError(
            f"{target}: expected a converted checkpoint to overwrite, found one of a training run "
            f"({', '.join(training[:3])}); remove it yourself, or choose another output"
        )


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[BinaryIO]:
    """A file to be written, which appears at `path` once it is whole and on the disk."""
    partial = path.with_name(f"{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(partial, "wb") as raw:
            yield raw
            raw.flush()
            os.fsync(raw.fileno())
        partial.rename(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _sync_folders(folder: Path, deep: bool = True) -> None:
    folders = [folder, *(p for p in folder.rglob("*") if p.is_dir())] if deep else [folder]
    for path in folders:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
