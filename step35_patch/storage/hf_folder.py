"""Folders of safetensors in the published layout: checked reading, writing whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from step35_patch.storage.errors import CheckpointError
from step35_patch.storage.mapped import MappedFiles
from step35_patch.tensors.published import TensorInfo

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class HfFolder:
    """The tensors of a folder with one model.safetensors, or several and an index.

    Args:
        path: The folder.
        expected: The tensors that must be there, all of them and no others.

    Attributes:
        path: The folder.

    Raises:
        CheckpointError: Tensors are missing, unexpected, stored twice or of another shape or dtype;
            files are missing, unreadable or outside the folder. All of it is listed.
    """

    def __init__(self, path: str | os.PathLike[str], expected: Iterable[TensorInfo]) -> None:
        self.path = Path(path)
        self._expected = {info.name: info for info in expected}
        problems: list[str] = []
        self._files: dict[str, Any] = {}  # safetensors' objects, which have no types
        self._where: dict[str, str] = {}
        self._index: dict[str, str] | None = None
        self._mapped = MappedFiles(self.path)
        self._starts: dict[str, int] = {}
        for name in self._shards(problems):
            self._open(name, problems)
        if not problems or self._where:
            problems += self._compare()
        if problems:
            raise CheckpointError(self.path, problems)

    def _shards(self, problems: list[str]) -> list[str]:
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
            weight_map = json.loads((self.path / INDEX).read_text("utf-8"))["weight_map"]
            names = sorted(set(weight_map.values()))
            if not all(isinstance(name, str) for name in names):
                raise TypeError("names of files that are no text")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            problems.append(f"{INDEX}: expected an object with a weight_map, found: {error!r}")
            return []
        self._index = weight_map
        outside = [name for name in names if Path(name).name != name]
        problems += [f"{INDEX}: {name!r} leaves the folder" for name in outside]
        return [name for name in names if name not in outside]

    def _open(self, name: str, problems: list[str]) -> None:
        try:
            file = safe_open(self.path / name, framework="pt")
            keys = list(file.keys())
        except (OSError, SafetensorError) as error:
            problems.append(f"{name}: not readable as safetensors: {error}")
            return
        self._files[name] = file
        header = self._mapped.get(name).view(0, 8)
        start = 8 + int.from_bytes(header, "little")
        described = json.loads(bytes(self._mapped.get(name).view(8, start - 8)))
        for key in keys:
            self._starts[key] = start + described[key]["data_offsets"][0]
            if key in self._where:
                problems.append(f"{key}: stored twice, in {self._where[key]} and {name}")
            elif self._index is not None and self._index.get(key) != name:
                problems.append(f"{key}: in {name}, where the index has {self._index.get(key)}")
            self._where[key] = name

    def _compare(self) -> list[str]:
        problems = [f"{name}: missing" for name in self._expected if name not in self._where]
        for name, file in self._where.items():
            if (info := self._expected.get(name)) is None:
                problems.append(f"{name}: unexpected, in {file}")
                continue
            stored = self._files[file].get_slice(name)
            if tuple(stored.get_shape()) != tuple(info.shape):
                problems.append(
                    f"{name}: shape {tuple(stored.get_shape())} in {file}, expected {info.shape}"
                )
            if stored.get_dtype() != info.dtype:
                problems.append(
                    f"{name}: dtype {stored.get_dtype()} in {file}, expected {info.dtype}"
                    " (the config's torch_dtype; router_bias is F32)"
                )
        return problems

    def get(self, name: str, *index: int | slice) -> Tensor:
        """The tensor, or the part that `index` selects, which alone is read.

        Args:
            name: Its published name.
            index: For each of its first dimensions a position or a range.

        Returns:
            The tensor on the CPU, in the file's dtype.
        """
        file = self._files[self._where[name]]
        tensor: Tensor = file.get_slice(name)[index] if index else file.get_tensor(name)
        return tensor

    def block(self, name: str, start: int, count: int) -> Tensor:
        """Elements of a tensor, row by row, over the mapped file.

        Args:
            name: Its published name.
            start: The first element.
            count: How many.

        Returns:
            [count] in the file's dtype, not to be written to.
        """
        file = self._mapped.get(self._where[name])
        dtype = DTYPES[self._expected[name].dtype]
        self._mapped.used(count * dtype.itemsize)
        return file.tensor(self._starts[name] + start * dtype.itemsize, count, dtype)

    def files(self) -> list[Path]:
        """The files that its tensors are in, and the index if there is one."""
        names = [*self._files, *([INDEX] if self._index is not None else [])]
        return [self.path / name for name in sorted(names)]


def dtype_name(dtype: torch.dtype) -> str:
    """A torch dtype's name in safetensors.

    Raises:
        ValueError: Weights do not come in this dtype.
    """
    if dtype not in _NAMES:
        raise ValueError(f"dtype: expected one of {', '.join(map(str, _NAMES))}, found {dtype}")
    return _NAMES[dtype]


class ShardWriter:
    """Collects tensors and writes them to numbered files.

    Args:
        folder: Where the files are made.
        prefix: What their names begin with.
        max_bytes: About the size of a file; a tensor that is larger has one of its own.

    Attributes:
        weight_map: The file of each tensor that has been written.
        bytes: The size of these tensors together.
    """

    def __init__(self, folder: Path, prefix: str, max_bytes: int) -> None:
        self.folder, self.prefix, self.max_bytes = folder, prefix, max_bytes
        self.weight_map: dict[str, str] = {}
        self.bytes = 0
        self._pending: dict[str, Tensor] = {}
        self._pending_bytes = 0
        self._files = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a copy of a tensor, on the CPU and contiguous; write a file if that is full.

        Raises:
            ValueError: There is one of this name already.
        """
        if name in self.weight_map or name in self._pending:
            raise ValueError(f"{name}: written twice")
        tensor = tensor.detach().to("cpu").contiguous().clone()
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self.max_bytes:
            self.flush()
        self._pending[name] = tensor
        self._pending_bytes += size

    def flush(self) -> None:
        """Write what is pending."""
        if not self._pending:
            return
        self._files += 1
        file = f"{self.prefix}-{self._files:05d}.safetensors"
        save_file(self._pending, self.folder / file, metadata={"format": "pt"})
        self.weight_map |= dict.fromkeys(self._pending, file)
        self.bytes += self._pending_bytes
        self._pending, self._pending_bytes = {}, 0


def header(tensors: Iterable[TensorInfo]) -> bytes:
    """What a safetensors file has before the tensors' bytes, which follow in this order.

    The format: https://huggingface.co/docs/safetensors, "Format".
    """
    described: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for info in tensors:
        end = start + info.num_bytes
        described[info.name] = {
            "dtype": info.dtype,
            "shape": info.shape,
            "data_offsets": (start, end),
        }
        start = end
    text = json.dumps(described).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def staging_folder(target: Path) -> Path:
    """A new folder beside `target`, to be filled and then renamed to it.

    Raises:
        FileExistsError: There is something at `target` already.
    """
    if target.exists():
        raise FileExistsError(f"{target}: exists already; remove it or choose another folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))


def publish(staged: Path, target: Path) -> None:
    """Make a filled staging folder the target, in one rename.

    Raises:
        FileExistsError: There is something at `target` by now.
    """
    if target.exists():
        raise FileExistsError(f"{target}: appeared while it was being written")
    staged.chmod(0o755)
    staged.rename(target)


def discard(staged: Path) -> None:
    """Remove a staging folder that was not finished."""
    shutil.rmtree(staged, ignore_errors=True)
