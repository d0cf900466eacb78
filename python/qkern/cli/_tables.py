"""Tables on stdout."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection

    from rich.console import Console

    from qkern.plotting import Table

__all__ = ["print_table"]


def print_table(console: Console, title: str, table: Table, *, left: Collection[str]) -> None:
    """Print a table, if it has rows; columns named in `left` hold text, all others numbers."""
    from rich.table import Table as Printed

    header, rows = table
    if not rows:
        return
    printed = Printed(title=title, title_justify="left")
    for name in header:
        printed.add_column(name, justify="left" if name in left else "right")
    for row in rows:
        printed.add_row(*row)
    console.print(printed)
