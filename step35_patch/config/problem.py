"""One thing that does not go together, as a line that a person reads and as fields of JSON."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Problem:
    """An argument, or a field, that cannot stay as it is. Its `str` is one line.

    Attributes:
        argument: its name, as the user wrote it or would have to write it.
        expected: what would be right, and why where that is not plain.
        found: what is there; "none" if nothing is.
        fix: what to do.
    """

    argument: str
    expected: str
    found: str
    fix: str

    def __str__(self) -> str:
        return f"{self.argument}: expected {self.expected}, found {self.found}; {self.fix}"
