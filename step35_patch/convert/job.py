"""Running a conversion: files written side by side, resumed, checked and published."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

import torch

from step35_patch.convert.conversion import (
    Conversion,
    ConversionError,
    Notes,
    OutputFile,
    Sink,
    Stopped,
)
from step35_patch.convert.progress import Progress, peak_memory, readable_bytes, readable_seconds
from step35_patch.storage.staging import Staging, check_target


def run[Item](conversion: Conversion[Item]) -> None:
    """Write what is missing, check, publish and tell.

    Raises:
        ConversionError: NaN or Inf, no space, or the check found a difference.
        FileExistsError, OutputBusyError, OSError: see `Staging`.
    """
    base, began = peak_memory(), time.monotonic()
    target, options = conversion.target, conversion.options
    check_target(target, options.overwrite, conversion.markers)
    job = _Job(conversion)
    job.say_plan()
    if options.dry_run:
        job.check_space(conversion.num_bytes)
        job.say_estimate()
        return
    with _one_thread_each():
        job.convert()
    seconds = time.monotonic() - began
    job.progress.say(
        f"{target}: {conversion.tensors} tensors, {readable_bytes(conversion.num_bytes)} in "
        f"{len(conversion.files)} files, {seconds:.1f} s, "
        f"{conversion.num_bytes / seconds / 1e9:.2f} GB/s, "
        f"peak memory {readable_bytes(peak_memory() - base)} above the start"
    )


class _Job[Item]:
    """A run of a conversion, with what exists only while it lasts.

    Attributes:
        progress: in bytes of weights.
        stop: set when workers are to end, whatever they are at.
    """

    def __init__(self, conversion: Conversion[Item]):
        self.conversion = conversion
        self.progress = Progress(conversion.num_bytes)
        self.stop = threading.Event()

    def say_plan(self) -> None:
        conversion, files = self.conversion, len(self.conversion.files)
        workers = min(conversion.options.workers, files)
        # Besides, buffers on their way out.
        memory = workers * conversion.block_bytes + 2**27
        self.progress.say(
            f"{conversion.source} -> {conversion.target}: {conversion.tensors} tensors, "
            f"{readable_bytes(conversion.num_bytes)}, {files} files, {workers} at a time, "
            f"about {readable_bytes(memory)} of memory"
        )
        if conversion.notice:
            self.progress.say(conversion.notice)

    def say_estimate(self) -> None:
        """Tell the time that the bytes need at the rate at which the output's disk takes some."""
        place = _existing(self.conversion.target)
        free = shutil.disk_usage(place).free
        amount = min(2**28, free // 4)
        data = os.urandom(min(2**24, amount))
        began = time.monotonic()
        with tempfile.TemporaryFile(dir=place) as file:
            for _ in range(amount // max(len(data), 1)):
                file.write(data)
            file.flush()
            os.fsync(file.fileno())
        rate = max(amount, 1) / (time.monotonic() - began)
        self.progress.say(
            f"nothing is written (dry run); at {readable_bytes(rate)}/s, measured at the output, "
            f"it takes about {readable_seconds(self.conversion.num_bytes / rate)}"
        )

    def check_space(self, needed: int) -> None:
        free = shutil.disk_usage(_existing(self.conversion.target)).free
        if needed > free:
            raise ConversionError(
                f"{self.conversion.target}: needs {readable_bytes(needed)} of disk space, free are "
                f"{readable_bytes(free)}; nothing was written"
            )

    def convert(self) -> None:
        """Write, check and publish the output."""
        conversion, options = self.conversion, self.conversion.options
        staging = Staging(
            conversion.target,
            conversion.plan,
            overwrite=options.overwrite,
            markers=conversion.markers,
        )
        with self._clear_errors(staging), staging:
            if staging.discarded:
                self.progress.say(
                    "what an earlier run left was made of other inputs or options; removed"
                )
            elif staging.resumed:
                self.progress.say(f"going on with what an earlier run left in {staging.folder}")
            there = sum(file.num_bytes for file in conversion.files if staging.claims(file.name))
            self.check_space(conversion.num_bytes - there)
            try:
                notes = self._write_files(staging)
            finally:
                self.progress.close()
            self._refuse_nonfinite(notes)
            conversion.finish(staging, notes)
            if options.check:
                self._check_output(staging)
            staging.publish()

    @contextlib.contextmanager
    def _clear_errors(self, staging: Staging) -> Iterator[None]:
        """Say what is left and what to do with it when a run ends early."""

        def left() -> str:
            if staging.published:
                return "the output is in place"
            if not staging.keeps_files:
                return "nothing is left of it"
            return (
                f"finished files are in {staging.folder}: run the same command again to go on, or "
                "remove it"
            )

        try:
            yield
        except FileExistsError:
            raise
        except OSError as error:
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            what = "no space left on the disk" if full else error
            raise ConversionError(f"{self.conversion.target}: {what}; {left()}") from error
        except KeyboardInterrupt:
            self.progress.say(f"stopped; {left()}")
            raise

    def _write_files(self, staging: Staging) -> dict[str, Notes]:
        """Write all files that no earlier run finished, or that are damaged; the notes of all."""
        files = self.conversion.files
        notes: dict[str, Notes] = {}
        resumed: list[str] = []

        def write(file: OutputFile[Item]) -> None:
            if self.stop.is_set():
                raise Stopped
            if (found := staging.finished(file.name)) is not None:
                resumed.append(file.name)
                self.progress.skip(file.num_bytes)
            else:
                found = {}
                with staging.file(file.name, found) as out:
                    sink = Sink(out, found, self.progress, self.stop)
                    self.conversion.write(file.items, sink)
            # As they come back from a resumed run, so that nothing can depend on which it was.
            notes[file.name] = json.loads(json.dumps(found))

        with ThreadPoolExecutor(self.conversion.options.workers) as pool:
            # An interrupt may come while a worker is being started, which nobody waits for then.
            try:
                futures = [pool.submit(write, file) for file in files]
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                self.stop.set()
                pool.shutdown(cancel_futures=True)
        for future in futures:
            error = None if future.cancelled() else future.exception()
            if error is not None and not isinstance(error, Stopped):
                raise error
        if resumed:
            self.progress.say(
                f"going on: {len(resumed)} of {len(files)} files were there and whole"
            )
        return notes

    def _refuse_nonfinite(self, notes: Mapping[str, Notes]) -> None:
        names = list(dict.fromkeys(n for note in notes.values() for n in note.get("nonfinite", ())))
        if names and not self.conversion.options.allow_nonfinite:
            raise ConversionError(
                f"{self.conversion.source}: NaN or Inf in {len(names)} tensors:\n  "
                + "\n  ".join(names)
                + "\nThe model is broken, or its values don't fit the dtype. --allow-nonfinite "
                "(allow_nonfinite=True) converts it as it is."
            )

    def _check_output(self, staging: Staging) -> None:
        self.progress.say("checking: reading the output again")
        for file in self.conversion.files:
            with open(staging.out / file.name, "rb") as opened:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # from the disk
        if different := list(self.conversion.differences(staging.out)):
            staging.forget_files()
            raise ConversionError(
                f"{self.conversion.target}: not what the source holds:\n  "
                + "\n  ".join(different)
                + "\nThe disk or the memory lost data; the output was not put in place."
            )
        self.progress.say(
            f"checked: all {self.conversion.tensors} tensors are the source's, bit for bit"
        )


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Let torch share no operation among threads: workers whose threads wait for each other lose.

    On a busy machine a conversion to the published layout took half as long again. torch has no
    such setting for less than the process.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _existing(path: Path) -> Path:
    """The innermost folder above a path that is there."""
    return next(parent for parent in path.resolve().parents if parent.exists())
