"""What a command shows: titled rows, for a terminal in colour and its width, else plain lines."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

GOOD, WRONG, NOTICE, PLAIN = "ok", "!!", " *", "  "
_STYLES = {GOOD: "green", WRONG: "bold red", NOTICE: "yellow", PLAIN: ""}


class Line(NamedTuple):
    """One row.

    Attributes:
        text: What is said.
        label: What it is said of; may be empty.
        mark: One of `GOOD`, `WRONG`, `NOTICE`, `PLAIN`: read without colour too.
    """

    text: str
    label: str = ""
    mark: str = PLAIN


class Section(NamedTuple):
    """Rows under a title."""

    title: str
    lines: Sequence[Line]


def is_terminal() -> bool:
    """Whether a person reads the standard output."""
    return sys.stdout.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def show(sections: Sequence[Section]) -> None:
    """Print the sections that have rows."""
    if not is_terminal():
        print(as_text(sections))
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(markup=False, emoji=False, highlight=False)
    for section in sections:
        if not section.lines:
            continue
        console.print(section.title, style="bold")
        table = Table.grid(padding=(0, 1))
        table.add_column(width=2)
        if width := _label_width(section):
            table.add_column(width=width)
        table.add_column(overflow="fold")
        for line in section.lines:
            style = _STYLES[line.mark]
            label = [Text(line.label)] if len(table.columns) == 3 else []
            in_colour = style if line.mark in (WRONG, NOTICE) else ""
            table.add_row(Text(line.mark, style), *label, Text(line.text, in_colour))
        console.print(table)


def as_text(sections: Sequence[Section]) -> str:
    """The sections that have rows, a line for each row, however long."""
    lines = []
    for section in sections:
        if not section.lines:
            continue
        lines.append(section.title)
        width = _label_width(section)
        for line in section.lines:
            label = f"{line.label:<{width}} " if width else ""
            lines.append(f"{line.mark} {label}{line.text}".rstrip())
    return "\n".join(lines)


def _label_width(section: Section) -> int:
    return max(len(line.label) for line in section.lines)
