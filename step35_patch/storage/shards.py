"""The safetensors files of a folder: one model.safetensors, or several and an index."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from step35_patch.config.plain_file import open_plain, read_plain
from step35_patch.storage.reading import OpenFiles

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# The published one takes a few hundred kilobytes.
_LARGEST_INDEX = 64 * 2**20

# safetensors' names of the dtypes that are read.
DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F8_E4M3": torch.float8_e4m3fn,
}


@dataclass(frozen=True, slots=True)
class Stored:
    """A tensor as it stands in a file.

    Attributes:
        name: Its name there.
        file: The file's name.
        start: Its first byte in the file.
        dtype: safetensors' name of its dtype.
        shape: Its sizes.
    """

    name: str
    file: str
    start: int
    dtype: str
    shape: tuple[int, ...]


class Shards:
    """The tensors of a folder, as they are stored.

    Args:
        path: The folder.

    Attributes:
        path: The folder.
        tensors: What is stored, by name.
        problems: What is wrong with the files and the index, each in a line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, Stored] = {}
        self.problems: list[str] = []
        self._index: dict[str, str] | None = None
        self._files = OpenFiles(path)
        self._opened: list[str] = []
        for name in self._names():
            self._open(name)

    def _names(self) -> list[str]:
        problems = self.problems
        if not self.path.is_dir():
            problems.append(
                "expected a folder, found " + ("a file" if self.path.exists() else "nothing")
            )
            return []
        if not (self.path / INDEX).exists():
            if (self.path / SINGLE).exists():
                return [SINGLE]
            problems.append(f"expected {INDEX} or {SINGLE}, found neither")
            return []
        try:
            weight_map = json.loads(read_plain(self.path / INDEX, _LARGEST_INDEX))["weight_map"]
            names = sorted(set(weight_map.values()))
            if not all(isinstance(name, str) for name in names):
                raise TypeError("names of files that are no text")
        # RecursionError is of an object that is nested too deeply.
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            problems.append(f"{INDEX}: expected an object with a weight_map, found: {error!r}")
            return []
        self._index = weight_map
        outside = [name for name in names if Path(name).name != name]
        problems += [f"{INDEX}: {name!r} leaves the folder" for name in outside]
        no_text = [name for name in names if not name.isprintable()]
        problems += [f"{INDEX}: expected names of files, found {name!r}" for name in no_text]
        return [name for name in names if name not in (*outside, *no_text)]

    def _open(self, name: str) -> None:
        try:
            open_plain(self.path / name).close()  # which safe_open might wait for
            # It checks that the header describes the file, to the last byte.
            with safe_open(self.path / name, framework="pt") as file:
                keys = list(file.keys())
        # The last two are of files that can't be mapped: safetensors maps them, and so does torch.
        except (OSError, ValueError, SafetensorError, MemoryError, RuntimeError) as error:
            self.problems.append(f"{name}: not readable as safetensors: {error}")
            return
        self._opened.append(name)
        opened = self._files.get(name)
        start = 8 + int.from_bytes(opened.read(0, 8), "little")
        described = json.loads(opened.read(8, start - 8))
        for key in keys:
            entry = described[key]
            if key in self.tensors:
                first = self.tensors[key].file
                self.problems.append(f"{key}: stored twice, in {first} and {name}")
            elif self._index is not None and self._index.get(key) != name:
                expected = self._index.get(key)
                self.problems.append(f"{key}: in {name}, where the index has {expected}")
            self.tensors[key] = Stored(
                key,
                name,
                start + entry["data_offsets"][0],
                entry["dtype"],
                tuple(entry["shape"]),
            )

    def read(self, stored: Stored, start: int, count: int) -> Tensor:
        """Elements of a tensor, row by row.

        Args:
            stored: One of `tensors`, of a dtype in `DTYPES`.
            start: The first element.
            count: How many.

        Returns:
            [count] in the file's dtype.

        Raises:
            CheckpointError: The file has changed since it was opened.
        """
        dtype = DTYPES[stored.dtype]
        file = self._files.get(stored.file)
        return file.tensor(stored.start + start * dtype.itemsize, count, dtype)

    def files(self) -> list[Path]:
        """The files that the tensors are in, and the index if there is one."""
        names = [*self._opened, *([INDEX] if self._index is not None else [])]
        return [self.path / name for name in sorted(names)]
