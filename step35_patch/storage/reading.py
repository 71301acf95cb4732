"""Files of which ranges are read, and that must stay as they were when they were opened.

They are not mapped into memory: a mapped file that is cut short ends the process that reads it, or
gives it zeros up to the end of a page.
"""

from __future__ import annotations

import os
import threading
import zlib
from pathlib import Path

import torch
from torch import Tensor

from step35_patch.config.plain_file import open_plain
from step35_patch.storage.errors import CheckpointError

_BLOCK = 2**24


class OpenFile:
    """A file that is read where its bytes are needed. Threads may share it.

    Args:
        path: The file.

    Attributes:
        path: The file.
        size: Its bytes.

    Raises:
        OSError: It can't be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = open_plain(path)
        self.size, self._written = self._state()

    def _state(self) -> tuple[int, int]:
        """What changes when the file does: its bytes, and when they were written."""
        stat = os.fstat(self._file.fileno())
        return stat.st_size, stat.st_mtime_ns

    def read(self, offset: int, length: int) -> bytearray:
        """Bytes of the file.

        Args:
            offset: Of the first one.
            length: How many.

        Raises:
            CheckpointError: There are not so many, or the file is not as it was when it was opened.
            OSError: They can't be read.
        """
        data = bytearray(length)
        with memoryview(data) as view:
            self._fill(view, offset)
        return data

    def tensor(self, offset: int, count: int, dtype: torch.dtype) -> Tensor:
        """A tensor of the file's bytes.

        Args:
            offset: In bytes, of the first element.
            count: Of elements.
            dtype: Of the elements.

        Returns:
            [count].

        Raises:
            CheckpointError, OSError: As `read`.
        """
        # Not a bytearray, which would be filled with zeros first.
        values = torch.empty(count, dtype=dtype)
        self._fill(values.view(torch.uint8).numpy().data, offset)
        return values

    def crc32(self, offset: int, length: int) -> int:
        """CRC-32 of a range of bytes.

        Raises:
            CheckpointError, OSError: As `read`.
        """
        crc = 0
        with memoryview(bytearray(min(_BLOCK, length))) as block:
            for start in range(0, length, _BLOCK):
                part = block[: length - start]
                self._fill(part, offset + start)
                crc = zlib.crc32(part, crc)
        return crc

    def _fill(self, view: memoryview, offset: int) -> None:
        """Read as many bytes as go into a view; with the errors of `read`."""
        done, count = 0, 1
        while done < len(view) and count:
            count = os.preadv(self._file.fileno(), [view[done:]], offset + done)
            done += count
        # Afterwards: what has been read can't change any more.
        size, written = self._state()
        if (size, written) != (self.size, self._written):
            found = f"found {size}" if size != self.size else "found others of the same number"
            problem = (
                f"{self.path.name}: expected the {self.size} bytes with which it was opened, "
                f"{found}: it was changed while it was read. Start again when nothing writes to it"
            )
            raise CheckpointError(self.path.parent, [problem])
        if done < len(view):
            problem = f"{self.path.name}: expected {offset + len(view)} bytes, found {size}"
            raise CheckpointError(self.path.parent, [problem])

    def prefetch(self, offset: int, length: int) -> None:
        """Let the system read a range of bytes while this process does something else.

        Nothing happens where the file ends before the range: reading it will say so.
        """
        if hasattr(os, "posix_fadvise") and offset < self.size:
            os.posix_fadvise(self._file.fileno(), offset, length, os.POSIX_FADV_WILLNEED)


class Window:
    """A range of a file that can be cut like bytes in memory, and is read where it is cut.

    Args:
        file: The file.
        offset: Of its first byte.
        length: How many.
    """

    def __init__(self, file: OpenFile, offset: int, length: int) -> None:
        self._file, self._offset, self._length = file, offset, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, part: slice) -> bytearray:
        start, stop, _ = part.indices(self._length)
        return self._file.read(self._offset + start, max(0, stop - start))


class OpenFiles:
    """The files of a folder, opened when they are first asked for. Threads may share it.

    Args:
        folder: The folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, OpenFile] = {}
        self._lock = threading.Lock()

    def get(self, name: str) -> OpenFile:
        """The file of that name.

        Raises:
            OSError: It can't be read.
        """
        with self._lock:
            if name not in self._files:
                self._files[name] = OpenFile(self.folder / name)
            return self._files[name]
