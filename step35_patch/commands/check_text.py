"""What a person reads of `step35-patch check`: problems, stages with their load, notes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from step35_patch.commands.tables import print_table
from step35_patch.config.errors import ranges

if TYPE_CHECKING:
    from step35_patch.config.model import Step35Config
    from step35_patch.launch.check import Report

_GIB = 2**30
_BAR = 10


def print_report(report: Report, config: Step35Config) -> None:
    """Print all of it on standard output."""
    if sys.stdout.isatty():
        _print_drawn(report)
    else:
        for problem in report.problems:
            print(problem)
    if report.estimate is not None:
        columns = ("stage", "layers", "operations", "", "GiB", "")
        print_table("load of a rank of each pipeline stage", columns, list(_loads(report, config)))
    for note in report.notes:
        print(f"note: {note}")
    count = len(report.problems)
    if not count:
        print("no problem found")
    else:
        print(f"{count} problem{'s' * (count > 1)}: this launch would not start, or not train this")


def _print_drawn(report: Report) -> None:
    """The problems, a part of each on a line, cut at the terminal's width."""
    from rich.console import Console
    from rich.padding import Padding
    from rich.text import Text

    console = Console(markup=False, highlight=False)
    for problem in report.problems:
        console.print(Text(problem.argument, style="bold red"))
        for name, style in (("expected", ""), ("found", ""), ("fix", "green")):
            line = Text.assemble((f"{name:<9}", "dim"), (getattr(problem, name), style))
            console.print(Padding(line, (0, 0, 0, 2)))


def _loads(report: Report, config: Step35Config) -> Iterator[tuple[str, ...]]:
    """A row for each pipeline rank; bars are of the largest."""
    from step35_patch.costs.accounting import stage_flops

    if report.launch is None or report.estimate is None:
        return
    ranks = report.estimate.ranks
    operations = [
        sum(stage_flops(config, report.launch, stage) for stage in rank.stages) for rank in ranks
    ]
    for rank, count in zip(ranks, operations, strict=True):
        layers = [index for stage in rank.stages for index in stage.layers]
        yield (
            f"{rank.pp}",
            ranges(layers).replace(",", ", ") or "-",
            f"{count / sum(operations):.1%}",
            _bar(count / max(operations)),
            f"{rank.memory / _GIB:.1f}",
            _bar(rank.memory / report.estimate.memory),
        )


def _bar(part: float) -> str:
    return ("#" * round(_BAR * part)).ljust(_BAR, ".")
