"""Pickles that are read as data: what they hold comes out, whatever they ask for."""

import math
import mmap
import pickle
import resource
import struct
import threading
import tracemalloc
from argparse import Namespace
from collections import OrderedDict

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from step35_patch.storage.errors import CheckpointError
from step35_patch.storage.inert_pickle import Inert, Named, load_inert
from step35_patch.storage.torch_archive import Archive, storage_name
from step35_patch.storage.torch_dist import TorchDistFolder, WrittenTensor, metadata_bytes

PROTOCOLS = range(2, pickle.HIGHEST_PROTOCOL + 1)
SHARED = ["one"]


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        [0, 255, 256, 65535, 65536, -1, 2**31, -(2**63), 2**2000],
        [0.0, -1.5, math.inf],
        ["", "a" * 300, "ä\ud800", "b" * 70_000],
        [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)],
        {"a": {"b": [1, {"c": ()}]}, 1: "x", (1, ("y", 2)): "z", None: 3.5},
        {"many": list(range(3000))} | dict.fromkeys(range(2000)),
        [SHARED, SHARED, (SHARED,)],
    ],
    ids=lambda value: type(value).__name__,
)
def test_plain_values(value, protocol):
    found = load_inert(pickle.dumps(value, protocol))
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize("protocol", [p for p in PROTOCOLS if p >= 4])
@pytest.mark.parametrize(
    "value",
    [b"", b"a" * 300, b"b" * 70_000, {1, "a", (2, 3)}, frozenset((4, "c"))],
    ids=["no bytes", "bytes", "many bytes", "set", "frozenset"],
)
def test_values_that_protocol_4_has_operations_for(value, protocol):
    assert load_inert(pickle.dumps([value, value], protocol)) == [value, value]


def test_bytearray():
    assert load_inert(pickle.dumps(bytearray(b"abc"), 5)) == bytearray(b"abc")


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_is_shared_stays_shared(protocol):
    one, two = load_inert(pickle.dumps([SHARED, SHARED], protocol))
    assert one is two
    loop: list = []
    loop.append((loop, loop, loop, loop))
    found = load_inert(pickle.dumps((1, loop), protocol))[1]
    assert found[0][3] is found
    pair: tuple = ([],)
    pair[0].append(pair)
    found = load_inert(pickle.dumps(pair, protocol))
    assert found[0][0] is found


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_torch_saves(protocol):
    value = {
        "size": torch.Size((2, 3)),
        "dtypes": [torch.bfloat16, torch.float32, torch.bool],
        "ordered": OrderedDict(a=1, b=torch.Size(())),
        "args": Namespace(tp=2, rest=Namespace(pp=3)),
    }
    found = load_inert(pickle.dumps(value, protocol))
    assert found["size"] == (2, 3)
    assert found["dtypes"] == value["dtypes"]
    assert found["ordered"] == {"a": 1, "b": ()}
    assert found["args"].made_by == Named("argparse", "Namespace")
    assert (found["args"].tp, found["args"].rest.pp) == (2, 3)


class Thing:
    """An object of any class."""

    calls: list[str] = []  # noqa: RUF012

    def __init__(self):
        self.calls.append("made")
        self.number = 5

    def __setstate__(self, state):
        self.calls.append("set")


class Things(dict):
    """A subclass of a container."""


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_objects_are_inert(protocol):
    data = pickle.dumps([Thing(), Things(a=1), len], protocol)
    Thing.calls.clear()
    thing, things, function = load_inert(data)
    assert not Thing.calls
    assert isinstance(thing, Inert)
    assert thing.made_by == Named(__name__, "Thing")
    assert thing.number == 5
    assert not hasattr(thing, "calls")
    assert things.made_by == Named(__name__, "Things")
    assert function.name == "len"


def _metadata(chunk: tuple[int, ...] = (2, 4)) -> bytes:
    tensors = [
        WrittenTensor(f"w{i}", (2, 4), torch.bfloat16, (((0, 0), chunk, ("f", 9 * i, 9)),))
        for i in range(3)
    ]
    return metadata_bytes(tensors, [("object", ("f", 100, 9))])


def test_metadata_is_what_pickle_reads():
    data = _metadata()
    ours, torchs = load_inert(data), pickle.loads(data)
    assert list(ours.state_dict_metadata) == list(torchs.state_dict_metadata)
    for key, entry in torchs.state_dict_metadata.items():
        found = ours.state_dict_metadata[key]
        assert found.made_by.name == type(entry).__name__
        if isinstance(entry, BytesStorageMetadata):
            continue
        assert found.size == entry.size
        assert found.properties.state[0] == entry.properties.dtype
        assert [(c.offsets, c.sizes) for c in found.chunks] == [
            (c.offsets, c.sizes) for c in entry.chunks
        ]
    for (index, place), (found, found_place) in zip(
        torchs.storage_data.items(), ours.storage_data.items(), strict=True
    ):
        assert (found.fqn, getattr(found, "offset", None)) == (index.fqn, index.offset)
        assert vars(found_place) == vars(place)


def test_every_flipped_bit_is_read_or_refused():
    data = _metadata()
    refused = 0
    for at in range(len(data)):
        for bit in range(8):
            try:
                load_inert(data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :])
            except ValueError:
                refused += 1
    assert refused > len(data)
    for at in range(len(data)):
        with pytest.raises(ValueError, match="damaged pickle"):
            load_inert(data[:at])


# --- Pickles that ask for more than they hold ---------------------------------------------------

HUGE_4, HUGE_8 = struct.pack("<I", 2**31 - 1), struct.pack("<Q", 2**40)
START = pickle.PROTO + b"\4"
# A tuple that has the former one twice, a hundred times: 2**100 values to whoever follows them.
DOUBLING = pickle.EMPTY_TUPLE + 100 * (pickle.DUP + pickle.TUPLE2)
DOUBLING_BY_MEMO = pickle.EMPTY_TUPLE + b"".join(
    pickle.BINPUT + bytes([i]) + pickle.BINGET + bytes([i]) + pickle.TUPLE2 for i in range(100)
)
DEEP = pickle.EMPTY_TUPLE + 200_000 * pickle.TUPLE1


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (pickle.NONE + pickle.LONG_BINPUT + struct.pack("<I", 2**27), "memo entry 134217728"),
        (pickle.NONE + pickle.LONG_BINPUT + b"\xff\xff\xff\xff", "memo entry"),
        (pickle.NONE + pickle.BINPUT + b"\1", "memo entry 1 follows 0"),
        (pickle.LONG_BINGET + HUGE_4, "out of range"),
        (pickle.NONE + pickle.PUT + b"99999999999\n", "unexpected operation b'p'"),
        (pickle.SHORT_BINBYTES + b"\xff", "255 bytes"),
        (pickle.BINBYTES + HUGE_4, "bytes at"),
        (pickle.BINBYTES8 + HUGE_8, "bytes at"),
        (pickle.BYTEARRAY8 + HUGE_8, "bytes at"),
        (pickle.SHORT_BINUNICODE + b"\xff", "255 bytes"),
        (pickle.BINUNICODE + HUGE_4, "bytes at"),
        (pickle.BINUNICODE8 + HUGE_8, "bytes at"),
        (pickle.BINSTRING + HUGE_4, "unexpected operation"),
        (pickle.LONG1 + b"\xff", "255 bytes"),
        (pickle.LONG4 + HUGE_4, "unexpected operation"),
        (pickle.FRAME + HUGE_8, "bytes at"),
        (pickle.LONG + 10_000 * b"9" + b"L\n", "unexpected operation"),
        (pickle.NEXT_BUFFER, "unexpected operation"),
        (pickle.EXT1 + b"\1", "unexpected operation"),
        (DOUBLING, "unexpected operation b'2'"),
        (pickle.EMPTY_DICT + DOUBLING_BY_MEMO + pickle.NONE + pickle.SETITEM, "a key of more"),
        (
            pickle.EMPTY_SET + pickle.MARK + DOUBLING_BY_MEMO + pickle.ADDITEMS,
            "a key of more",
        ),
        (pickle.MARK + DOUBLING_BY_MEMO + pickle.FROZENSET, "a key of more"),
        (pickle.EMPTY_DICT + DEEP + pickle.NONE + pickle.SETITEM, "a key of more"),
        (pickle.EMPTY_DICT + pickle.EMPTY_LIST + pickle.NONE + pickle.SETITEM, "a list in a key"),
        (pickle.STOP, "pop from empty list"),
        (pickle.NONE + pickle.EMPTY_TUPLE + pickle.REDUCE, "a call of a NoneType"),
        (pickle.NONE + pickle.EMPTY_DICT + pickle.BUILD, "state of a NoneType"),
    ],
)
def test_bomb_is_refused_before_it_goes_off(body, said):
    data = START + body + pickle.STOP
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=said):
            load_inert(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 100_000 + 200 * len(data)


SIZE_OF = pickle.GLOBAL + b"torch\nSize\n"
CLASS = pickle.GLOBAL + b"some\nThing\n"
MANY = 3000


@pytest.mark.parametrize(
    ("head", "each"),
    [
        # A torch.Size of one large tuple, again and again.
        (pickle.MARK + MANY * pickle.NONE + pickle.TUPLE + pickle.TUPLE1, pickle.REDUCE),
        # Objects of one large tuple of arguments.
        (pickle.MARK + MANY * pickle.NONE + pickle.TUPLE, pickle.NEWOBJ),
    ],
)
def test_nothing_large_is_copied_again_and_again(head, each):
    name = SIZE_OF if each == pickle.REDUCE else CLASS
    data = START + head + pickle.BINPUT + b"\0" + name + pickle.BINPUT + b"\1" + pickle.MARK
    data += MANY * (pickle.BINGET + b"\1" + pickle.BINGET + b"\0" + each) + pickle.TUPLE
    tracemalloc.start()
    try:
        found = load_inert(data + pickle.STOP)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(found) == MANY
    assert peak < 100 * len(data)


def test_state_is_shared_and_not_copied():
    state = pickle.EMPTY_DICT + pickle.MARK
    state += b"".join(pickle.BININT2 + struct.pack("<H", i) + pickle.NONE for i in range(MANY))
    data = START + state + pickle.SETITEMS + pickle.BINPUT + b"\0" + CLASS + pickle.BINPUT + b"\1"
    one = pickle.BINGET + b"\1" + pickle.EMPTY_TUPLE + pickle.NEWOBJ + pickle.BINGET + b"\0"
    data += pickle.MARK + MANY * (one + pickle.BUILD) + pickle.TUPLE + pickle.STOP
    tracemalloc.start()
    try:
        found = load_inert(data)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert found[0].state is found[-1].state
    assert peak < 100 * len(data)


def _doubling() -> tuple:
    value: tuple = ()
    for _ in range(60):
        value = (value, value)
    return value


def test_what_a_pickle_holds_is_shown_cut(tmp_path):
    metadata = pickle.loads(_metadata())
    metadata.state_dict_metadata["w1"].chunks[0].sizes = _doubling()
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(
        CheckpointError, match=r"w1: expected 2 whole numbers, found \(\(\("
    ) as error:
        TorchDistFolder(tmp_path)
    assert len(str(error.value)) < 1000
    for place in metadata.storage_data.values():
        place.relative_path = _doubling()
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    with pytest.raises(CheckpointError, match="expected a file's name") as error:
        TorchDistFolder(tmp_path)
    assert len(str(error.value)) < 1000


def test_forged_tensor_is_shown_cut(tmp_path):
    stored = Inert(
        Named("torch._utils", "_rebuild_tensor_v2"),
        (("storage", Named("torch", "FloatStorage"), "0", "cpu", 2), 0, _doubling(), (1,)),
    )
    with pytest.raises(ValueError, match=r"expected a tensor of torch.float32, \(2,\)") as error:
        storage_name(stored, torch.float32, (2,))
    assert len(str(error.value)) < 1000
    with pytest.raises(ValueError, match="expected a plain tensor, found list"):
        storage_name([], torch.float32, (2,))


def test_archive_of_torch_save(tmp_path):
    torch.save(torch.zeros(2, 3), tmp_path / "record")
    archive = Archive(memoryview((tmp_path / "record").read_bytes()))
    assert storage_name(archive.object(), torch.float32, (2, 3)) == "0"
    with pytest.raises(ValueError, match=r"expected a tensor of torch.float32, \(3, 2\), found"):
        storage_name(archive.object(), torch.float32, (3, 2))


def test_other_threads_have_all_the_memory(monkeypatch):
    """Reading a pickle changes nothing in the process: no limit is set, none is seen elsewhere."""
    monkeypatch.setattr(resource, "setrlimit", lambda *_: pytest.fail("a limit was set"))
    data, before, ended = _metadata(), resource.getrlimit(resource.RLIMIT_AS), threading.Event()
    seen = []

    def allocate():
        while not ended.is_set():
            seen.append(resource.getrlimit(resource.RLIMIT_AS))
            mmap.mmap(-1, 2**31).close()  # address space, of which nothing is touched

    thread = threading.Thread(target=allocate)
    thread.start()
    try:
        while len(seen) < 100:
            load_inert(data)
    finally:
        ended.set()
        thread.join()
    assert set(seen) == {before}
