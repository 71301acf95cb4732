"""A tiny model in both layouts, and what a conversion of it in either direction has to make."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from step35_patch.storage.hf_folder import INDEX
from support.conversion_runs import Ended, Server
from support.reference import random_weights, tiny_config, write_hf_folder

RELEASE, TRACKER = "release", "latest_checkpointed_iteration.txt"
# Bytes of a file, so that there are about a hundred of them, or a few.
MANY, FEW, ONE = "4KB", "250KB", "5GB"
# The gate of a sliding layer.
GATE = "model.layers.1.self_attn.g_proj.weight"


def tree(folder: Path) -> dict[str, Any] | None:
    """Names, sizes and SHA-256 of all in a folder; None if there is nothing at the path."""
    if not os.path.lexists(folder):
        return None
    return {str(path.relative_to(folder)): _described(path) for path in folder.rglob("*")}


def _described(path: Path) -> Any:
    if path.is_symlink():
        return os.readlink(path)
    if path.is_dir():
        return "folder"
    if not path.is_file():
        return "no regular file"
    return path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()


def staged(out: Path) -> Path:
    return out.parent / f".{out.name}.converting"


def finished_files(out: Path) -> list[Path]:
    """Files of weights that a run that did not end has finished."""
    done = staged(out) / "done"
    files = sorted(path for path in done.rglob("*.json"))
    return [staged(out) / "out" / path.relative_to(done).with_suffix("") for path in files]


def write_shards(folder: Path, config: dict[str, Any], weights: dict[str, torch.Tensor]) -> Path:
    """A folder in the published layout with three shards and an index."""
    write_hf_folder(folder, config, weights)
    (folder / "model.safetensors").unlink()
    names = list(weights)
    parts = {f"{letter}.safetensors": names[n::3] for n, letter in enumerate("abc")}
    for file, part in parts.items():
        save_file({name: weights[name] for name in part}, folder / file)
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (folder / "tokenizer.json").write_text('{"version": "1.0"}')
    return folder


@dataclass
class Direction:
    """One direction of conversion with its inputs, and what it makes of them.

    Attributes:
        source: the weights; hf: the folder with the config.
        old: an output of other weights.
        wanted: by size of file, the tree of a run that nothing disturbed.
    """

    name: str
    source: Path
    hf: Path
    old: Path
    server: Server
    wanted: dict[str, dict]

    def argv(self, out: Path, *options: str, size: str = MANY, source: Path | None = None) -> list:
        argv = ["convert", self.name, source or self.source, out, "--max-shard-size", size]
        return [*argv, *(["--hf-dir", self.hf] if self.name == "to-hf" else []), *options]

    def convert(self, out: Path, *options: str, hook: str = "", **more: Any) -> Ended:
        return self.server.run(self.argv(out, *options, **more), hook)

    def learn(self, folder: Path, size: str) -> None:
        ended = self.convert(folder, size=size)
        assert ended.status == 0, ended.text
        self.wanted[size] = tree(folder)

    def assert_whole(self, out: Path, size: str = MANY) -> None:
        """The output is that of a run that nothing disturbed, and nothing else is left."""
        assert tree(out) == self.wanted[size]
        assert tree(staged(out)) is None


@dataclass
class World:
    """The model, its folder in the published layout, and both directions by their names."""

    config: dict[str, Any]
    weights: dict[str, torch.Tensor]
    hf: Path
    directions: dict[str, Direction]


def make_world(folder: Path, server: Server) -> World:
    config = tiny_config()
    weights = random_weights(config, 51)
    hf = write_shards(folder / "hf", config, weights)
    other = write_shards(folder / "other", config, random_weights(config, 52))
    checkpoint, old = folder / "checkpoint", folder / "old checkpoint"
    for source, target in ((hf, checkpoint), (other, old)):
        argv = ["convert", "to-megatron", source, target, "--max-shard-size", FEW]
        assert server.run(argv).status == 0
    directions = {
        "to-megatron": Direction("to-megatron", hf, hf, old, server, {}),
        "to-hf": Direction("to-hf", checkpoint, hf, other, server, {}),
    }
    for direction in directions.values():
        for size in (MANY, FEW, ONE):
            direction.learn(folder / f"{direction.name} {size}", size)
    return World(config=config, weights=weights, hf=hf, directions=directions)
