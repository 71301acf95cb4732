"""What a conversion is: files of weights, each made on its own, and small files at the end."""

from __future__ import annotations

import math
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from step35_patch._version import __version__
from step35_patch.config.model import Step35Config
from step35_patch.convert.progress import Progress
from step35_patch.storage.hf_folder import DTYPES
from step35_patch.storage.staging import Staging, SummedFile
from step35_patch.tensors.megatron import Box, Run
from step35_patch.tensors.published import TensorInfo

# What is noted of a file while it is written: of kinds that JSON has.
type Notes = dict[str, Any]
# Reads the published elements of a run: [elements].
type Reader = Callable[[Run, Box], Tensor]
type AnyPath = str | os.PathLike[str]


class ConversionError(RuntimeError):
    """A conversion that can't be done, or failed; nothing is at the output."""


class Stopped(Exception):
    """Another worker failed, or the user has had enough."""


@dataclass(frozen=True)
class Options:
    """What both directions have in common.

    Attributes:
        dtype: of the written weights (routers' biases stay fp32); as they are by default.
        file_bytes: a file is closed before it would grow past this.
        workers: files that are written at a time.
        overwrite: replace a checkpoint at the output.
        check: read the output again before it appears, and compare it with the source.
        allow_nonfinite: convert weights that are NaN or Inf too.
        dry_run: only say what would be done.

    Raises:
        ValueError: `workers` or `file_bytes` is less than 1.
    """

    dtype: torch.dtype | None = None
    file_bytes: int | None = None
    workers: int = 2
    overwrite: bool = False
    check: bool = False
    allow_nonfinite: bool = False
    dry_run: bool = False

    def __post_init__(self) -> None:
        for name in ("workers", "file_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, found {value}")


DEFAULT_OPTIONS = Options()


@dataclass(frozen=True)
class OutputFile[Item]:
    """A file of weights of the output.

    Attributes:
        name: its path in the output.
        items: what it holds, in order.
        num_bytes: of their weights.
    """

    name: str
    items: tuple[Item, ...]
    num_bytes: int


class Sink:
    """A file of the output while a worker fills it.

    Args:
        file: takes the bytes.
        notes: on what is written; they stay with the file.
        progress: told of what was written.
        stop: set when the run is to end.
    """

    def __init__(self, file: SummedFile, notes: Notes, progress: Progress, stop: threading.Event):
        self.file, self.notes = file, notes
        self._progress, self._stop = progress, stop

    def look_at(self, name: str, values: Tensor) -> None:
        """Note if values to be written to a tensor are NaN or Inf."""
        # A sum is NaN or Inf if one of its terms is; finite terms can only make it overflow.
        if math.isfinite(values.sum()) or torch.isfinite(values).all():
            return
        nonfinite = self.notes.setdefault("nonfinite", [])
        if name not in nonfinite:
            nonfinite.append(name)
            self._progress.say(f"{name}: has NaN or Inf")

    def count(self, num_bytes: int) -> None:
        """Tell of bytes of weights that were written.

        Raises:
            Stopped: the run is to end.
        """
        self._progress.add(num_bytes)
        if self._stop.is_set():
            raise Stopped


class Conversion[Item](ABC):
    """One direction with its source, looked at and found fit; a job runs it.

    Args:
        source: the folder that is read, for messages.
        target: the folder to be made.
        options: see `Options`.
        config: of the model.
        inputs: the files that the output depends on.
        plan: what else it depends on.
        tensors: how many the output has, counted in the published layout.
        markers: see `Staging`.
        files: of weights; `write` fills them.
        block_bytes: the most that one worker has in memory at a time.
        notice: what the user should know of the source.

    Attributes:
        tensors: how many the output has, counted in the published layout.
        num_bytes: of weights, in all files.
    """

    def __init__(
        self,
        source: Path,
        target: Path,
        options: Options,
        *,
        config: Step35Config,
        inputs: Iterable[Path],
        plan: Mapping[str, Any],
        tensors: int,
        markers: tuple[str, ...],
        files: Sequence[OutputFile[Item]],
        block_bytes: int,
        notice: str = "",
    ):
        self.source, self.target, self.options = source, target, options
        self.config, self.markers, self.files = config, markers, files
        self.block_bytes, self.notice = block_bytes, notice
        self.tensors = tensors
        self.num_bytes = sum(file.num_bytes for file in files)
        self.plan = {
            "step35_patch": __version__,
            "torch": torch.__version__,
            "config": config.to_dict(),
            "file_bytes": options.file_bytes,
            "inputs": [_identity(path) for path in inputs],
            **plan,
        }

    @abstractmethod
    def write(self, items: Sequence[Item], sink: Sink) -> None:
        """Fill a file; run by several threads at a time, for a file each."""

    @abstractmethod
    def finish(self, staging: Staging, notes: Mapping[str, Notes]) -> None:
        """Write the small files, when those with weights are there.

        Args:
            staging: takes them.
            notes: by file of weights, as they come back from JSON.
        """

    @abstractmethod
    def differences(self, folder: Path) -> Iterator[str]:
        """The published tensors that a folder with the output does not hold as the source does."""


def _identity(path: Path) -> list[str | int]:
    """What changes when a file does."""
    stat = path.stat()
    return [str(path.resolve()), stat.st_size, stat.st_mtime_ns]


def refuse_nesting(sources: Iterable[Path], target: Path) -> None:
    """Refuse an output in a source, around it or in its place, which could cost the source.

    Raises:
        ValueError: with both.
    """
    b = target.resolve()
    for source in sources:
        a = source.resolve()
        if a == b or a in b.parents or b in a.parents:
            raise ValueError(
                f"output: expected a place apart from the source {source}, found {target}"
            )


def split[Item](
    items: Iterable[Item], size: Callable[[Item], int], file_bytes: int
) -> list[tuple[tuple[Item, ...], int]]:
    """The items in order, in as many files as their sizes ask for; each with its bytes."""
    parts: list[list[Item]] = []
    filled: list[int] = []
    for item in items:
        num_bytes = size(item)
        if not parts or filled[-1] + num_bytes > file_bytes:
            parts.append([])
            filled.append(0)
        parts[-1].append(item)
        filled[-1] += num_bytes
    return [(tuple(part), num_bytes) for part, num_bytes in zip(parts, filled, strict=True)]


def differing(
    infos: Iterable[TensorInfo],
    runs: Mapping[str, Sequence[tuple[Run, Box]]],
    source: Reader,
    written: Reader,
) -> Iterator[str]:
    """The names of tensors that are not written as the source has them, in their dtypes."""
    for info in infos:
        dtype = DTYPES[info.dtype]
        if not all(_same_bits(source(*pair).to(dtype), written(*pair)) for pair in runs[info.name]):
            yield info.name


def _same_bits(a: Tensor, b: Tensor) -> bool:
    # As numbers, NaN would differ from itself and 0 not from -0.
    return a.dtype == b.dtype and torch.equal(
        a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)
    )
