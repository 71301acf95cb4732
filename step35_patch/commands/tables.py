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
    if not sys.stdout.isatty():
        widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
        print(f"\n{title}")
        for row in (columns, *rows):
            print("  ".join(map(str.rjust, row, widths)).rstrip())
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console(markup=False).print(table)
