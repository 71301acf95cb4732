"""One conversion as a run: files written side by side, taken up again, checked, published.

What the files are made of is `convert`'s business.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from step35_patch.convert.progress import Progress, peak_memory, readable_bytes, readable_seconds
from step35_patch.storage.staging import Staging, SummedFile, check_target

DEFAULT_WORKERS = 2


class ConversionError(RuntimeError):
    """A conversion that can't be done, or was not; nothing is at the output."""


@dataclass(frozen=True)
class Options:
    """What both directions have in common.

    Attributes:
        dtype: of the written weights (routers' biases stay fp32); as they are by default.
        file_bytes: a file is closed before it would grow past this.
        workers: files that are written at a time.
        overwrite: replace a checkpoint at the output.
        check: read the output again before it appears, and compare it with the source.
        allow_nonfinite: go on with weights that are NaN or Inf.
        dry_run: only say what would be done.
    """

    dtype: torch.dtype | None = None
    file_bytes: int | None = None
    workers: int = DEFAULT_WORKERS
    overwrite: bool = False
    check: bool = False
    allow_nonfinite: bool = False
    dry_run: bool = False

    def __post_init__(self) -> None:
        for name in ("workers", "file_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, found {value}")


@dataclass
class OutputFile:
    """A file of the output: its name, the bytes of its weights, and who writes it."""

    name: str
    num_bytes: int
    write: Callable[[SummedFile, dict[str, Any]], None]


@dataclass
class Job:
    """One conversion.

    Attributes:
        source, target: folders.
        plan: see `Staging`.
        markers: see `Staging`.
        notice: what the user should know of the source.
        files: of weights.
        block_bytes: the most that one worker has in memory at a time, without mapped pages.
        finish: writes the small files, when those with weights are there.
        compare: yields the names of published tensors that are not the source's in a folder.
        tensors: published tensors.
    """

    source: Path
    target: Path
    plan: dict[str, Any]
    markers: tuple[str, ...]
    options: Options
    tensors: int
    block_bytes: int
    notice: str = ""
    files: list[OutputFile] = field(default_factory=list)
    finish: Callable[[Staging, dict[str, dict]], None] = lambda staging, notes: None
    compare: Callable[[Path], Iterator[str]] = lambda folder: iter(())
    stop: threading.Event = field(default_factory=threading.Event)
    progress: Progress | None = None

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files)

    def look_at(self, name: str, tensor: Tensor, notes: dict[str, Any]) -> None:
        """Note NaN and Inf in values to be written."""
        # A sum is NaN or Inf if one of its terms is; finite terms can only make it overflow.
        if not math.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
            notes.setdefault("nonfinite", [])
            if name not in notes["nonfinite"]:
                notes["nonfinite"].append(name)
                self.progress.say(f"{name}: has NaN or Inf")

    def count(self, num_bytes: int) -> None:
        """Tell of bytes that were written, and stop here if the run is to end."""
        self.progress.add(num_bytes)
        if self.stop.is_set():
            raise _Stopped


class _Stopped(Exception):
    """Another worker failed, or the user has had enough."""


def split_into_files(items: list, sizes: list[int], file_bytes: int) -> list[list]:
    """The items in order, in as many files as their sizes ask for."""
    parts: list[list] = []
    filled = 0
    for item, size in zip(items, sizes):
        if not parts or filled + size > file_bytes:
            parts.append([])
            filled = 0
        parts[-1].append(item)
        filled += size
    return parts


def run_job(job: Job) -> None:
    """Convert: write what is missing, check, publish and tell."""
    base, began = peak_memory(), time.monotonic()
    options = job.options
    check_target(job.target, options.overwrite, job.markers)
    job.progress = Progress(job.num_bytes)
    job.progress.say(_plan_text(job))
    if job.notice:
        job.progress.say(job.notice)
    if options.dry_run:
        _check_space(job, job.num_bytes)
        job.progress.say(_estimate(job))
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the workers are what runs side by side
    try:
        staging = Staging(job.target, job.plan, overwrite=options.overwrite, markers=job.markers)
        with _clear_errors(job, staging), staging:
            _say_what_is_there(job, staging)
            there = sum(file.num_bytes for file in job.files if staging.claims(file.name))
            _check_space(job, job.num_bytes - there)
            notes = _write_files(job, staging)
            job.progress.close()
            _refuse_nonfinite(job, notes)
            job.finish(staging, notes)
            if options.check:
                _check_output(job, staging)
            staging.publish()
    finally:
        torch.set_num_threads(threads)
    seconds = time.monotonic() - began
    job.progress.say(
        f"{job.target}: {job.tensors} tensors, {readable_bytes(job.num_bytes)} in "
        f"{len(job.files)} files, {seconds:.1f} s, {job.num_bytes / seconds / 1e9:.2f} GB/s, "
        f"peak memory {readable_bytes(peak_memory() - base)} above the start"
    )


def _plan_text(job: Job) -> str:
    workers = min(job.options.workers, len(job.files))
    # Besides, pages of mapped files stay up to some 2**28 bytes, and buffers on their way out.
    memory = workers * job.block_bytes + 3 * 2**27
    return (
        f"{job.source} -> {job.target}: {job.tensors} tensors, {readable_bytes(job.num_bytes)}, "
        f"{len(job.files)} files, {workers} at a time, about {readable_bytes(memory)} of memory"
    )


def _estimate(job: Job) -> str:
    """The time that the bytes need at the rate at which the output's disk takes some."""
    place = _existing(job.target)
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
    return (
        f"nothing is written (dry run); at {readable_bytes(rate)}/s, measured at the output, it "
        f"takes about {readable_seconds(job.num_bytes / rate)}"
    )


def _existing(path: Path) -> Path:
    """The innermost folder above a path that is there."""
    return next(parent for parent in path.resolve().parents if parent.exists())


def _check_space(job: Job, needed: int) -> None:
    free = shutil.disk_usage(_existing(job.target)).free
    if needed > free:
        raise ConversionError(
            f"{job.target}: needs {readable_bytes(needed)} of disk space, free are "
            f"{readable_bytes(free)}; nothing was written"
        )


@contextlib.contextmanager
def _clear_errors(job: Job, staging: Staging) -> Iterator[None]:
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
        raise ConversionError(f"{job.target}: {what}; {left()}") from error
    except KeyboardInterrupt:
        job.progress.say(f"stopped; {left()}")
        raise


def _say_what_is_there(job: Job, staging: Staging) -> None:
    if staging.discarded:
        job.progress.say("what an earlier run left was made of other inputs or options; removed")
    elif staging.resumed:
        job.progress.say(f"going on with what an earlier run left in {staging.folder}")


def _write_files(job: Job, staging: Staging) -> dict[str, dict]:
    """Write all files but those that an earlier run finished and that are whole; their notes."""
    notes: dict[str, dict] = {}
    taken_up = []

    def write(file: OutputFile) -> None:
        if job.stop.is_set():
            raise _Stopped
        if (found := staging.finished(file.name)) is not None:
            taken_up.append(file.name)
            job.progress.skip(file.num_bytes)
        else:
            found = {}
            with staging.file(file.name, found) as out:
                file.write(out, found)
        # As they come back from a resumed run, so that nothing can depend on which it was.
        notes[file.name] = json.loads(json.dumps(found))

    with ThreadPoolExecutor(job.options.workers) as pool:
        futures = [pool.submit(write, file) for file in job.files]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            job.stop.set()
            pool.shutdown(cancel_futures=True)
    for future in futures:
        error = None if future.cancelled() else future.exception()
        if error is not None and not isinstance(error, _Stopped):
            raise error
    if taken_up:
        job.progress.say(
            f"going on: {len(taken_up)} of {len(job.files)} files were there and whole"
        )
    return notes


def _refuse_nonfinite(job: Job, notes: dict[str, dict]) -> None:
    names = list(dict.fromkeys(n for note in notes.values() for n in note.get("nonfinite", ())))
    if names and not job.options.allow_nonfinite:
        raise ConversionError(
            f"{job.source}: NaN or Inf in {len(names)} tensors:\n  "
            + "\n  ".join(names)
            + "\nThe model is broken, or its values don't fit the dtype. --allow-nonfinite "
            "(allow_nonfinite=True) converts it as it is."
        )


def _check_output(job: Job, staging: Staging) -> None:
    job.progress.say("checking: reading the output again")
    for file in job.files:
        with open(staging.out / file.name, "rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # from the disk
    if different := list(job.compare(staging.out)):
        staging.forget_files()
        raise ConversionError(
            f"{job.target}: not what the source holds:\n  "
            + "\n  ".join(different)
            + "\nThe disk or the memory lost data; the output was not put in place."
        )
    job.progress.say(f"checked: all {job.tensors} tensors are the source's, bit for bit")
