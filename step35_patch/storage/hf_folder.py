"""Folders of safetensors in the published layout: checked reading, writing whole or not at all."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from step35_patch.config.model import Step35Config
from step35_patch.storage.errors import CheckpointError
from step35_patch.storage.fp8 import dequantize_rows
from step35_patch.storage.hf_contents import PUBLISHED, Accepted, Contents, Source
from step35_patch.storage.shards import INDEX, SINGLE, Shards
from step35_patch.tensors.published import TensorInfo

__all__ = ["DTYPES", "INDEX", "SINGLE", "Accepted", "HfFolder", "ShardWriter"]

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class HfFolder:
    """The tensors of a folder with one model.safetensors, or several and an index.

    They have the published names, or those of transformers' modules.

    Args:
        path: The folder.
        config: Of the model whose tensors must be there, all of them and no others. Those of a
            vision model beside it are left alone.
        torch_dtype: Of the tensors; the config's own if None.
        mtp_layers: How many of the config's MTP layers are read, the first ones; all if None. The
            others' tensors may be there or not.
        accept: What may be otherwise than published.

    Attributes:
        path: The folder.
        fp8_block: Rows and columns of a block of FP8 weights that are dequantised; else None.
        notices: What the user should know of the tensors, each in a line.

    Raises:
        CheckpointError: Tensors are missing, unexpected, stored twice or of another shape or dtype;
            files are missing, unreadable or outside the folder. All of it is listed; of quantised
            weights that is said once.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        config: Step35Config,
        *,
        torch_dtype: str | None = None,
        mtp_layers: int | None = None,
        accept: Accepted = PUBLISHED,
    ) -> None:
        self.path = Path(path)
        self._shards = Shards(self.path)
        contents = Contents(
            self._shards, config, torch_dtype=torch_dtype, mtp_layers=mtp_layers, accept=accept
        )
        self._sources, self.notices = contents.sources, contents.notices
        self.fp8_block = contents.fp8_block
        problems = list(self._shards.problems)
        if not problems or self._shards.tensors:
            problems += contents.problems
        if problems:
            raise CheckpointError(self.path, problems)

    def get(self, name: str, *index: int | slice) -> Tensor:
        """The tensor, or the part that `index` selects along its first dimension.

        Args:
            name: Its published name.
            index: Nothing, or one position or range of step 1; only that is read.

        Returns:
            The tensor on the CPU in the published dtype, without the first dimension if a position
            was given; not to be written to.

        Raises:
            ValueError: A range has another step.
        """
        shape = self._sources[name].info.shape
        (rows,) = index or (slice(None),)
        first, last, step = (rows, rows + 1, 1) if isinstance(rows, int) else rows.indices(shape[0])
        if step != 1:
            raise ValueError(f"index: expected a step of 1, found {step}")
        row, count = math.prod(shape[1:]), max(0, last - first)
        part = self.block(name, first * row, count * row)
        return part.view(shape[1:] if isinstance(rows, int) else (count, *shape[1:]))

    def block(self, name: str, start: int, count: int) -> Tensor:
        """Elements of a tensor, row by row.

        Args:
            name: Its published name.
            start: The first element.
            count: How many.

        Returns:
            [count] in the published dtype, not to be written to.
        """
        source = self._sources[name]
        width = source.width
        # Whole rows: dequantising goes by rows.
        first, last = start // width, -(-(start + count) // width)
        parts = [self._rows(source, *rows) for rows in source.stored_rows(first, last)]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        return whole[start - first * width :][:count]

    def _rows(self, source: Source, first: int, last: int) -> Tensor:
        """[elements] of rows of the stored tensor, in the published dtype."""
        width, dtype = source.width, DTYPES[source.info.dtype]
        values = self._shards.read(source.stored, first * width, (last - first) * width)
        if source.scales is None or self.fp8_block is None:
            return values.to(dtype)  # another one for a rounded router bias alone
        scales = source.scales
        return dequantize_rows(
            values.view(-1, width),
            self._shards.read(scales, 0, math.prod(scales.shape)).view(scales.shape),
            first=first,
            rows=source.stored.shape[-2],
            block=self.fp8_block,
            dtype=dtype,
        ).view(-1)

    def files(self) -> list[Path]:
        """The files that its tensors are in, and the index if there is one."""
        return self._shards.files()


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
