"""Pickles read as data: nothing that a file names is imported or called.

A pickle is a program for a small stack machine. This module runs the operations that the pickles
of torch.save and torch.distributed.checkpoint consist of (protocol 2 and later), and makes plain
values of them; an object of any other class becomes an `Inert` one.

No pickle, damaged or forged, can make it take much memory, as it could `pickle.Unpickler`. Each
operation is checked before it is carried out, and takes memory in proportion to its own bytes: a
length must lie within the data, an entry of the memo must follow the last one, nothing is copied
out of an object that is already there, and a dictionary's key holds only a few values (to hash a
tuple that has the same tuple twice, and so on for a hundred levels, would never end). For the same
reason, whoever shows what came out of a pickle must cut it, as `reprlib` does.
"""

from __future__ import annotations

import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from types import NoneType
from typing import Any

import torch

_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
_LARGEST_KEY = 64


@dataclass(frozen=True, slots=True)
class Named:
    """A class or function that a pickle names.

    Attributes:
        module: Name of its module.
        name: Its name there.
    """

    module: str
    name: str


class Inert:
    """An object of a class that was not loaded; it has the attributes that the pickle gives it.

    Attributes:
        made_by: The class or function that would have made it.
        args: The arguments that this would have been called with.
        state: What the pickle sets it to; if that is a dictionary, it is the attributes.
    """

    __slots__ = ("__dict__", "args", "made_by", "state")

    def __init__(self, made_by: Named, args: tuple[Any, ...]) -> None:
        self.made_by, self.args = made_by, args
        self.state: Any = None


_SIZE = Named("torch", "Size")
_ORDERED_DICT = Named("collections", "OrderedDict")
_KEY_TYPES = frozenset({NoneType, bool, int, float, str, bytes, torch.dtype, Named, Inert})


def load_inert(data: bytes) -> Any:
    """What a pickle describes, of plain values and `Inert` objects.

    A torch.Size is a tuple, an OrderedDict a dictionary, and what was stored outside the pickle
    (a tensor's storage) the tuple that names it.

    Args:
        data: The pickle; what follows its end is ignored.

    Raises:
        ValueError: It is damaged, asks for more than it holds, or is of protocol 0 or 1.
    """
    machine = _Machine(data)
    try:
        return machine.run()
    except (IndexError, TypeError, struct.error) as error:
        raise ValueError(f"damaged pickle: {error}") from error


class _Machine:
    """The stack machine of one pickle.

    Each operation is given the position behind its code, and returns the one behind its argument.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._stack: list[Any] = []
        self._below_marks: list[list[Any]] = []
        self._memo: list[Any] = []

    def run(self) -> Any:
        data, at = self._data, 0
        while (code := data[at]) != _STOP:
            at = _OPERATIONS[code](self, at + 1)
        return self._stack.pop()

    def unknown(self, at: int) -> int:
        raise ValueError(f"damaged pickle: unexpected operation {self._data[at - 1 : at]!r}")

    # --- Values -----------------------------------------------------------------------------

    def none(self, at: int) -> int:
        self._stack.append(None)
        return at

    def true(self, at: int) -> int:
        self._stack.append(True)
        return at

    def false(self, at: int) -> int:
        self._stack.append(False)
        return at

    def int_1(self, at: int) -> int:
        self._stack.append(self._data[at])
        return at + 1

    def int_2(self, at: int) -> int:
        self._stack.append(_unsigned_2(self._data, at)[0])
        return at + 2

    def int_4(self, at: int) -> int:
        self._stack.append(_signed_4(self._data, at)[0])
        return at + 4

    def long(self, at: int) -> int:
        number, end = self._counted(at, 1)
        self._stack.append(int.from_bytes(number, "little", signed=True))
        return end

    def float_8(self, at: int) -> int:
        self._stack.append(_float_8(self._data, at)[0])
        return at + 8

    def bytes_1(self, at: int) -> int:
        return self._bytes(at, 1)

    def bytes_4(self, at: int) -> int:
        return self._bytes(at, 4)

    def bytes_8(self, at: int) -> int:
        return self._bytes(at, 8)

    def bytearray_8(self, at: int) -> int:
        value, end = self._counted(at, 8)
        self._stack.append(bytearray(value))
        return end

    def text_1(self, at: int) -> int:
        return self._text(at, 1)

    def text_4(self, at: int) -> int:
        return self._text(at, 4)

    def text_8(self, at: int) -> int:
        return self._text(at, 8)

    def _bytes(self, at: int, width: int) -> int:
        value, end = self._counted(at, width)
        self._stack.append(value)
        return end

    def _text(self, at: int, width: int) -> int:
        value, end = self._counted(at, width)
        self._stack.append(value.decode("utf-8", "surrogatepass"))
        return end

    def _counted(self, at: int, width: int) -> tuple[bytes, int]:
        """Bytes behind their number, which takes `width` bytes itself; and the end of them."""
        start = at + width
        length = int.from_bytes(self._data[at:start], "little")
        self._check_length(start, length)
        return self._data[start : start + length], start + length

    def _check_length(self, start: int, length: int) -> None:
        if start + length > len(self._data):
            raise ValueError(f"damaged pickle: {length} bytes at {start} of {len(self._data)}")

    # --- Containers -------------------------------------------------------------------------

    def mark(self, at: int) -> int:
        self._below_marks.append(self._stack)
        self._stack = []
        return at

    def _above_mark(self) -> list[Any]:
        values = self._stack
        self._stack = self._below_marks.pop()
        return values

    def pop(self, at: int) -> int:
        self._stack.pop()
        return at

    def pop_mark(self, at: int) -> int:
        self._above_mark()
        return at

    def empty_tuple(self, at: int) -> int:
        self._stack.append(())
        return at

    def tuple_1(self, at: int) -> int:
        self._stack[-1] = (self._stack[-1],)
        return at

    def tuple_2(self, at: int) -> int:
        last = self._stack.pop()
        self._stack[-1] = (self._stack[-1], last)
        return at

    def tuple_3(self, at: int) -> int:
        last, middle = self._stack.pop(), self._stack.pop()
        self._stack[-1] = (self._stack[-1], middle, last)
        return at

    def tuple_of_marked(self, at: int) -> int:
        values = tuple(self._above_mark())
        self._stack.append(values)
        return at

    def empty_list(self, at: int) -> int:
        self._stack.append([])
        return at

    def append(self, at: int) -> int:
        value = self._stack.pop()
        self._extend([value])
        return at

    def extend(self, at: int) -> int:
        values = self._above_mark()
        self._extend(values)
        return at

    def _extend(self, values: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, list):
            target.extend(values)
        elif not isinstance(target, Inert):  # of a subclass of list: left out
            raise ValueError(f"damaged pickle: items of a {type(target).__name__}")

    def empty_dict(self, at: int) -> int:
        self._stack.append({})
        return at

    def set_item(self, at: int) -> int:
        value, key = self._stack.pop(), self._stack.pop()
        self._update([key, value])
        return at

    def set_items(self, at: int) -> int:
        keys_and_values = self._above_mark()
        self._update(keys_and_values)
        return at

    def _update(self, keys_and_values: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, dict):
            keys = keys_and_values[::2]
            _check_keys(keys)
            target.update(zip(keys, keys_and_values[1::2], strict=True))
        elif not isinstance(target, Inert):  # of a subclass of dict: left out
            raise ValueError(f"damaged pickle: items of a {type(target).__name__}")

    def empty_set(self, at: int) -> int:
        self._stack.append(set())
        return at

    def add_items(self, at: int) -> int:
        values = self._above_mark()
        target = self._stack[-1]
        if not isinstance(target, set):
            raise ValueError(f"damaged pickle: items of a {type(target).__name__}")
        _check_keys(values)
        target.update(values)
        return at

    def frozenset_of_marked(self, at: int) -> int:
        values = self._above_mark()
        _check_keys(values)
        self._stack.append(frozenset(values))
        return at

    # --- Objects ----------------------------------------------------------------------------

    def name(self, at: int) -> int:
        middle = self._data.index(b"\n", at)
        end = self._data.index(b"\n", middle + 1)
        self._stack.append(
            _named(self._data[at:middle].decode(), self._data[middle + 1 : end].decode())
        )
        return end + 1

    def name_on_stack(self, at: int) -> int:
        name, module = self._stack.pop(), self._stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise ValueError("damaged pickle: names that are no text")
        self._stack.append(_named(module, name))
        return at

    def call(self, at: int) -> int:
        args = self._stack.pop()
        function = self._stack[-1]
        if function == _SIZE and _is_tuple_of_tuple(args):
            self._stack[-1] = args[0]
        elif function == _ORDERED_DICT and args == ():
            self._stack[-1] = {}
        else:
            self._stack[-1] = _inert(function, args)
        return at

    def new_object(self, at: int) -> int:
        args = self._stack.pop()
        self._stack[-1] = _inert(self._stack[-1], args)
        return at

    def new_object_with_keywords(self, at: int) -> int:
        """Leave the keywords out."""
        self._stack.pop()
        return self.new_object(at)

    def set_state(self, at: int) -> int:
        state = self._stack.pop()
        target = self._stack[-1]
        if isinstance(target, Inert):
            target.state = state
            if isinstance(state, dict):
                # Not a copy: many objects may share one large state.
                target.__dict__ = state
        elif not isinstance(target, dict):  # of a dictionary's attributes nothing is kept
            raise ValueError(f"damaged pickle: state of a {type(target).__name__}")
        return at

    def stored_outside(self, at: int) -> int:
        """What names a thing stored elsewhere stands for it."""
        return at

    # --- Memo -------------------------------------------------------------------------------

    def memoize(self, at: int) -> int:
        self._memo.append(self._stack[-1])
        return at

    def put_1(self, at: int) -> int:
        self._put(self._data[at])
        return at + 1

    def put_4(self, at: int) -> int:
        self._put(_unsigned_4(self._data, at)[0])
        return at + 4

    def _put(self, number: int) -> None:
        """As picklers do, number the entries without a gap."""
        if number != len(self._memo):
            raise ValueError(
                f"damaged pickle: memo entry {number} follows {len(self._memo)} others"
            )
        self._memo.append(self._stack[-1])

    def get_1(self, at: int) -> int:
        self._stack.append(self._memo[self._data[at]])
        return at + 1

    def get_4(self, at: int) -> int:
        self._stack.append(self._memo[_unsigned_4(self._data, at)[0]])
        return at + 4

    # --- The rest ---------------------------------------------------------------------------

    def protocol(self, at: int) -> int:
        return at + 1

    def frame(self, at: int) -> int:
        """Note how many bytes follow that a reader of a file had better read at once."""
        length = _unsigned_8(self._data, at)[0]
        self._check_length(at + 8, length)
        return at + 8


def _named(module: str, name: str) -> Any:
    if module == "torch" and name in _DTYPES:
        return _DTYPES[name]
    return Named(module, name)


def _inert(made_by: Any, args: Any) -> Inert:
    if not isinstance(made_by, Named) or not isinstance(args, tuple):
        raise ValueError(f"damaged pickle: a call of a {type(made_by).__name__}")
    return Inert(made_by, args)


def _is_tuple_of_tuple(args: Any) -> bool:
    return isinstance(args, tuple) and len(args) == 1 and isinstance(args[0], tuple)


def _check_keys(keys: list[Any]) -> None:
    for key in keys:
        if type(key) not in _KEY_TYPES:
            _check_key(key, _LARGEST_KEY)


def _check_key(key: Any, most: int) -> int:
    """Refuse a key of more than `most` values; returns how many fewer may follow."""
    if most == 0:
        raise ValueError(f"damaged pickle: a key of more than {_LARGEST_KEY} values")
    most -= 1
    if isinstance(key, tuple):
        for value in key:
            most = _check_key(value, most)
    elif type(key) not in _KEY_TYPES:
        raise ValueError(f"damaged pickle: a {type(key).__name__} in a key")
    return most


_STOP = pickle.STOP[0]
_unsigned_2 = struct.Struct("<H").unpack_from
_unsigned_4 = struct.Struct("<I").unpack_from
_unsigned_8 = struct.Struct("<Q").unpack_from
_signed_4 = struct.Struct("<i").unpack_from
_float_8 = struct.Struct(">d").unpack_from
_BY_CODE: dict[bytes, Callable[[_Machine, int], int]] = {
    pickle.NONE: _Machine.none,
    pickle.NEWTRUE: _Machine.true,
    pickle.NEWFALSE: _Machine.false,
    pickle.BININT1: _Machine.int_1,
    pickle.BININT2: _Machine.int_2,
    pickle.BININT: _Machine.int_4,
    pickle.LONG1: _Machine.long,
    pickle.BINFLOAT: _Machine.float_8,
    pickle.SHORT_BINBYTES: _Machine.bytes_1,
    pickle.BINBYTES: _Machine.bytes_4,
    pickle.BINBYTES8: _Machine.bytes_8,
    pickle.BYTEARRAY8: _Machine.bytearray_8,
    pickle.SHORT_BINUNICODE: _Machine.text_1,
    pickle.BINUNICODE: _Machine.text_4,
    pickle.BINUNICODE8: _Machine.text_8,
    pickle.MARK: _Machine.mark,
    pickle.POP: _Machine.pop,
    pickle.POP_MARK: _Machine.pop_mark,
    pickle.EMPTY_TUPLE: _Machine.empty_tuple,
    pickle.TUPLE1: _Machine.tuple_1,
    pickle.TUPLE2: _Machine.tuple_2,
    pickle.TUPLE3: _Machine.tuple_3,
    pickle.TUPLE: _Machine.tuple_of_marked,
    pickle.EMPTY_LIST: _Machine.empty_list,
    pickle.APPEND: _Machine.append,
    pickle.APPENDS: _Machine.extend,
    pickle.EMPTY_DICT: _Machine.empty_dict,
    pickle.SETITEM: _Machine.set_item,
    pickle.SETITEMS: _Machine.set_items,
    pickle.EMPTY_SET: _Machine.empty_set,
    pickle.ADDITEMS: _Machine.add_items,
    pickle.FROZENSET: _Machine.frozenset_of_marked,
    pickle.GLOBAL: _Machine.name,
    pickle.STACK_GLOBAL: _Machine.name_on_stack,
    pickle.REDUCE: _Machine.call,
    pickle.NEWOBJ: _Machine.new_object,
    pickle.NEWOBJ_EX: _Machine.new_object_with_keywords,
    pickle.BUILD: _Machine.set_state,
    pickle.BINPERSID: _Machine.stored_outside,
    pickle.MEMOIZE: _Machine.memoize,
    pickle.BINPUT: _Machine.put_1,
    pickle.LONG_BINPUT: _Machine.put_4,
    pickle.BINGET: _Machine.get_1,
    pickle.LONG_BINGET: _Machine.get_4,
    pickle.PROTO: _Machine.protocol,
    pickle.FRAME: _Machine.frame,
}
_OPERATIONS = [_BY_CODE.get(bytes([code]), _Machine.unknown) for code in range(256)]
