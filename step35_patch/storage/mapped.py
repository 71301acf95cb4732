"""Files mapped into memory, whose pages can be released."""

from __future__ import annotations

import mmap
import os
import threading
import warnings
import zlib
from pathlib import Path

import torch
from torch import Tensor

from step35_patch.config.plain_file import open_plain

_BLOCK = 2**24
# Pages stay in memory up to this many bytes of what has been read.
_KEPT = 2**28

with warnings.catch_warnings():
    # Tensors over a mapped file can't be written to, of which torch warns the first time.
    warnings.simplefilter("ignore")
    torch.frombuffer(b"\0", dtype=torch.uint8)


class MappedFile:
    """A file that is read where its bytes are needed, without a copy.

    Args:
        path: The file; it must not shrink while it is mapped.

    Attributes:
        size: Its bytes.

    Raises:
        OSError: It can't be read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        with open_plain(path) as file:
            self.size = os.fstat(file.fileno()).st_size
            # An empty file can't be mapped, and has nothing to read.
            self._map = (
                mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                if self.size
                else mmap.mmap(-1, 1)
            )

    def view(self, offset: int, length: int) -> memoryview:
        """Bytes of the file; release it when done."""
        with memoryview(self._map) as whole:
            return whole[offset : offset + length]

    def tensor(self, offset: int, count: int, dtype: torch.dtype) -> Tensor:
        """A tensor over the file's bytes.

        Args:
            offset: In bytes, of the first element.
            count: Of elements.
            dtype: Of the elements.

        Returns:
            [count], not to be written to.
        """
        if count == 0:
            return torch.empty(0, dtype=dtype)
        if offset % dtype.itemsize == 0:
            return torch.frombuffer(self._map, dtype=dtype, count=count, offset=offset)
        # Neither safetensors nor zip archives promise that tensors are aligned.
        return torch.frombuffer(bytearray(self.view(offset, count * dtype.itemsize)), dtype=dtype)

    def crc32(self, offset: int, length: int) -> int:
        """CRC-32 of a range of bytes, whose pages are released."""
        crc = 0
        for start in range(offset, offset + length, _BLOCK):
            end = min(start + _BLOCK, offset + length)
            with self.view(start, end - start) as view:
                crc = zlib.crc32(view, crc)
            self.release(start, end - start)
        return crc

    def prefetch(self, offset: int, length: int) -> None:
        """Let the system read a range of bytes while this process does something else."""
        begin = offset - offset % mmap.PAGESIZE
        if begin < self.size and hasattr(self._map, "madvise"):
            self._map.madvise(mmap.MADV_WILLNEED, begin, min(offset + length, self.size) - begin)

    def release(self, offset: int = 0, length: int | None = None) -> None:
        """Take pages out of this process's memory; they are read again when needed.

        Args:
            offset: In bytes.
            length: In bytes; None for all that follow.
        """
        length = self.size - offset if length is None else length
        begin = offset - offset % mmap.PAGESIZE
        if self.size and hasattr(self._map, "madvise"):
            self._map.madvise(mmap.MADV_DONTNEED, begin, offset + length - begin)


class MappedFiles:
    """The files of a folder, mapped when they are first asked for. Threads may share it.

    Args:
        folder: The folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, MappedFile] = {}
        self._used = 0
        self._lock = threading.Lock()

    def get(self, name: str) -> MappedFile:
        """The file of that name.

        Raises:
            OSError: It can't be read.
        """
        with self._lock:
            if name not in self._files:
                self._files[name] = MappedFile(self.folder / name)
            return self._files[name]

    def used(self, num_bytes: int) -> None:
        """Count what is about to be read; now and then release the pages of what was.

        They count as the process's memory, though the system could take them back.
        """
        with self._lock:
            self._used += num_bytes
            if self._used < _KEPT:
                return
            self._used = 0
            for file in self._files.values():
                file.release()
