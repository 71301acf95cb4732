"""What is wrong with a config, as data: one `ConfigProblem` each, all of them in one exception.

Standard library only, so that the command line and the argument check can report problems
without loading pydantic.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

_LONGEST_FOUND = 80
_LIST_ENTRY = re.compile(r"(?P<name>.+)\[(?P<index>\d+)\]")


@dataclass(frozen=True, slots=True)
class ConfigProblem:
    """One field that is wrong.

    Attributes:
        field: The field's name; entries as `name[3]` (equal ones together: `name[1-3,5]`),
            nested ones as `name.key`. Empty if the file as a whole is meant.
        expected: What would have been right.
        found: What is there, as JSON text, cut if long.
        hint: What to do, if more can be said than `expected` says; else empty.
    """

    field: str
    expected: str
    found: str
    hint: str = ""

    def __str__(self) -> str:
        name = f"{self.field}: " if self.field else ""
        hint = f"; {self.hint}" if self.hint else ""
        return f"{name}expected {self.expected}, found {self.found}{hint}"


class Step35ConfigError(ValueError):
    """A config that cannot be used, with everything that is wrong with it.

    Args:
        problems: At least one.
        source: Path of the file, or None for a config that came as a dictionary.

    Attributes:
        problems: All problems, in the order of the checks; never empty.
        source: Path of the file, or None for a config that came as a dictionary.
    """

    def __init__(self, problems: Iterable[ConfigProblem], source: str | None = None) -> None:
        self.problems = merge_entries(problems)
        self.source = source
        super().__init__(self.problems, source)

    def __str__(self) -> str:
        number = len(self.problems)
        head = f"{self.source or 'Step-3.5 config'}: {number} problem{'s' * (number != 1)}"
        return "\n".join([head, *(f"  {problem}" for problem in self.problems)])


def found_text(value: object) -> str:
    """A value as a problem shows it: as JSON text on one line, cut to a readable length.

    Args:
        value: Any value; what is no JSON is named by its type.
    """
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        text = f"a value of type {type(value).__name__}"
    if len(text) <= _LONGEST_FOUND:
        return text
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}: {text[: _LONGEST_FOUND - 20]}..."
    return text[:_LONGEST_FOUND] + "..."


def field_text(key: str) -> str:
    """A key of the file as part of a field's name.

    Args:
        key: It stays as it is if it is a name, and is shown as JSON text if not.
    """
    return key if key.isascii() and key.isidentifier() else found_text(key)


def merge_entries(problems: Iterable[ConfigProblem]) -> tuple[ConfigProblem, ...]:
    """Say once what is equally wrong with several entries of a list, as `name[1-3,5]`.

    Args:
        problems: In the order of the checks.

    Returns:
        Each problem where its first entry was, without repeats.
    """
    merged: dict[tuple[str, ConfigProblem], list[int]] = {}
    for problem in problems:
        match = _LIST_ENTRY.fullmatch(problem.field)
        name = match["name"] if match else problem.field
        indices = merged.setdefault((name, replace(problem, field="")), [])
        if match and int(match["index"]) not in indices:
            indices.append(int(match["index"]))
    return tuple(
        replace(problem, field=f"{name}[{ranges(indices)}]" if indices else name)
        for (name, problem), indices in merged.items()
    )


def ranges(indices: Iterable[int]) -> str:
    """Indices as text, such as `1-3,5`."""
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
