"""What torch.save writes, a zip archive with a pickle in it, read without trust.

The pickle is read by `inert_pickle`: nothing that a file names is ever imported or called.
"""

from __future__ import annotations

import io
import math
import reprlib
import zipfile
import zlib
from collections.abc import Buffer
from typing import Any, Protocol

import torch

from step35_patch.storage.inert_pickle import Inert, Named, load_inert

# torch.save names a tensor's dtype by its storage's class.
_STORAGES = {
    "BFloat16Storage": torch.bfloat16,
    "HalfStorage": torch.float16,
    "FloatStorage": torch.float32,
}


class Data(Protocol):
    """Bytes that can be cut: a memoryview, or a part of a file."""

    def __len__(self) -> int: ...

    def __getitem__(self, part: slice, /) -> Buffer: ...


class Archive:
    """What torch.save wrote: a zip archive of stored members.

    Args:
        data: All of it.

    Attributes:
        has_sums: Whether it has check sums; torch can be told to write none.

    Raises:
        ValueError: It is not that.
    """

    def __init__(self, data: Data) -> None:
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
        """What was saved, as `load_inert` has it: tensors without their values.

        Raises:
            ValueError: The pickle is damaged.
        """
        member, start = self.find("data.pkl")
        data = bytes(self._data[start : start + member.file_size])
        if self.has_sums and zlib.crc32(data) != member.CRC:
            raise ValueError("damaged record: check sum of data.pkl")
        return load_inert(data)

    def find(self, name: str) -> tuple[zipfile.ZipInfo, int]:
        """A member, and where its bytes begin: behind a header whose size the directory lacks.

        Args:
            name: Its name in the archive's one folder.

        Raises:
            ValueError: There is no such member, or it is compressed or damaged.
        """
        member = self._members.get(self._folder + name)
        if member is None or member.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"damaged record: no stored {name}")
        header = bytes(self._data[member.header_offset : member.header_offset + 30])
        if header[:4] != b"PK\x03\x04":
            raise ValueError(f"damaged record: no header before {name}")
        names = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        return member, member.header_offset + 30 + names


def storage_name(stored: Any, dtype: torch.dtype, sizes: tuple[int, ...]) -> str:
    """The name of a saved tensor's storage, if the tensor is as expected.

    Args:
        stored: What `Archive.object` returned.
        dtype: Of the tensor.
        sizes: Of the tensor, which is contiguous and begins where its storage does.

    Raises:
        ValueError: It is no tensor, or another one.
    """
    try:
        (_, storage, name, _, _), start, shape, stride, *_ = stored.args
        if not isinstance(storage, Named) or not isinstance(name, str):
            raise TypeError
        found = (_STORAGES.get(storage.name, storage.name), tuple(shape), start)
        strides = tuple(stride)
    except (AttributeError, TypeError, ValueError):
        of_class = stored.made_by.name if isinstance(stored, Inert) else type(stored).__name__
        raise ValueError(f"expected a plain tensor, found {of_class}") from None
    if found != (dtype, sizes, 0):
        # What the file says is cut: written out, it can be larger than any memory.
        raise ValueError(
            f"expected a tensor of {dtype}, {sizes}, found {found[0]}, {reprlib.repr(found[1])}"
        )
    contiguous = tuple(math.prod(sizes[axis + 1 :]) for axis in range(len(sizes)))
    if math.prod(sizes) and (
        len(strides) != len(sizes)
        or any(n > 1 and a != b for n, a, b in zip(sizes, strides, contiguous, strict=True))
    ):
        raise ValueError(f"expected a contiguous tensor, found strides {reprlib.repr(strides)}")
    return name


class _View(io.RawIOBase):
    """Bytes that can be cut as a file."""

    def __init__(self, view: Data) -> None:
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

    def readinto(self, buffer: Buffer) -> int:
        with memoryview(buffer) as target:
            part = memoryview(self._view[self._at : self._at + len(target)])
            target[: len(part)] = part
        self._at += len(part)
        return len(part)
