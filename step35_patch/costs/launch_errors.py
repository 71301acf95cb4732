"""What is wrong with a launch: all of it in one exception."""

from __future__ import annotations

from step35_patch.config.problem import Problem


class LaunchError(ValueError):
    """Arguments that no model can be laid out with.

    Attributes:
        problems: All of them; never empty.
    """

    def __init__(self, problems: list[Problem]):
        self.problems = tuple(problems)
        super().__init__("\n".join(map(str, problems)))
