"""Conversions of a folder in the published layout that is damaged: refused, with file and name."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.conversion_flips import SEED, flip, flip_each
from support.conversion_runs import assert_refused
from support.conversion_world import GATE, tree

from step35_patch.storage.hf_folder import INDEX


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Change the tensors of a safetensors file."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def reindex(folder: Path, change: Callable[[dict[str, str]], Any]) -> None:
    index = json.loads((folder / INDEX).read_text())
    change(index["weight_map"])
    (folder / INDEX).write_text(json.dumps(index))


NORM, HEAD = "model.norm.weight", "lm_head.weight"


def _shard_of(folder: Path, name: str) -> Path:
    return folder / json.loads((folder / INDEX).read_text())["weight_map"][name]


def _truncated_shard(folder):
    file = folder / "b.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    return ["b.safetensors: not readable as safetensors"]


def _empty_shard(folder):
    (folder / "b.safetensors").write_bytes(b"")
    return ["b.safetensors: not readable as safetensors"]


def _truncated_header(folder):
    file = folder / "b.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    return ["b.safetensors: not readable as safetensors"]


def _header_of_an_absurd_length(folder):
    flip(folder / "b.safetensors", 7, 0x40)
    return ["b.safetensors: not readable as safetensors"]


def _folder_for_a_shard(folder):
    (folder / "b.safetensors").unlink()
    (folder / "b.safetensors").mkdir()
    return ["b.safetensors: not readable as safetensors"]


def _missing_shards(folder):
    (folder / "b.safetensors").unlink()
    (folder / "c.safetensors").unlink()
    return ["b.safetensors: not readable", "c.safetensors: not readable"]


def _no_index(folder):
    (folder / INDEX).unlink()
    return [f"expected {INDEX} or model.safetensors, found neither"]


def _half_an_index(folder):
    text = (folder / INDEX).read_text()
    (folder / INDEX).write_text(text[: len(text) // 2])
    return [f"{INDEX}: expected an object with a weight_map"]


def _index_in_no_encoding(folder):
    flip(folder / INDEX, 30, 0x80)
    return [f"{INDEX}: expected an object with a weight_map"]


def _index_of_numbers(folder):
    (folder / INDEX).write_text(json.dumps({"weight_map": {HEAD: 1}}))
    return [INDEX]


def _index_with_a_list(folder):
    (folder / INDEX).write_text(json.dumps({"weight_map": ["a.safetensors"]}))
    return [INDEX]


def _index_with_a_zero_byte(folder):
    reindex(folder, lambda index: index.update({HEAD: "a\0.safetensors"}))
    return [f"{INDEX}: expected names of files, found 'a\\x00.safetensors'"]


def _index_with_half_a_character(folder):
    reindex(folder, lambda index: index.update({HEAD: "\ud800.safetensors"}))
    return [f"{INDEX}: expected names of files, found '\\ud800.safetensors'"]


def _index_that_is_nested_too_deeply(folder):
    (folder / INDEX).write_text('{"weight_map": ' + "[" * 100_000)
    return [f"{INDEX}: expected an object with a weight_map"]


def _folder_for_an_index(folder):
    (folder / INDEX).unlink()
    (folder / INDEX).mkdir()
    return [f"{INDEX}: expected an object with a weight_map"]


def _quantised_by_a_file_that_is_nested_too_deeply(folder):
    rewrite(_shard_of(folder, HEAD), lambda tensors: tensors.update({HEAD: tensors[HEAD].int()}))
    (folder / "quant_config.json").write_text("[" * 100_000)
    return ["found quantised ones: 1 tensors of I32; by which method, no file says"]


def _index_that_leaves(folder):
    shutil.copy(folder / "a.safetensors", folder.parent / "x.safetensors")
    reindex(
        folder,
        lambda index: index.update(
            {HEAD: "../x.safetensors", NORM: str(folder.parent / "x.safetensors")}
        ),
    )
    return [
        f"{INDEX}: '../x.safetensors' leaves the folder",
        f"{INDEX}: '{folder.parent / 'x.safetensors'}' leaves the folder",
    ]


def _index_that_names_the_folder_above(folder):
    reindex(folder, lambda index: index.update({HEAD: ".."}))
    return ["..: not readable as safetensors"]


def _index_nested_too_deeply(folder):
    (folder / INDEX).write_text('{"weight_map": ' + "[" * 100_000)
    return [f"{INDEX}: expected an object with a weight_map"]


def _index_without_an_end(folder):
    (folder / INDEX).unlink()
    (folder / INDEX).symlink_to("/dev/zero")
    return [f"{INDEX}: expected an object with a weight_map", "no regular file"]


def _index_that_is_too_large(folder):
    os.truncate(folder / INDEX, 2**26 + 1)
    return [f"{INDEX}: expected an object with a weight_map", "expected at most 67108864 bytes"]


def _fifo_for_a_shard(folder):
    (folder / "b.safetensors").unlink()
    os.mkfifo(folder / "b.safetensors")
    return ["b.safetensors: not readable as safetensors", "no regular file, but a FIFO"]


def _links_that_go_round(folder):
    for name, other in (("b", "c"), ("c", "b")):
        (folder / f"{name}.safetensors").unlink()
        (folder / f"{name}.safetensors").symlink_to(f"{other}.safetensors")
    return ["b.safetensors: not readable", "c.safetensors: not readable"]


def _shape_beyond_any_memory(folder):
    """Of no bytes, by the header's own account; or of as many as there are in 64 bits."""
    for file, shape, end in (("a", [2**62, 4], 0), ("b", [2**32, 2**31], 2**63)):
        described = {NORM: {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}}
        header = json.dumps(described).encode()
        content = len(header).to_bytes(8, "little") + header
        (folder / f"{file}.safetensors").write_bytes(content)
    return ["a.safetensors: not readable as safetensors", "b.safetensors: not readable"]


def _stored_twice(folder):
    value = load_file(_shard_of(folder, HEAD))[HEAD]
    first, second = sorted({"a.safetensors", "b.safetensors"})
    for name in (first, second):
        rewrite(folder / name, lambda tensors: tensors.update({HEAD: value}))
    return [f"{HEAD}: stored twice, in {first} and {second}"]


def _not_where_the_index_says(folder):
    where = _shard_of(folder, HEAD).name
    reindex(folder, lambda index: index.update({HEAD: "abc".replace(where[0], "")[0] + where[1:]}))
    return [f"{HEAD}: in {where}, where the index has"]


def _all_at_once(folder):
    """Each kind of wrong tensor, in one go."""
    file = _shard_of(folder, GATE)
    others = [name for name in load_file(file) if name not in (GATE, NORM, HEAD)]
    missing, double, bias = others[0], others[1], "model.layers.3.moe.router_bias"

    def spoil(tensors):
        del tensors[missing]
        tensors[GATE] = tensors[GATE][:-1].contiguous()
        tensors[double] = tensors[double].double()
        tensors["model.layers.8.enorm.weight"] = torch.zeros(32)

    rewrite(file, spoil)
    reindex(folder, lambda index: index.update({"model.layers.8.enorm.weight": file.name}))
    rewrite(_shard_of(folder, bias), lambda tensors: tensors.update({bias: tensors[bias].half()}))
    return [
        "5 problem(s)",
        f"{missing}: missing",
        f"{GATE}: shape (5, 32) in {file.name}, expected (6, 32)",
        f"{double}: dtype F64 in {file.name}, expected F32",
        f"model.layers.8.enorm.weight: unexpected, in {file.name}",
        f"{bias}: dtype F16 in {_shard_of(folder, bias).name}, expected F32",
    ]


@pytest.mark.parametrize(
    "harm",
    [
        _truncated_shard,
        _empty_shard,
        _truncated_header,
        _header_of_an_absurd_length,
        _folder_for_a_shard,
        _missing_shards,
        _no_index,
        _half_an_index,
        _index_in_no_encoding,
        _index_of_numbers,
        _index_with_a_list,
        _index_with_a_zero_byte,
        _index_with_half_a_character,
        _index_that_is_nested_too_deeply,
        _folder_for_an_index,
        _quantised_by_a_file_that_is_nested_too_deeply,
        _index_that_leaves,
        _index_that_names_the_folder_above,
        _index_nested_too_deeply,
        _index_without_an_end,
        _index_that_is_too_large,
        _fifo_for_a_shard,
        _links_that_go_round,
        _shape_beyond_any_memory,
        _stored_twice,
        _not_where_the_index_says,
        _all_at_once,
    ],
)
def test_damaged_published_folder(world, tmp_path, harm):
    """Said before anything is written."""
    source = shutil.copytree(world.hf, tmp_path / "source")
    said = harm(source)
    before = tree(tmp_path)
    out = tmp_path / "new" / "out"
    ended = world.directions["to-megatron"].convert(out, source=source)
    assert_refused(ended, str(source), *said)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("room", [2**35, 3 * 2**39])
def test_a_shard_that_can_t_be_mapped(world, tmp_path, room):
    """It takes no disk space, and its header is right. safetensors and torch map it, each once."""
    source = shutil.copytree(world.hf, tmp_path / "source")
    size = 2**40
    entry = {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}
    header = json.dumps({NORM: entry}).encode()
    file = source / "b.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(file, 8 + len(header) + size)
    hook = f"import resource\nresource.setrlimit(resource.RLIMIT_AS, ({room}, {room}))"
    direction = world.directions["to-megatron"]
    ended = direction.convert(tmp_path / "out", source=source, hook=hook)
    assert_refused(ended, "b.safetensors: not readable as safetensors: ")


@pytest.mark.slow
def test_flipped_byte_in_a_safetensors_header(world, tmp_path):
    source = shutil.copytree(world.hf, tmp_path / "source")
    file = source / "b.safetensors"
    length = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    chance = random.Random(SEED)
    flips = [(at, 1) for at in range(8)]
    flips += [(chance.randrange(length), 1 << chance.randrange(8)) for _ in range(100)]
    direction = world.directions["to-megatron"]
    counts = flip_each(direction, source, file, flips, tmp_path / "out")
    assert counts["1"] > 90
