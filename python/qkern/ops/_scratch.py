"""How much memory plain torch may take beyond its inputs and its result, and the cutting of work to fit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["LIMIT", "pieces", "rows_within"]

LIMIT: Final = 64_000_000
"""Most bytes of temporaries that a call of the reference backend has alive at once."""


def rows_within(row_bytes: int, limit: int = LIMIT) -> int:
    """Rows whose temporaries, `row_bytes` each, stay within `limit`; at least one."""
    return max(limit // max(row_bytes, 1), 1)


def pieces(rows: int, row_bytes: int, limit: int = LIMIT) -> Iterator[slice]:
    """Cut `rows` into slices whose temporaries stay within `limit`."""
    step = rows_within(row_bytes, limit)
    for first in range(0, rows, step):
        yield slice(first, min(first + step, rows))
