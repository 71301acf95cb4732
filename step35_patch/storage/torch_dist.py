"""Megatron's torch_dist checkpoints as files: torch.distributed.checkpoint's, read without trust.

Such a checkpoint is a folder with `.metadata`, a pickle, which says where each chunk of each tensor
is, and .distcp files of records, each of them what torch.save writes: a zip archive. Both are read
as inert data (`inert_pickle`, `torch_archive`). Of records what is needed is read, and an archive's
own check sums, which torch.load ignores, are compared if it has them.
"""

from __future__ import annotations

import contextlib
import math
import os
import pickle
import reprlib
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from operator import add, gt, lt, sub
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from step35_patch.config.plain_file import read_plain
from step35_patch.storage.errors import CheckpointError
from step35_patch.storage.inert_pickle import Inert, Named, load_inert
from step35_patch.storage.reading import OpenFiles, Window
from step35_patch.storage.staging import SummedFile
from step35_patch.storage.torch_archive import Archive, storage_name

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"
METADATA, COMMON, FORMAT = ".metadata", "common.pt", "metadata.json"
# Of a checkpoint with common.pt, which all versions of Megatron-Core read.
FORMAT_CONTENT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}

# What argparse makes of a command line.
_NAMESPACE = Named("argparse", "Namespace")
# Records that are opened at a time, and the bytes at each end of one that opening it looks at.
_AT_ONCE, _END = 512, 4096
# Bytes of a tracker; digits in it: more are too many for Python, and for a folder's name.
_LARGEST_TRACKER, _MOST_DIGITS = 4096, 18


@dataclass(frozen=True, slots=True)
class _Place:
    """A record in a file."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class StoredChunk:
    """A box of a stored tensor, and its record.

    Attributes:
        offsets: Where the box begins, along each dimension.
        sizes: Of the box.
        place: Of its record.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    place: _Place


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a checkpoint, in chunks.

    Attributes:
        key: Its name there.
        shape: Of the whole tensor.
        dtype: Of its elements.
        chunks: Which together make it up.
    """

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[StoredChunk, ...]


@dataclass(frozen=True, slots=True)
class _Payload:
    """A tensor's bytes within a file, and their CRC-32; None if it was not written."""

    file: str
    offset: int
    length: int
    crc: int | None


class TorchDistFolder:
    """The tensors of a torch_dist checkpoint.

    Args:
        path: The folder of an iteration, or one with latest_checkpointed_iteration.txt.

    Attributes:
        path: The folder of the iteration.
        tensors: By key; nothing of them has been read.

    Raises:
        CheckpointError: It is not such a folder, or its metadata is damaged or leaves the folder.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = _iteration_folder(Path(path))
        self._bytes: dict[str, _Place] = {}
        self.tensors = self._read_metadata()
        self._files = OpenFiles(self.path)
        self._payloads: dict[_Place, _Payload] = {}
        self._boxes: dict[tuple[str, tuple[int, ...], tuple[int, ...]], StoredChunk] = {}
        self._checked: set[_Place] = set()
        self._lock = threading.Lock()

    def _read_metadata(self) -> dict[str, StoredTensor]:
        file = self.path / METADATA
        try:
            metadata = load_inert(read_plain(file))
            places = {
                _index(index): _place(index.fqn, info)
                for index, info in metadata.storage_data.items()
            }
            tensors = {}
            for key, entry in metadata.state_dict_metadata.items():
                if not isinstance(key, str):
                    raise TypeError(f"expected a key, found {reprlib.repr(key)}")
                if not hasattr(entry, "chunks"):
                    self._bytes[key] = places[key, None]
                    continue
                dimensions = len(entry.size)
                chunks = []
                for chunk in entry.chunks:
                    offsets = _numbers(key, chunk.offsets, dimensions)
                    sizes = _numbers(key, chunk.sizes, dimensions)
                    chunks.append(StoredChunk(offsets, sizes, places[key, offsets]))
                dtype = entry.properties.state[0]  # TensorProperties pickles itself as a tuple
                if not isinstance(dtype, torch.dtype):
                    raise TypeError(f"{key}: expected a dtype, found {reprlib.repr(dtype)}")
                tensors[key] = StoredTensor(
                    key, _numbers(key, entry.size, dimensions), dtype, tuple(chunks)
                )
        except FileNotFoundError:
            raise CheckpointError(self.path, [f"{METADATA}: missing"]) from None
        except Exception as error:  # it can describe anything
            problem = f"{METADATA}: not readable as a torch_dist checkpoint's: {error!r}"
            raise CheckpointError(self.path, [problem]) from error
        named = {place.file for place in places.values()}
        if outside := sorted(name for name in named if Path(name).name != name):
            problems = [f"{METADATA}: {name!r} leaves the folder" for name in outside]
            raise CheckpointError(self.path, problems)
        if problems := _overlapping(tensors.values()):
            raise CheckpointError(self.path, problems)
        return tensors

    def common_args(self) -> Inert | None:
        """The arguments of the run that wrote it, as attributes; None if it has none.

        Raises:
            CheckpointError: The file or record that has them is damaged.
        """
        try:
            if (file := self.path / COMMON).exists():
                state = Archive(memoryview(read_plain(file))).object()
            elif (place := self._bytes.get("common_state/shard_0_1")) is not None:
                record = Window(self._files.get(place.file), place.offset, place.length)
                state = Archive(record).object()[0]
            else:
                return None
            if not isinstance(state, dict):
                raise TypeError(f"expected a dictionary, found {type(state).__name__}")
        except Exception as error:  # it can be anything
            problem = f"the common state is not readable: {error!r}"
            raise CheckpointError(self.path, [problem]) from error
        args = state.get("args")
        return args if isinstance(args, Inert) and args.made_by == _NAMESPACE else None

    @property
    def has_sums(self) -> bool:
        """Whether all opened tensors have check sums."""
        return all(payload.crc is not None for payload in self._payloads.values())

    def files(self) -> list[Path]:
        """All files that its tensors are in, and the metadata."""
        names = {chunk.place.file for tensor in self.tensors.values() for chunk in tensor.chunks}
        return [self.path / METADATA, *(self.path / name for name in sorted(names))]

    def open(self, keys: Iterable[str]) -> list[str]:
        """Find the tensors' bytes in their records, without reading them.

        Args:
            keys: Of tensors that are there.

        Returns:
            What is wrong, with file and key.
        """
        problems: dict[str, None] = {}
        chunks: list[tuple[StoredTensor, StoredChunk]] = []
        for key in keys:
            tensor = self.tensors[key]
            if not _make_up(tensor):
                problems[f"{key}: its chunks do not make up its shape {tensor.shape}"] = None
            chunks += [(tensor, chunk) for chunk in tensor.chunks]
        for start in range(0, len(chunks), _AT_ONCE):
            some = chunks[start : start + _AT_ONCE]
            for _, chunk in some:
                self._prefetch(chunk.place)
            for tensor, chunk in some:
                try:
                    self._payloads[chunk.place] = self._locate(tensor, chunk)
                    self._boxes[tensor.key, chunk.offsets, chunk.sizes] = chunk
                except (OSError, ValueError) as error:
                    problems[f"{tensor.key}: in {chunk.place.file}: {error}"] = None
        return list(problems)

    def _prefetch(self, place: _Place) -> None:
        """Have a record's two ends read, which say what is in it: many small reads at a time."""
        with contextlib.suppress(OSError):  # which opening it will meet again
            file = self._files.get(place.file)
            file.prefetch(place.offset, _END)
            file.prefetch(max(place.offset, place.offset + place.length - _END), _END)

    def _locate(self, tensor: StoredTensor, chunk: StoredChunk) -> _Payload:
        place = chunk.place
        file = self._files.get(place.file)
        if place.offset + place.length > file.size:
            raise ValueError(
                f"expected at least {place.offset + place.length} bytes, found {file.size}: "
                "the file is truncated"
            )
        try:
            archive = Archive(Window(file, place.offset, place.length))
            name = storage_name(archive.object(), tensor.dtype, chunk.sizes)
            member, start = archive.find(f"data/{name}")
        except ValueError:
            raise
        except Exception as error:  # it can be anything
            raise ValueError(f"damaged record: {error!r}") from error
        size = math.prod(chunk.sizes) * tensor.dtype.itemsize
        if member.file_size != size or start + size > place.length:
            raise ValueError(f"damaged record: expected {size} bytes, found {member.file_size}")
        crc = member.CRC if archive.has_sums else None
        return _Payload(place.file, place.offset + start, size, crc)

    def read(self, key: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Tensor:
        """A box of a tensor. Of a chunk, only the rows that it reaches are read.

        Args:
            key: Of a tensor that has been opened.
            offsets: Where the box begins, along each dimension.
            sizes: Of the box.

        Returns:
            The elements, of shape `sizes` and the tensor's dtype; not to be written to.

        Raises:
            CheckpointError: A record's bytes do not have the check sum written with them, or its
                file has changed since it was opened.
        """
        tensor = self.tensors[key]
        # Experts are most chunks of a checkpoint and are read by the chunk: no search for them.
        if (exact := self._boxes.get((key, offsets, sizes))) is not None:
            return self._elements(key, exact, 0, math.prod(sizes), tensor.dtype).view(sizes)
        ends = _ends(offsets, sizes)
        result: Tensor | None = None
        for chunk in tensor.chunks:
            low = tuple(map(max, offsets, chunk.offsets))
            high = tuple(map(min, ends, _ends(chunk.offsets, chunk.sizes)))
            if not all(map(lt, low, high)):
                continue
            part = self._rows(tensor, chunk, low[0], high[0])
            part = part[(slice(None), *_slices(low[1:], high[1:], chunk.offsets[1:]))]
            if part.shape == sizes and part.is_contiguous():
                return part
            if result is None:
                result = torch.empty(sizes, dtype=tensor.dtype)
            result[_slices(low, high, offsets)] = part
        if result is None:
            raise ValueError(f"{key}: nothing of it at {offsets}, {sizes}")
        return result

    def _rows(self, tensor: StoredTensor, chunk: StoredChunk, first: int, last: int) -> Tensor:
        """The whole rows of a chunk between two of the tensor's."""
        shape, start = chunk.sizes[1:], first - chunk.offsets[0]
        row = math.prod(shape)
        part = self._elements(tensor.key, chunk, start * row, (last - first) * row, tensor.dtype)
        return part.view(last - first, *shape)

    def _elements(
        self, key: str, chunk: StoredChunk, start: int, count: int, dtype: torch.dtype
    ) -> Tensor:
        """Consecutive elements of a chunk, whose check sum is looked at the first time."""
        payload = self._payloads[chunk.place]
        file = self._files.get(payload.file)
        with self._lock:
            checked = payload.crc is None or chunk.place in self._checked
        if not checked:
            found = file.crc32(payload.offset, payload.length)
            if found != payload.crc:
                problem = (
                    f"{key}: in {payload.file}: check sum {found:08x}, expected {payload.crc:08x}: "
                    "the file was damaged after it had been written"
                )
                raise CheckpointError(self.path, [problem])
            with self._lock:
                self._checked.add(chunk.place)
        return file.tensor(payload.offset + start * dtype.itemsize, count, dtype)


def _make_up(tensor: StoredTensor) -> bool:
    """Whether the chunks of a tensor cover it, without overlap."""
    if sum(math.prod(chunk.sizes) for chunk in tensor.chunks) != math.prod(tensor.shape):
        return False
    boxes = sorted((chunk.offsets, _ends(chunk.offsets, chunk.sizes)) for chunk in tensor.chunks)
    for number, (start, end) in enumerate(boxes):
        if any(map(gt, end, tensor.shape)):
            return False
        for other_start, other_end in boxes[number + 1 :]:
            if other_start[0] >= end[0]:
                break  # nor do those that follow reach back
            if all(map(lt, map(max, start, other_start), map(min, end, other_end))):
                return False
    return True


def _ends(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(map(add, offsets, sizes))


def _slices(
    low: tuple[int, ...], high: tuple[int, ...], origin: tuple[int, ...]
) -> tuple[slice, ...]:
    """The box from `low` to `high`, as seen from `origin`."""
    return tuple(map(slice, map(sub, low, origin), map(sub, high, origin)))


def _index(index: Any) -> tuple[str, tuple[int, ...] | None]:
    """The key of a tensor or object, and where in the tensor a chunk begins."""
    key, offset = index.fqn, getattr(index, "offset", None)
    if not isinstance(key, str):
        raise ValueError(f"expected a key, found {reprlib.repr(key)}")
    return key, None if offset is None else _numbers(key, offset, len(offset))


def _place(key: str, info: Any) -> _Place:
    # Shown cut: written out, what a pickle describes can be larger than any memory.
    if transforms := getattr(info, "transform_descriptors", None):
        raise ValueError(f"{key}: transformed by {reprlib.repr(transforms)}, expected as it is")
    # Half characters and NUL are text, but no file can have such a name.
    if not isinstance(info.relative_path, str) or not info.relative_path.isprintable():
        found = reprlib.repr(info.relative_path)
        raise ValueError(f"{key}: expected a file's name, found {found}")
    return _Place(info.relative_path, *_numbers(key, (info.offset, info.length), 2))


def _numbers(key: str, values: Any, count: int) -> tuple[int, ...]:
    """The values, if they are so many whole numbers."""
    if (
        not isinstance(values, tuple)
        or len(values) != count
        or not all(type(number) is int and number >= 0 for number in values)
    ):
        raise ValueError(f"{key}: expected {count} whole numbers, found {reprlib.repr(values)}")
    return values


def _overlapping(tensors: Iterable[StoredTensor]) -> list[str]:
    """What is wrong with records that reach into others, or serve two chunks."""
    ordered = sorted(
        (
            (chunk.place.file, chunk.place.offset, chunk.place.length, tensor.key)
            for tensor in tensors
            for chunk in tensor.chunks
        ),
    )
    return list(
        dict.fromkeys(
            f"{one}: in {file}: its record overlaps one of {other}"
            for (file, start, length, one), (next_file, next_start, _, other) in pairwise(ordered)
            if file == next_file and start + length > next_start
        )
    )


def _iteration_folder(path: Path) -> Path:
    """The folder of the iteration that a checkpoint's tracker file names, or the path itself."""
    if (path / METADATA).exists():
        return path
    tracker = path / TRACKER
    if not tracker.exists():
        found = "a folder without them" if path.is_dir() else "no folder"
        raise CheckpointError(
            path, [f"expected {TRACKER} or {METADATA} of a torch_dist checkpoint, found {found}"]
        )
    try:
        text = read_plain(tracker, _LARGEST_TRACKER).decode("utf-8", "replace").strip()
    except (OSError, ValueError) as error:
        raise CheckpointError(path, [f"{TRACKER}: not readable: {error}"]) from error
    if text != RELEASE and not (text.isdecimal() and len(text) <= _MOST_DIGITS):
        found = reprlib.repr(text)
        raise CheckpointError(path, [f"{TRACKER}: expected an iteration, found {found}"])
    folder = path / (RELEASE if text == RELEASE else f"iter_{int(text):07d}")
    if not (folder / METADATA).exists():
        raise CheckpointError(
            path,
            [
                f"{TRACKER} names {folder.name}: expected {METADATA} of a torch_dist checkpoint "
                "there, found none; convert other formats with Megatron-LM's --ckpt-convert-format"
            ],
        )
    return folder


# --- Writing ------------------------------------------------------------------------------------


def save_record(tensor: Tensor, file: SummedFile) -> None:
    """Write one chunk's record, as torch.distributed.checkpoint does.

    Args:
        tensor: Contiguous; its storage may be larger, of which torch.save would write all.
        file: What it is appended to.

    Raises:
        OSError: `file` could not be written to.
    """
    size = tensor.numel() * tensor.element_size()
    if tensor.untyped_storage().nbytes() != size:
        tensor = tensor.clone()
    try:
        torch.save(tensor, file)  # type: ignore[arg-type]  # it only writes and flushes
    except RuntimeError as error:
        # torch ends its archive where a write has failed, too, and complains of the archive.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


@dataclass(frozen=True, slots=True)
class WrittenTensor:
    """A tensor for the metadata.

    Attributes:
        key: Its name.
        shape: Of the whole tensor.
        dtype: Of its elements.
        chunks: Each as (offsets, sizes, (file, offset, length)).
    """

    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[tuple[tuple[int, ...], tuple[int, ...], tuple[str, int, int]], ...]


def metadata_bytes(
    tensors: Iterable[WrittenTensor], objects: Iterable[tuple[str, tuple[str, int, int]]]
) -> bytes:
    """The .metadata of a checkpoint.

    Args:
        tensors: All tensors.
        objects: All that has a record of its own and is no tensor: key and (file, offset, length).
    """
    entries: dict[str, Any] = {}
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for tensor in tensors:
        chunks = [
            ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
            for offsets, sizes, _ in tensor.chunks
        ]
        properties = TensorProperties(dtype=tensor.dtype)
        entries[tensor.key] = TensorStorageMetadata(properties, torch.Size(tensor.shape), chunks)
        for chunk, (_, _, place) in zip(chunks, tensor.chunks, strict=True):
            storage[MetadataIndex(tensor.key, chunk.offsets)] = _StorageInfo(*place)
    for key, place in objects:
        entries[key] = BytesStorageMetadata()
        storage[MetadataIndex(key)] = _StorageInfo(*place)
    return pickle.dumps(Metadata(entries, None, storage))
