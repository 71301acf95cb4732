"""From a path to an immutable JSON object: reading config.json, and refusing what is none.

Nothing here knows what a field means: `Step35Config` reads the fields. Standard library only.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from step35_patch.config.errors import ConfigProblem, Step35ConfigError, field_text, found_text
from step35_patch.config.plain_file import open_plain

CONFIG_NAME = "config.json"
# A config.json takes some kilobytes; more than this is another file, given by mistake.
_LARGEST_FILE = 16 * 2**20
_DEEPEST_NESTING = 64
# One of two escapes that stand for one character in JSON; alone it is no text.
_HALF_CHARACTER = re.compile("[\ud800-\udfff]")
_OBJECT = "a JSON object with the fields of a Step-3.5 config"


class FrozenDict(dict[str, Any]):
    """A dictionary that refuses changes; it still serialises, pickles and copies as one."""

    def _refuse(self, *args: object, **kwargs: object) -> NoReturn:
        raise TypeError("a Step-3.5 config is immutable; make a new one with from_dict()")

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def __reduce__(self) -> tuple[type[FrozenDict], tuple[dict[str, Any]]]:
        return type(self), (dict(self),)

    def __copy__(self) -> FrozenDict:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> FrozenDict:
        return self


def read_json(
    path: str | os.PathLike[str],
) -> tuple[Path, Any, list[ConfigProblem]]:
    """Read a config.json.

    Args:
        path: The file, or a folder that holds it.

    Returns:
        The file, its JSON value, and the problems in spite of which it can be read: keys given
        twice, of which the value has the last.

    Raises:
        Step35ConfigError: The file is missing, unreadable, empty, truncated, not UTF-8, not
            JSON, or nested too deeply for Python's parser.
    """
    file, content = _read_bytes(path)

    def fail(expected: str, found: str, hint: str = "") -> NoReturn:
        raise Step35ConfigError([ConfigProblem("", expected, found, hint)], str(file)) from None

    if len(content) > _LARGEST_FILE:
        fail(_OBJECT, f"a file of more than {_LARGEST_FILE} bytes", "is this a config.json?")
    if not content.strip():
        fail(_OBJECT, "an empty file")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        fail("UTF-8 text", f"byte 0x{content[error.start]:02x} at offset {error.start}")

    repeated: list[ConfigProblem] = []

    def collect(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        counts = Counter(key for key, _ in pairs)
        for key in [key for key, count in counts.items() if count > 1]:
            values = " and ".join(found_text(value) for name, value in pairs if name == key)
            hint = "keep the right one"
            repeated.append(ConfigProblem(field_text(key), "one value", values, hint))
        return dict(pairs)

    try:
        data = json.loads(text, object_pairs_hook=collect)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        fail("valid JSON", f"{error.msg} at {where}", "is the file complete?")
    except RecursionError:
        fail(f"at most {_DEEPEST_NESTING} levels of nesting", "more")
    except ValueError as error:  # an integer with more digits than Python converts
        fail("valid JSON", str(error))
    return file, data, repeated


def _read_bytes(path: str | os.PathLike[str]) -> tuple[Path, bytes]:
    expected = f"a {CONFIG_NAME} or a folder with one"
    hint = "give a path on this machine; nothing is downloaded"
    file = Path(path)
    try:
        if not os.fspath(path):
            raise FileNotFoundError("an empty path")
        if file.is_dir():
            file /= CONFIG_NAME
        with open_plain(file) as stream:
            return file, stream.read(_LARGEST_FILE + 1)
    except FileNotFoundError:
        problem = ConfigProblem("", expected, "no such file", hint)
    except OSError as error:
        problem = ConfigProblem("", expected, error.strerror or str(error))
    except ValueError as error:  # a null character in the path
        problem = ConfigProblem("", expected, str(error))
    raise Step35ConfigError([problem], str(file))


def json_problems(value: object, field: str = "", depth: int = 0) -> list[ConfigProblem]:
    """What in a value is no JSON that a config can hold, or is nested too deeply for one.

    Args:
        value: The object, or a part of it.
        field: Name of the part; empty for the object.
        depth: Levels above the part.
    """
    if depth > _DEEPEST_NESTING:
        return [ConfigProblem(field, f"at most {_DEEPEST_NESTING} levels of nesting", "more")]
    if isinstance(value, float) and not math.isfinite(value):
        return [ConfigProblem(field, "a finite number", found_text(value))]
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return [ConfigProblem(field, "an integer of at most 64 bits", "a larger one")]
    if value is None or isinstance(value, bool | int | float | str):
        return []
    if isinstance(value, list | tuple):
        entries = [(f"{field}[{index}]", entry) for index, entry in enumerate(value)]
    elif isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                return [ConfigProblem(field, "keys that are strings", found_text(key))]
            if _HALF_CHARACTER.search(key):
                return [ConfigProblem(field, "keys of whole characters", found_text(key))]
        prefix = f"{field}." if field else ""
        entries = [(prefix + field_text(key), value[key]) for key in value]
    else:
        return [ConfigProblem(field, "a JSON value", found_text(value))]
    return [problem for name, entry in entries for problem in json_problems(entry, name, depth + 1)]


def freeze(value: Any, depth: int = 0) -> Any:
    """An immutable copy of a JSON value: tuples for lists, `FrozenDict` for objects.

    What is nested more deeply than `json_problems` allows is left out.

    Args:
        value: The object, or a part of it.
        depth: Levels above the part.
    """
    if depth > _DEEPEST_NESTING:
        return None
    if isinstance(value, Mapping):
        return FrozenDict({key: freeze(entry, depth + 1) for key, entry in value.items()})
    if isinstance(value, list | tuple):
        return tuple(freeze(entry, depth + 1) for entry in value)
    return value
