"""What a script knows at a point of its course: variables, its arguments, where it stands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from step35_patch.launch.errors import UnreadableLaunch
from step35_patch.launch.values import unknown, unknowns

# More than a launch script has in a variable; what doubles itself in a loop would take all memory.
_MOST_CHARACTERS, MOST_ENTRIES = 2**20, 10_000

# A string, an indexed array or an associative one.
Value = str | list[str] | dict[str, str]


@dataclass
class Scope:
    """The variables of one shell.

    Attributes:
        script: path of the file that is read, for $0 and BASH_SOURCE.
        arguments: $1 and so on.
        given: what the user says of variables that the script cannot know.
        folder: the working directory, or a text with what is not known of it.
        variables: by name; an exported one is in `exported` too.
    """

    script: str
    arguments: list[str]
    given: Mapping[str, str]
    folder: str
    variables: dict[str, Value] = field(default_factory=dict)
    exported: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        for name, value in self.given.items():
            self.variables.setdefault(name, value)
            self.exported.add(name)

    def subshell(self) -> Scope:
        """Another shell with the same variables, whose changes stay there."""
        copied = {
            name: value if isinstance(value, str) else value.copy()
            for name, value in self.variables.items()
        }
        return replace(
            self,
            arguments=list(self.arguments),
            variables=copied,
            exported=set(self.exported),
        )

    def program(self, script: str, arguments: list[str], environment: Mapping[str, str]) -> Scope:
        """The shell of a script that this one starts: it inherits what is exported."""
        return replace(
            self,
            script=script,
            arguments=arguments,
            variables=dict(environment),
            exported=set(environment),
        )

    def environment(self) -> dict[str, str]:
        """What a program that is started gets of the variables."""
        return {
            name: value
            for name, value in self.variables.items()
            if name in self.exported and isinstance(value, str)
        }

    def find(self, name: str) -> Value | None:
        """A variable's or a parameter's value; None if nothing has set it."""
        if name.isdigit():
            number = int(name)
            if number == 0:
                return self.script
            return self.arguments[number - 1] if number <= len(self.arguments) else None
        match name:
            case "@" | "*":
                return list(self.arguments)
            case "#":
                return str(len(self.arguments))
            case "?":
                return "0"
            case "$" | "!" | "-" | "_":
                return unknown(name)
            case "BASH_SOURCE":
                return [self.script]
            case "PWD":
                return self.folder
        return self.variables.get(name)

    def set(self, name: str, value: Value, *, append: bool = False) -> None:
        """Assign; a value that is not known gives way to what the user said of the variable."""
        parts = [value] if isinstance(value, str) else list(value)
        if isinstance(value, dict):
            parts = list(value.values())
        if name in self.given and any(unknowns(part) for part in parts):
            return
        if append:
            value = _joined(self.variables.get(name), value)
        elif isinstance(value, str) and isinstance(old := self.variables.get(name), list):
            value = [value, *old[1:]]
        pieces = [value] if isinstance(value, str) else list(value)
        if len(pieces) > MOST_ENTRIES or sum(map(len, pieces)) > _MOST_CHARACTERS:
            raise UnreadableLaunch(f"{self.script}: the variable {name} grows beyond what is read")
        self.variables[name] = value

    def set_entry(self, name: str, index: str, value: str, *, append: bool = False) -> None:
        """Assign an entry of an array; what lies between it and the end is empty."""
        array = self.variables.get(name)
        if isinstance(array, dict):
            array[index] = (array.get(index, "") if append else "") + value
            return
        entries = array if isinstance(array, list) else [] if array is None else [array]
        number = int(index)
        entries += [""] * (number + 1 - len(entries))
        entries[number] = (entries[number] if append else "") + value
        self.variables[name] = entries


def _joined(old: Value | None, value: Value) -> Value:
    """What += makes of a value."""
    if old is None:
        return value
    if isinstance(old, dict):
        return old | value if isinstance(value, dict) else old
    if isinstance(old, list):
        if isinstance(value, str):
            return [(old[0] if old else "") + value, *old[1:]]
        return [*old, *value]
    return old + value if isinstance(value, str) else [old, *value]
