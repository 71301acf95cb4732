"""Files of weights with something changed, by the byte or by the field, and what becomes of them.

`main` runs in a process of its own, whose memory is bounded.
"""

from __future__ import annotations

import json
import pickle
import random
import resource
import shutil
import traceback
from argparse import Namespace
from collections import Counter
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from step35_patch import Step35Config, Step35ConfigError
from step35_patch.convert import ConversionError, Options, convert_to_hf, convert_to_megatron
from step35_patch.storage.errors import CheckpointError
from step35_patch.storage.hf_folder import INDEX, HfFolder
from step35_patch.storage.megatron_checkpoint import MegatronCheckpoint
from step35_patch.storage.torch_dist import TorchDistFolder
from step35_patch.tensors.qkv import DriftedGateError
from support.fuzzing import at_most
from support.stored import stored_tensors

NAMED = (CheckpointError, ConversionError, Step35ConfigError, DriftedGateError)
# What one file may make its reader take, and how long an example may last.
MEMORY, SECONDS = 2**31, 20.0

type Mutation = Callable[[bytes, random.Random], bytes]
type Tensors = dict[str, torch.Tensor]


# --- By the byte --------------------------------------------------------------------------------

_PIECES = (
    *(b"", b"\0", b"\xff" * 8, b"\x80", b'"', b"{", b"}", b"[", b"]", b",", b":", b"-", b"1e9"),
    *(b"9" * 30, b"../", b"\\ud800", b"\r\n", b" " * 9, b"}]", b"(", b"N", b"0", b"r", b"\x94"),
)


def by_the_byte(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(len(changed) + 1)
        match chance.randrange(5):
            case 0 if at < len(changed):
                changed[at] ^= 1 << chance.randrange(8)
            case 1 if at < len(changed):
                changed[at] = chance.randrange(256)
            case 2:
                del changed[at : at + chance.randint(1, 40)]
            case 3:
                other = chance.randrange(len(changed) + 1)
                changed[at:at] = changed[other : other + chance.randint(1, 40)]
            case _:
                changed[at : at + chance.randrange(9)] = chance.choice(_PIECES)
    return bytes(changed)


def header_by_the_byte(data: bytes, chance: random.Random) -> bytes:
    """In what a safetensors file has before the tensors, its length included."""
    end = 8 + int.from_bytes(data[:8], "little")
    if chance.randrange(4) == 0:
        return by_the_byte(data[:8], chance) + data[8:]
    header = by_the_byte(data[8:end], chance)
    length = len(header) if chance.randrange(2) else end - 8
    return length.to_bytes(8, "little") + header + data[end:]


# --- By the field -------------------------------------------------------------------------------

_PATHS = ("", ".", "..", "../x", "/etc/passwd", "a\0b", "\ud800", "a" * 5000, "b.safetensors")
_NUMBERS = (-1, 0, 1, 2**31, 2**53 + 1, 2**63, 2**64 - 1, 2**64, 2**200, 1.5, -0.0, 1e300)
_JSON_JUNK = (*_PATHS, *_NUMBERS, None, True, [], {}, [[]], {"a": 1}, [None], "F32", "U8", [0, 4])
# What goes right behind a bracket: doubled and unknown names, and more than a parser takes.
_JSON_TEXTS = (
    '"dtype": "F16", ',
    '"data_offsets": [0, 4], ',
    '"shape": [1], ',
    '"lm_head.weight": "a.safetensors", ',
    '"weight_map": {}, ',
    '"x": NaN, ',
    '"x": ' + "[" * 100 + "]" * 100 + ", ",
    '"x": ' + "[" * 100_000 + "]" * 100_000 + ", ",
    '"x": ' + "9" * 5000 + ", ",
    '"\\ud800": 1, ',
)


def json_by_the_field(data: bytes, chance: random.Random) -> bytes:
    document = json.loads(data)
    for _ in range(chance.randint(1, 2)):
        target = document
        while True:
            keys = list(target) if isinstance(target, dict) else list(range(len(target)))
            if not keys:
                break
            key = chance.choice(keys)
            if isinstance(target[key], dict | list) and chance.randrange(5):
                target = target[key]
                continue
            _change(target, key, chance, _JSON_JUNK)
            break
    text = json.dumps(document)
    if chance.randrange(4) == 0:
        brackets = [at + 1 for at, letter in enumerate(text) if letter == "{"]
        at = chance.choice(brackets)
        text = text[:at] + chance.choice(_JSON_TEXTS) + text[at:]
    return text.encode()


def _change(target: Any, key: Any, chance: random.Random, junk: tuple[Any, ...]) -> None:
    others = list(target) if isinstance(target, dict) else list(range(len(target)))
    value, other = target[key], chance.choice(others)
    match chance.randrange(5):
        case 0:
            del target[key]
        case 1:
            target[key], target[other] = target[other], value
        case 2 if isinstance(target, dict):
            target[chance.choice([f"{key}x", "", "lm_head.weight", "\0"])] = target.pop(key)
        case 3 if type(value) is int:
            target[key] = chance.choice([value + 1, value - 1, value * 2, -value, value + 2**32])
        case _:
            target[key] = chance.choice(junk)


def header_by_the_field(data: bytes, chance: random.Random) -> bytes:
    end = 8 + int.from_bytes(data[:8], "little")
    header = json_by_the_field(data[8:end], chance)
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[end:]


def _pickle_junk() -> tuple[Any, ...]:
    bomb: Any = ("x",)
    for _ in range(60):
        bomb = (bomb, bomb)
    endless: list[Any] = []
    endless.append(endless)
    return (
        *_PATHS,
        *_NUMBERS,
        *(None, True, b"", (), {}, endless, bomb, (-1,), (1,) * 70, ("1", "2")),
        *(torch.Size([0]), torch.Size([2**62, 2**62]), torch.float16, torch.int8, Namespace(a=1)),
        "9" * 5000,
    )


def metadata_by_the_field(data: bytes, chance: random.Random) -> bytes:
    """Of a torch_dist checkpoint's .metadata, written again with torch's own classes."""
    metadata = pickle.loads(data)
    junk = _pickle_junk()
    for _ in range(chance.randint(1, 2)):
        places, entries = metadata.storage_data, metadata.state_dict_metadata
        if not (places and isinstance(places, dict) and entries and isinstance(entries, dict)):
            break  # the first change was of the whole
        tensors = [key for key, entry in entries.items() if hasattr(entry, "chunks")]
        index = chance.choice(list(places))
        key = chance.choice(tensors)
        entry = entries[key]
        match chance.randrange(7):
            case 0:
                name = chance.choice(["relative_path", "offset", "length"])
                _set(places[index], name, places[chance.choice(list(places))], chance, junk)
            case 1:
                _change(places, index, chance, junk)
            case 2:
                _change(entries, key, chance, junk)
            case 3 if entry.chunks:
                chunk = chance.choice(entry.chunks)
                _set(chunk, chance.choice(["offsets", "sizes"]), entry.chunks[0], chance, junk)
            case 4:
                _set(entry, "size", entries[chance.choice(tensors)], chance, junk)
            case 5:
                entry.properties.dtype = chance.choice(junk)
            case _:
                name = chance.choice(["planner_data", "storage_data", "state_dict_metadata"])
                setattr(metadata, name, chance.choice(junk))
    return pickle.dumps(metadata)


def _set(thing: Any, name: str, other: Any, chance: random.Random, junk: tuple[Any, ...]) -> None:
    if (value := getattr(thing, name, None)) is None:
        return  # it is junk already
    new = chance.choice([chance.choice(junk), getattr(other, name, None)])
    if type(value) is int and chance.randrange(2):
        new = value + chance.choice([1, -1, 64, 2**32, 2**70])
    if isinstance(value, torch.Size) and value and chance.randrange(2):
        new = torch.Size([*value[:-1], value[-1] + chance.choice([1, -1, 2**40])])
    setattr(thing, name, new)


def common_by_the_field(data: bytes, chance: random.Random) -> bytes:
    state = torch.load(BytesIO(data), weights_only=False)
    junk = _pickle_junk()
    args = state["args"]
    names = sorted(vars(args))
    match chance.randrange(4):
        case 0:
            state[chance.choice(list(state))] = chance.choice(junk)
        case 1:
            state = chance.choice(junk)
        case 2:
            delattr(args, chance.choice(names))
        case _:
            own = [name for name in names if name.startswith("step35")]
            setattr(args, chance.choice(own + names), chance.choice(junk))
    saved = BytesIO()
    torch.save(state, saved)
    return saved.getvalue()


# --- What becomes of them -----------------------------------------------------------------------

# Name: (the file in the folder, what is done to it)
OF_PUBLISHED: dict[str, tuple[str, Mutation]] = {
    "safetensors header, bytes": ("b.safetensors", header_by_the_byte),
    "safetensors header, fields": ("b.safetensors", header_by_the_field),
    "index, bytes": (INDEX, by_the_byte),
    "index, fields": (INDEX, json_by_the_field),
}
OF_MEGATRON: dict[str, tuple[str, Mutation]] = {
    ".metadata, bytes": ("release/.metadata", by_the_byte),
    ".metadata, fields": ("release/.metadata", metadata_by_the_field),
    "common.pt, bytes": ("release/common.pt", by_the_byte),
    "common.pt, fields": ("release/common.pt", common_by_the_field),
    "metadata.json, bytes": ("release/metadata.json", by_the_byte),
    "metadata.json, fields": ("release/metadata.json", json_by_the_field),
    "tracker, bytes": ("latest_checkpointed_iteration.txt", by_the_byte),
}


def read_published(folder: Path, config: Step35Config) -> tuple[Tensors, Callable[[], Tensors]]:
    """All tensors, and what reads them as safetensors itself does."""
    opened = HfFolder(folder, config)
    names = list(opened._sources)

    def by_the_library() -> Tensors:
        found = {}
        for file in opened.files():
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt") as shard:
                    keys = shard.keys()
                    found |= {name: shard.get_tensor(name) for name in keys}
        return {name: found[name] for name in names}

    return {name: opened.get(name) for name in names}, by_the_library


def read_megatron(folder: Path, config: Step35Config) -> tuple[Tensors, Callable[[], Tensors]]:
    """All tensors by Megatron's keys, and what reads them as torch itself does."""
    checkpoint = MegatronCheckpoint(folder, config)
    for name in checkpoint.runs:
        checkpoint.get(name)
    stored: TorchDistFolder = checkpoint.folder
    keys = {box.key for pairs in checkpoint.runs.values() for _, box in pairs}
    found = {}
    for key in sorted(keys):
        shape = stored.tensors[key].shape
        found[key] = stored.read(key, (0,) * len(shape), shape)
    return found, lambda: {k: t for k, t in stored_tensors(stored.path).items() if k in keys}


def differing(found: Tensors, wanted: Tensors) -> list[str]:
    """Names of tensors that are not the same bits."""
    return [
        name
        for name in found.keys() | wanted.keys()
        if name not in found
        or name not in wanted
        or found[name].dtype != wanted[name].dtype
        or found[name].shape != wanted[name].shape
        or found[name].numpy().tobytes() != wanted[name].numpy().tobytes()
    ]


def main(ask: dict[str, Any]) -> None:
    """Mutate a file over and over, and print what became of it.

    Args:
        ask: `kind`, the `folder`, which is changed, the `hf` folder with the config, `seed`,
            `first` and `count` of the examples, `out` for a conversion of what is accepted.
    """
    torch.set_num_threads(1)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    folder, hf, out = Path(ask["folder"]), Path(ask["hf"]), Path(ask["out"])
    config = Step35Config.from_pretrained(hf)
    is_published = ask["kind"] in OF_PUBLISHED
    file, mutation = (OF_PUBLISHED | OF_MEGATRON)[ask["kind"]]
    read = read_published if is_published else read_megatron
    whole, truth = (folder / file).read_bytes(), read(folder, config)[0]
    truth = {name: tensor.clone() for name, tensor in truth.items()}
    ends: Counter[str] = Counter()
    bad: list[list[Any]] = []
    for number in range(ask["first"], ask["first"] + ask["count"]):
        chance = random.Random(f"{ask['kind']} {ask['seed']} {number}")
        (folder / file).write_bytes(mutation(whole, chance))
        try:
            with at_most(SECONDS):
                found, by_the_library = read(folder, config)
                wrong = differing(found, truth)
                if wrong and not (wrong := differing(found, by_the_library())):
                    ends["another model's, as the library has it"] += 1
                elif not wrong:
                    ends["the same bits"] += 1
                    if ends["the same bits"] % 10 == 1:
                        _convert(folder, hf, out, is_published)
            if wrong:
                bad.append([number, f"wrong tensors: {wrong[:3]}"])
        except NAMED:
            ends["refused"] += 1
        except BaseException:
            bad.append([number, traceback.format_exc()[-1500:]])
    (folder / file).write_bytes(whole)
    print("RESULT", json.dumps([ends, bad]))


def _convert(folder: Path, hf: Path, out: Path, is_published: bool) -> None:
    """The whole way, with the package's own look at what it wrote."""
    options = Options(check=True)
    if is_published:
        convert_to_megatron(folder, out, options=options)
    else:
        convert_to_hf(folder, out, hf_dir=hf, options=options)
    shutil.rmtree(out)
