"""What torch.save and torch.distributed.checkpoint write, read without trust.

Both write pickles. They are read here by an unpickler that knows a few types of data and makes
everything else an inert object: nothing that a file names is ever imported or called.
"""

from __future__ import annotations

import io
import math
import pickle
import resource
import zipfile
import zlib
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path
from typing import Any

import torch

_DTYPES = ("bfloat16", "float16", "float32", "float64", "uint8", "int8", "int16", "int32", "int64")
# torch.save names a tensor's dtype by its storage's class.
_STORAGES = {
    "BFloat16Storage": torch.bfloat16,
    "HalfStorage": torch.float16,
    "FloatStorage": torch.float32,
}


class _Inert:
    """What a pickle names and this module has no use for; keeps its arguments and its state."""

    args: tuple = ()
    state: Any = None

    def __init__(self, *args: Any, **kwargs: Any):
        self.args = args

    def __setstate__(self, state: Any) -> None:
        self.state = state
        if isinstance(state, dict):
            self.__dict__.update(state)

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, item: Any) -> None:
        """Ignore an item, as of a subclass of list."""

    def extend(self, items: Any) -> None:
        """Ignore items."""


class _InertUnpickler(pickle.Unpickler):
    """Makes plain data and _Inert objects. A tensor's storage comes as the tuple that names it."""

    _KNOWN = {
        ("torch", "Size"): tuple,
        ("collections", "OrderedDict"): OrderedDict,
        ("argparse", "Namespace"): Namespace,
    }

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _DTYPES:
            return getattr(torch, name)
        known = self._KNOWN.get((module, name))
        return known or type(name, (_Inert,), {"module": module})

    def persistent_load(self, pid: Any) -> Any:
        return pid


def load_inert(data: bytes) -> Any:
    """Unpickle; damaged data that asks for absurd amounts of memory gets none.

    Raises:
        Exception: any, if the data is damaged.
    """
    pages = int(Path("/proc/self/statm").read_text("ascii").split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + 2**28 + 64 * len(data)
    if soft != resource.RLIM_INFINITY:
        limit = min(limit, soft)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        return _InertUnpickler(io.BytesIO(data)).load()
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


class Archive:
    """What torch.save wrote: a zip archive of stored members, in memory.

    Args:
        data: all of it.

    Attributes:
        has_sums: whether it has check sums; torch can be told to write none.

    Raises:
        ValueError: it is not that.
    """

    def __init__(self, data: memoryview):
        self._data = data
        try:
            self._members = {m.filename: m for m in zipfile.ZipFile(_View(data)).infolist()}
        except (zipfile.BadZipFile, OSError, NotImplementedError) as error:
            raise ValueError(f"damaged record: {error}") from error
        pickles = [name for name in self._members if name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError("damaged record: not an archive of torch.save")
        self._folder = pickles[0].removesuffix("data.pkl")
        self.has_sums = any(member.CRC for member in self._members.values())

    def object(self) -> Any:
        """What was saved, of inert classes; tensors without their values."""
        member, start = self.find("data.pkl")
        data = bytes(self._data[start : start + member.file_size])
        if self.has_sums and zlib.crc32(data) != member.CRC:
            raise ValueError("damaged record: check sum of data.pkl")
        return load_inert(data)

    def find(self, name: str) -> tuple[zipfile.ZipInfo, int]:
        """A member, and where its bytes begin: behind a header whose size the directory lacks."""
        member = self._members.get(self._folder + name)
        if member is None or member.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"damaged record: no stored {name}")
        header = bytes(self._data[member.header_offset : member.header_offset + 30])
        if header[:4] != b"PK\x03\x04":
            raise ValueError(f"damaged record: no header before {name}")
        names = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        return member, member.header_offset + 30 + names


def storage_name(stored: Any, dtype: torch.dtype, sizes: tuple[int, ...]) -> str:
    """The name of a saved tensor's storage; the tensor must be as expected."""
    try:
        (_, storage, name, _, _), start, shape, stride, *_ = stored.args
        found = (_STORAGES.get(storage.__name__, storage.__name__), tuple(shape), start)
    except (AttributeError, TypeError, ValueError):
        raise ValueError(f"expected a plain tensor, found {type(stored).__name__}") from None
    if found != (dtype, tuple(sizes), 0):
        raise ValueError(
            f"expected a tensor of {dtype}, {tuple(sizes)}, found {found[0]}, {found[1]}"
        )
    contiguous = tuple(math.prod(sizes[axis + 1 :]) for axis in range(len(sizes)))
    if math.prod(sizes) and any(n > 1 and a != b for n, a, b in zip(sizes, stride, contiguous)):
        raise ValueError(f"expected a contiguous tensor, found strides {tuple(stride)}")
    return name


class _View(io.RawIOBase):
    """Bytes in memory as a file, without a copy."""

    def __init__(self, view: memoryview):
        self._view, self._at = view, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self._view)}[whence]
        if start + offset < 0:
            raise OSError("seek before the beginning")
        self._at = start + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        part = self._view[self._at : self._at + len(buffer)]
        buffer[: len(part)] = part
        self._at += len(part)
        return len(part)
