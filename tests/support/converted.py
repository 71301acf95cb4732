"""Weights to convert, and a look at what became of them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from step35_patch.convert import Options
from support.figures import record
from support.reference import random_weights

GATE_LAYOUTS = ("headwise", "expanded")
SMALL_FILES = Options(file_bytes=20_000)


def weights_of(config: dict, seed: int = 5) -> dict[str, torch.Tensor]:
    """Random weights in the dtypes of the published layout."""
    dtype = getattr(torch, config["torch_dtype"])
    return {
        name: value if name.endswith("router_bias") else value.to(dtype)
        for name, value in random_weights(config, seed).items()
    }


def read(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert set(found) == set(wanted)
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
    record("identical tensors", len(wanted))


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def save_dcp(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    return folder
