"""On which grids weights were rounded, one after the other, where that is not their file's own grid once.

A result of `qkern.convert` or `qkern.export_gguf` says so under `KEY`, of each matrix by its name in the file
without ``.weight``: a folder in ``qkern.json``, a GGUF in its metadata. Without it nobody could tell what was
rounded twice from what was damaged.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from qkern.checkpoints import RECIPE_NAME, read_json
from qkern.errors import FormatError, InputError
from qkern.ops.gguf_types import GGUFType
from qkern.schemes import Scheme
from qkern.search import parse_choice, spell_choice

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

__all__ = ["GGUF_KEY", "KEY", "Grid", "folder_grids", "parse_grids", "spelled_grids", "with_grid"]

KEY: Final = "grids"
GGUF_KEY: Final = "qkern.grids"
Grid: TypeAlias = "Scheme | GGUFType"


def with_grid(before: Sequence[str], after: str, *, is_exact: bool) -> list[str]:
    """Return the grids of what was on the grids `before` and is now on the grid `after`.

    Empty if that is all that there is to say: rounded once, to `after`.
    """
    grids = list(before) if is_exact else [*before, after]
    return [] if grids == [after] else grids


def parse_grids(said: Any, where: str) -> dict[str, tuple[Grid, ...]]:
    """Read what a file says; of a GGUF the JSON text.

    Raises
    ------
    FormatError
        If it is no mapping from names to schemes or types.
    """
    try:
        found: Mapping[str, Any] = json.loads(said) if isinstance(said, str) else said
        return {name: tuple(_grid(grid) for grid in _filled(grids)) for name, grids in found.items()}
    except (InputError, ValueError, AttributeError, TypeError, RecursionError) as error:
        raise FormatError(f"{where} is damaged: {error}; make the file again") from error


def spelled_grids(said: Any, where: str) -> dict[str, list[str]]:
    """As `parse_grids`, for files made from this one."""
    return {name: list(map(spell_choice, grids)) for name, grids in parse_grids(said, where).items()}


def folder_grids(folder: Path) -> dict[str, list[str]]:
    """`spelled_grids` of a folder; it need not say anything.

    Raises
    ------
    FormatError
        If its ``qkern.json`` is damaged.
    """
    file = folder / RECIPE_NAME
    return spelled_grids(read_json(file).get(KEY, {}), str(file)) if file.exists() else {}


def _filled(grids: Any) -> list[str]:
    if not isinstance(grids, list) or not grids:
        raise InputError(f"no list of grids: got {grids!r:.60}")
    return grids


def _grid(spelling: str) -> Grid:
    grid = parse_choice(spelling)
    if grid is None or (isinstance(grid, GGUFType) and grid.block == 1):
        raise InputError(f"no grid: got {spelling!r}")
    # Scales that are rounded too change little, and int8 activations nothing.
    return replace(grid.weight_only(), double_quant=False) if isinstance(grid, Scheme) else grid
