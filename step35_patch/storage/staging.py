"""Large outputs that appear whole or not at all, and go on where a killed run stopped.

The output of `name` is built in `.name.converting` beside it:

    lock        held with flock by the run that writes; the system lets go of it if the run dies
    plan.json   what the output is made of; other contents make what is staged worthless
    done/       for each finished file its notes (size and CRC-32 among them) and their CRC-32
    out/        the output; a file that is not finished ends in .partial
    old/        the former output, for the moment in which it is replaced; then removed/

When all is there, `out` is renamed to `name` and the rest is removed.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from step35_patch.storage.mapped import MappedFile


class OutputBusyError(RuntimeError):
    """Another run is writing the same output."""


class SummedFile:
    """A file being written, with the CRC-32 of what it holds.

    Attributes:
        size: bytes so far.
        crc: of them.
    """

    def __init__(self, file: BinaryIO):
        self._file, self.size, self.crc = file, 0, 0

    def write(self, data: Any) -> int:
        """Append bytes."""
        self.crc = zlib.crc32(data, self.crc)
        written = self._file.write(data)
        self.size += written
        return written

    def flush(self) -> None:
        """For torch.save, which asks for it."""
        self._file.flush()


class Staging:
    """One output on its way; a context manager.

    Args:
        target: the folder to be made.
        plan: what determines its contents, as JSON can hold it.
        overwrite: whether a folder at `target` may be replaced.
        markers: names of files of which such a folder has one; another is never replaced.

    Attributes:
        out: the folder to become the target.
        resumed: whether files of an earlier run with the same plan are there.
        discarded: whether files of an earlier run with another plan were removed.
        published: whether `out` has become the target.

    Raises:
        FileExistsError: `target` exists and may not be replaced.
        OutputBusyError: another run is at it.
        OSError: the place can't be written to.
    """

    def __init__(self, target: Path, plan: Any, *, overwrite: bool, markers: tuple[str, ...]):
        self.target, self.overwrite, self._markers = target, overwrite, markers
        self._plan = json.dumps(plan, indent=1, sort_keys=True).encode()
        self.folder = staging_path(target)
        self.out, self._done, self._old = (self.folder / n for n in ("out", "done", "old"))
        self.resumed = self.discarded = self.published = False

    def __enter__(self) -> Staging:
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        self._lock()
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

    def __exit__(self, *exception: Any) -> None:
        """Let go; what is finished stays for the next run."""
        if not self.published and not self._old.exists() and not self.keeps_files:
            self._remove()
        os.close(self._descriptor)

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

    def _lock(self) -> None:
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
                    self._descriptor = descriptor
                    return
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
        """Undo a replacement that was cut short, or end one that was not."""
        if self._old.exists():
            if self.target.exists():
                self._remove_old()
            else:
                self._old.rename(self.target)

    def _remove_old(self) -> None:
        """Remove the former output, under another name: half of it must not be restored."""
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
        """Whether there is something for the next run to take up."""
        return any(self._done.glob("**/*.json"))

    def claims(self, name: str) -> bool:
        """Whether an earlier run says that it finished a file, without a look at its bytes."""
        return (self._done / f"{name}.json").exists()

    def finished(self, name: str) -> dict[str, Any] | None:
        """The notes of a file that an earlier run finished; None if it is not there as it was."""
        try:
            crc, text = (self._done / f"{name}.json").read_bytes().split(b"\n", 1)
            if zlib.crc32(text) != int(crc):
                raise ValueError("damaged")
            notes = json.loads(text)
            file = MappedFile(self.out / name)
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
            name: its path in the output.
            notes: kept for `finished`, as they are at the end of the block.
        """
        with _whole(self.out / name) as raw:
            file = SummedFile(raw)
            yield file
        notes |= {"size": file.size, "crc32": file.crc}
        text = json.dumps(notes).encode()
        with _whole(self._done / f"{name}.json") as raw:
            raw.write(b"%d\n%s" % (zlib.crc32(text), text))

    def small_file(self, name: str, data: bytes) -> None:
        """Write a file that is made anew by each run."""
        with _whole(self.out / name) as raw:
            raw.write(data)

    def publish(self) -> None:
        """Make `out` the target, and remove everything else."""
        check_target(self.target, self.overwrite, self._markers)
        _sync_folders(self.out)
        if self.target.exists():
            self.target.rename(self._old)
        try:
            self.out.rename(self.target)
        except BaseException:
            if not self.out.exists():  # interrupted right behind it
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
    """Raise FileExistsError if there is something at `target` that may not be replaced."""
    if not target.exists() and not target.is_symlink():
        return
    if not overwrite:
        raise FileExistsError(
            f"{target}: exists already; give --overwrite to replace it, or choose another output"
        )
    if target.is_symlink() or not any((target / name).exists() for name in markers):
        raise FileExistsError(
            f"{target}: expected a folder with {' or '.join(markers)} to overwrite, found something "
            "else; remove it yourself, or choose another output"
        )
    if training := sorted(path.name for path in target.glob("iter_*")):
        raise FileExistsError(
            f"{target}: expected a converted checkpoint to overwrite, found one of a training run "
            f"({', '.join(training[:3])}); remove it yourself, or choose another output"
        )


@contextlib.contextmanager
def _whole(path: Path) -> Iterator[BinaryIO]:
    """A file to be written, which is at `path` once it is whole and on the disk."""
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
