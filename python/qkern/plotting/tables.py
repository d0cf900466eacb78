"""Tables of text, as Markdown has them."""

from __future__ import annotations

__all__ = ["Table", "markdown"]

Table = tuple[tuple[str, ...], list[tuple[str, ...]]]
"""Header and rows, all text."""


def markdown(table: Table) -> str:
    """Return the table in Markdown."""
    header, rows = table
    lines = [header, tuple("---" for _ in header), *rows]
    return "\n".join("| " + " | ".join(map(_cell, line)) + " |" for line in lines)


def _cell(text: str) -> str:
    return text.replace("\n", " ").replace("|", "\\|")
