"""Checkpoints as torch itself reads them."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata


def stored_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors in the folder of one iteration, as torch.distributed.checkpoint reads them."""
    reader = dcp.FileSystemReader(folder)
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(tensors, storage_reader=reader, no_dist=True)
    return tensors
