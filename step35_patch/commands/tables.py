"""A table for a person: drawn on a terminal, aligned plain lines where output is piped."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table on standard output.

    Args:
        title: What it is, above it.
        columns: Their heads.
        rows: As many cells each.
    """
    print(f"\n{title}")
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    if not sys.stdout.isatty():
        for row in (columns, *rows):
            print("  ".join(map(str.rjust, row, widths)).rstrip())
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column, width in zip(columns, widths, strict=True):
        # Where there is no room, the widest column is folded.
        narrow = width < max(widths)
        table.add_column(column, justify="right", overflow="fold", no_wrap=narrow)
    for row in rows:
        table.add_row(*row)
    Console(markup=False, highlight=False).print(table)
