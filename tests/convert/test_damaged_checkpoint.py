"""Conversions of a Megatron-Core checkpoint that is damaged or forged.

What is wrong is said with file and name, and nothing that a pickle names is called.
"""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import random
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.conversion_flips import SEED, flip, flip_each
from support.conversion_runs import assert_refused
from support.conversion_world import RELEASE, TRACKER, tree


@pytest.mark.slow
def test_flipped_byte_in_the_metadata(world, tmp_path):
    """Any byte: an error that names the file, or the very same weights."""
    source = shutil.copytree(world.directions["to-hf"].source, tmp_path / "source")
    file = source / RELEASE / ".metadata"
    chance, size = random.Random(SEED), file.stat().st_size
    flips = [(chance.randrange(size), 1 << chance.randrange(8)) for _ in range(120)]
    # Numbers: places, offsets and sizes of chunks. Most of the bytes are names.
    numbers = [
        at + 1 + byte
        for opcode, _, at in pickletools.genops(file.read_bytes())
        for byte in range({"BININT1": 1, "BININT2": 2, "BININT": 3}.get(opcode.name, 0))
    ]
    flips += [(at, 1 << chance.randrange(8)) for at in chance.sample(numbers, 120)]
    direction = world.directions["to-hf"]
    counts = flip_each(direction, source, file, flips, tmp_path / "out")
    assert counts["1"] > 150


def _change_metadata(folder: Path, change: Callable[[Any], str]) -> list[str]:
    """Change what .metadata says with torch's own classes; what is to be said."""
    file = folder / RELEASE / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    said = change(metadata)
    file.write_bytes(pickle.dumps(metadata))
    return [said]


FC1 = "decoder.layers.0.mlp.linear_fc1.weight"
EXPERTS = "decoder.layers.2.mlp.experts.experts.linear_fc1.weight"


def _move_chunk(metadata, key: str, number: int, offsets: tuple[int, ...]) -> None:
    """Say that a chunk stands elsewhere in its tensor."""
    chunk = metadata.state_dict_metadata[key].chunks[number]
    index = next(
        i for i in metadata.storage_data if i.fqn == key and tuple(i.offset) == tuple(chunk.offsets)
    )
    place = metadata.storage_data.pop(index)
    chunk.offsets = torch.Size(offsets)
    metadata.storage_data[type(index)(key, chunk.offsets)] = place


def _places(metadata, key: str) -> list:
    return [place for index, place in metadata.storage_data.items() if index.fqn == key]


def _overlapping_chunks(metadata):
    _move_chunk(metadata, FC1, 1, (40, 0))
    return FC1


def _chunk_outside(metadata):
    _move_chunk(metadata, EXPERTS, 3, (9, 24, 0))
    return EXPERTS


def _chunk_before_the_first(metadata):
    _move_chunk(metadata, EXPERTS, 3, (-1, 24, 0))
    return EXPERTS


def _chunks_of_one_place(metadata):
    first, second = _places(metadata, EXPERTS)[2:4]
    second.relative_path, second.offset = first.relative_path, first.offset
    return EXPERTS


def _record_of_another_tensor(metadata):
    other = _places(metadata, EXPERTS.replace("layers.2", "layers.3"))[0]
    place = _places(metadata, EXPERTS)[0]
    place.relative_path, place.offset = other.relative_path, other.offset
    return EXPERTS


def _record_that_ends_with_the_next(metadata):
    first, second = _places(metadata, EXPERTS)[:2]
    assert first.relative_path == second.relative_path
    first.length = second.offset + second.length - first.offset
    return EXPERTS


def _offset_that_is_no_number(metadata):
    _places(metadata, EXPERTS)[0].offset = "0"
    return ".metadata"


def _negative_offset(metadata):
    _places(metadata, EXPERTS)[0].offset = -100
    return EXPERTS


def _path_that_is_no_text(metadata):
    _places(metadata, EXPERTS)[0].relative_path = 5
    return ".metadata"


def _path_with_a_zero_byte(metadata):
    _places(metadata, EXPERTS)[0].relative_path = "a\0b"
    return ".metadata"


def _path_with_half_a_character(metadata):
    _places(metadata, EXPERTS)[0].relative_path = "\ud800"
    return ".metadata"


def _dtype_that_takes_forever_to_write_down(metadata):
    endless = ("x",)
    for _ in range(50):
        endless = (endless, endless)
    metadata.state_dict_metadata[EXPERTS].properties.dtype = endless
    return f"{EXPERTS}: expected a dtype, found"


def _offset_that_no_file_has(metadata):
    _places(metadata, EXPERTS)[0].offset = 2**70
    return "the file is truncated"


def _sizes_that_are_no_numbers(metadata):
    metadata.state_dict_metadata[EXPERTS].chunks[0].sizes = ("1", "2", "3")
    return ".metadata"


def _place_that_leaves_the_folder(metadata):
    _places(metadata, EXPERTS)[0].relative_path = "../__0_1.distcp"
    return ".metadata: '../__0_1.distcp' leaves the folder"


def _key_lost_and_key_added(metadata):
    """A wrong name, a wrong shape and a wrong dtype."""
    entries = metadata.state_dict_metadata
    entries["decoder.layers.9.enorm.weight"] = entries.pop("decoder.final_layernorm.weight")
    norm = _places(metadata, "decoder.final_layernorm.weight")[0]
    index = next(i for i in metadata.storage_data if i.fqn == "decoder.final_layernorm.weight")
    del metadata.storage_data[index]
    key = "decoder.layers.9.enorm.weight"
    metadata.storage_data[type(index)(key, index.offset)] = norm
    return f"{key}: unexpected"


@pytest.mark.parametrize(
    "change",
    [
        _overlapping_chunks,
        _chunk_outside,
        _chunk_before_the_first,
        _chunks_of_one_place,
        _record_of_another_tensor,
        _record_that_ends_with_the_next,
        _offset_that_is_no_number,
        _negative_offset,
        _offset_that_no_file_has,
        _path_that_is_no_text,
        _path_with_a_zero_byte,
        _path_with_half_a_character,
        _dtype_that_takes_forever_to_write_down,
        _sizes_that_are_no_numbers,
        _place_that_leaves_the_folder,
        _key_lost_and_key_added,
    ],
)
def test_metadata_that_tells_a_wrong_story(world, tmp_path, change):
    """Well-formed, so that only its sense can show it; said before anything is written."""
    direction = world.directions["to-hf"]
    source = shutil.copytree(direction.source, tmp_path / "source")
    said = _change_metadata(source, change)
    before = tree(tmp_path)
    ended = direction.convert(tmp_path / "out", source=source)
    assert_refused(ended, str(source), *said)
    assert tree(tmp_path) == before


def test_small_metadata_takes_little_memory(world, tmp_path):
    """A pickle of eleven bytes may ask its reader for gigabytes (and a flipped bit of a sane one:
    an R becomes an r, the opcode that stores an object under a number of four bytes)."""
    direction = world.directions["to-hf"]
    source = shutil.copytree(direction.source, tmp_path / "source")
    (source / RELEASE / ".metadata").write_bytes(
        b"\x80\x04Nr" + (2**27).to_bytes(4, "little") + b"."
    )
    hook = f"""
import resource
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
status = main({[str(word) for word in direction.argv(tmp_path / "out", source=source)]!r})
print(status, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1000, "MB")
"""
    ended = direction.server.run([], hook)
    status, grown = re.search(r"(\d+) (\d+) MB", ended.text).groups()
    assert status == "1" and ".metadata: not readable" in ended.text
    assert int(grown) < 500


def _distcp_of(folder: Path, key: str) -> tuple[Path, int, int]:
    """The file of a tensor's first chunk, the record's offset there and its length."""
    metadata = pickle.loads((folder / RELEASE / ".metadata").read_bytes())
    place = _places(metadata, key)[0]
    return folder / RELEASE / place.relative_path, place.offset, place.length


def _truncated_distcp(folder):
    file, *_ = _distcp_of(folder, EXPERTS)
    file.write_bytes(file.read_bytes()[:-1])
    return [f"in {file.name}: expected at least", "the file is truncated"]


def _empty_distcp(folder):
    file, *_ = _distcp_of(folder, EXPERTS)
    file.write_bytes(b"")
    return [f"{EXPERTS}: in {file.name}: expected at least", "found 0: the file is truncated"]


def _missing_distcp(folder):
    file, *_ = _distcp_of(folder, EXPERTS)
    file.unlink()
    return [f"{EXPERTS}: in {file.name}: ", "No such file"]


def _flipped_record(folder):
    """In the archive's list of its members."""
    file, offset, length = _distcp_of(folder, EXPERTS)
    flip(file, offset + length - 22)
    return [f"{EXPERTS}: in {file.name}: damaged record"]


def _no_metadata(folder):
    (folder / RELEASE / ".metadata").unlink()
    return [f"{TRACKER} names release: expected .metadata"]


def _empty_metadata(folder):
    (folder / RELEASE / ".metadata").write_bytes(b"")
    return [".metadata: not readable"]


def _no_tracker(folder):
    (folder / TRACKER).unlink()
    return [f"expected {TRACKER} or .metadata of a torch_dist checkpoint"]


def _tracker_of_nonsense(folder):
    (folder / TRACKER).write_text("../other")
    return [f"{TRACKER}: expected an iteration, found '../other'"]


def _tracker_that_is_too_large(folder):
    (folder / TRACKER).write_text("1" * 5000)
    return [f"{TRACKER}: not readable: expected at most 4096 bytes, found more"]


def _tracker_of_more_digits_than_a_name_has(folder):
    (folder / TRACKER).write_text("1" * 300)
    return [f"{TRACKER}: expected an iteration, found '111"]


def _tracker_in_no_encoding(folder):
    (folder / TRACKER).write_bytes(b"\xff\xfe")
    return [TRACKER]


def _common_state_that_is_a_list(folder):
    torch.save([1, 2], folder / RELEASE / "common.pt")
    return ["common"]


def _common_state_of_noise(folder):
    (folder / RELEASE / "common.pt").write_bytes(b"noise")
    return ["common"]


def _common_state_of_another_model(folder):
    from argparse import Namespace

    state = {"args": Namespace(step35_fingerprint="0123")}
    torch.save(state, folder / RELEASE / "common.pt")
    return ["config fingerprint: 0123 in the checkpoint", "carries no config"]


def _common_state_of_a_zip_bomb(folder):
    """A hundred kilobytes that would be a hundred megabytes; torch.save compresses nothing."""
    with zipfile.ZipFile(folder / RELEASE / "common.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**8))
    return ["common", "no stored data.pkl"]


def _record_of_a_zip_bomb(folder):
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**8))
    file, *_ = _distcp_of(folder, EXPERTS)
    _exchange_record(folder, bomb.getvalue())
    return [f"{EXPERTS}: in {file.name}: damaged record: no stored data.pkl"]


def _exchange_record(folder, record):
    """Let the metadata name another record for a tensor's first chunk, at the end of its file."""
    file, *_ = _distcp_of(folder, EXPERTS)
    end = file.stat().st_size
    with open(file, "ab") as opened:
        opened.write(record)

    def change(metadata):
        place = _places(metadata, EXPERTS)[0]
        place.offset, place.length = end, len(record)
        return EXPERTS

    _change_metadata(folder, change)


def _common_state_without_an_end(folder):
    (folder / RELEASE / "common.pt").unlink()
    (folder / RELEASE / "common.pt").symlink_to("/dev/zero")
    return ["common", "no regular file"]


def _fifo_for_the_metadata(folder):
    (folder / RELEASE / ".metadata").unlink()
    os.mkfifo(folder / RELEASE / ".metadata")
    return [".metadata: not readable", "no regular file"]


def _fifo_for_a_distcp(folder):
    file, *_ = _distcp_of(folder, EXPERTS)
    file.unlink()
    os.mkfifo(file)
    return [f"in {file.name}: ", "no regular file"]


def _tracker_without_an_end(folder):
    (folder / TRACKER).unlink()
    (folder / TRACKER).symlink_to("/dev/zero")
    return [f"{TRACKER}: not readable", "no regular file"]


@pytest.mark.parametrize(
    "harm",
    [
        _common_state_of_a_zip_bomb,
        _record_of_a_zip_bomb,
        _common_state_without_an_end,
        _fifo_for_the_metadata,
        _fifo_for_a_distcp,
        _tracker_without_an_end,
        _truncated_distcp,
        _empty_distcp,
        _missing_distcp,
        _flipped_record,
        _no_metadata,
        _empty_metadata,
        _no_tracker,
        _tracker_of_nonsense,
        _tracker_that_is_too_large,
        _tracker_of_more_digits_than_a_name_has,
        _tracker_in_no_encoding,
        _common_state_that_is_a_list,
        _common_state_of_noise,
        _common_state_of_another_model,
    ],
)
def test_damaged_megatron_checkpoint(world, tmp_path, harm):
    """Said before anything is written."""
    direction = world.directions["to-hf"]
    source = shutil.copytree(direction.source, tmp_path / "source")
    said = harm(source)
    before = tree(tmp_path)
    ended = direction.convert(tmp_path / "new" / "out", source=source)
    assert_refused(ended, str(source), *said)
    assert tree(tmp_path) == before


@pytest.mark.slow
def test_flipped_byte_in_a_distcp_file(world, tmp_path):
    """Of weights: a check sum that differs, with file and key. Elsewhere the same, or no harm."""
    direction = world.directions["to-hf"]
    source = shutil.copytree(direction.source, tmp_path / "source")
    file, *_ = _distcp_of(source, EXPERTS)
    chance, size = random.Random(SEED), file.stat().st_size
    flips = [(chance.randrange(size), 1 << chance.randrange(8)) for _ in range(120)]
    counts = flip_each(direction, source, file, flips, tmp_path / "out")
    assert counts["1"] > 60


def test_flipped_weight_in_a_distcp_file(world, tmp_path):
    direction = world.directions["to-hf"]
    source = shutil.copytree(direction.source, tmp_path / "source")
    file, offset, length = _distcp_of(source, EXPERTS)
    flip(file, offset + length // 2)
    out = tmp_path / "out"
    ended = direction.convert(out, source=source)
    assert_refused(ended, f"{EXPERTS}: in {file.name}: check sum ", "the file was damaged after")
    assert tree(out) is None
    flip(file, offset + length // 2)
    assert direction.convert(out, source=source).status == 0
    direction.assert_whole(out)


# --- Forged pickles -----------------------------------------------------------------------------


class _Forged:
    """A pickle that makes a file when it is loaded by pickle or torch.load."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


def _forge_metadata(folder, bomb):
    _change_metadata(folder, lambda metadata: setattr(metadata, "planner_data", bomb) or "")


def _forge_whole_metadata(folder, bomb):
    (folder / RELEASE / ".metadata").write_bytes(pickle.dumps(bomb))


def _forge_common_state(folder, bomb):
    torch.save({"args": bomb, "iteration": 0}, folder / RELEASE / "common.pt")


def _forge_record(folder, bomb):
    record = io.BytesIO()
    torch.save(bomb, record)
    _exchange_record(folder, record.getvalue())


@pytest.mark.parametrize(
    "forge", [_forge_metadata, _forge_whole_metadata, _forge_common_state, _forge_record]
)
def test_nothing_that_a_pickle_names_is_called(world, tmp_path, forge):
    direction = world.directions["to-hf"]
    source = shutil.copytree(direction.source, tmp_path / "source")
    touched = tmp_path / "touched"
    pickle.loads(pickle.dumps(_Forged(touched)))
    assert touched.exists(), "the forged pickle works"
    touched.unlink()
    forge(source, _Forged(touched))
    ended = direction.convert(tmp_path / "out", source=source)
    assert ended.status in (0, 1) and "Traceback" not in ended.text, ended.text
    assert not touched.exists()
    if ended.status == 0:  # the rest of it was whole
        direction.assert_whole(tmp_path / "out")


def test_nothing_that_a_pickle_names_is_imported(world, tmp_path, monkeypatch):
    module = tmp_path / "modules" / "step35_forged.py"
    module.parent.mkdir()
    module.write_text(f"open({str(tmp_path / 'touched')!r}, 'w')\nclass Thing: pass\n")
    direction = world.directions["to-hf"]
    source = shutil.copytree(direction.source, tmp_path / "source")
    named = b"\x80\x04cstep35_forged\nThing\n."
    (source / RELEASE / ".metadata").write_bytes(named)
    hook = f"import sys\nsys.path.insert(0, {str(module.parent)!r})"
    assert_refused(direction.convert(tmp_path / "out", source=source, hook=hook), ".metadata")
    assert not (tmp_path / "touched").exists()
    monkeypatch.syspath_prepend(str(module.parent))
    pickle.loads(named)
    assert (tmp_path / "touched").exists(), "pickle imports it"
