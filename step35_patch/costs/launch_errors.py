"""What is wrong with a launch, as data: one `LaunchProblem` each, all of them in one exception."""

from __future__ import annotations

from typing import NamedTuple


class LaunchProblem(NamedTuple):
    """One argument that a model cannot be laid out with.

    Attributes:
        argument: Megatron's option.
        expected: What would have been right.
        found: What is there.
        fix: What to do.
    """

    argument: str
    expected: str
    found: str
    fix: str

    def __str__(self) -> str:
        return f"{self.argument}: expected {self.expected}, found {self.found}; {self.fix}"


class LaunchError(ValueError):
    """Arguments that no model can be laid out with.

    Attributes:
        problems: All of them; never empty.
    """

    def __init__(self, problems: list[LaunchProblem]):
        self.problems = tuple(problems)
        super().__init__("\n".join(map(str, problems)))
