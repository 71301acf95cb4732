"""Opening files that are read as data: regular ones, and no more of them than is expected.

At a FIFO a reader would wait for ever, and of a device read for ever. Standard library only.
"""

from __future__ import annotations

import errno
import os
import stat
from typing import BinaryIO


def open_plain(path: str | os.PathLike[str]) -> BinaryIO:
    """A regular file, opened for reading its bytes; links are followed.

    Raises:
        OSError: It can't be opened, or is something else.
        ValueError: The path has a null character.
    """
    # Without waiting for somebody who writes into a FIFO.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(descriptor).st_mode
    if stat.S_ISREG(mode):
        return open(descriptor, "rb")
    os.close(descriptor)
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), os.fspath(path))
    raise OSError(
        errno.EINVAL, "no regular file, but a FIFO, a device or a socket", os.fspath(path)
    )


def read_plain(path: str | os.PathLike[str], most_bytes: int | None = None) -> bytes:
    """What is in a regular file.

    Args:
        path: The file; links are followed.
        most_bytes: How large it may be; None where its own size is bound enough.

    Raises:
        OSError: It can't be read, or is something else.
        ValueError: It is larger, or the path has a null character.
    """
    with open_plain(path) as file:
        content = file.read(-1 if most_bytes is None else most_bytes + 1)
    if most_bytes is not None and len(content) > most_bytes:
        raise ValueError(f"expected at most {most_bytes} bytes, found more")
    return content
